"""Arrays of an Orbax checkpoint, slice by slice: a stacked leaf of 6 GB is never in memory.

Orbax itself saves and restores whole arrays. Its format on disk is Zarr arrays under `<item>/`, named by their dotted
path, and a `_METADATA` file that lists them; this module writes that format (uncompressed, chunks of at most
`CHUNK_BYTES`, so that each host of a pod reads little more than its share) and reads whatever Orbax wrote.
"""

import json
import math
import os
import shutil
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from openvla_jax.checkpoint import checksums
from openvla_jax.checkpoint.reading import check_files, reading_item
from openvla_jax.convert.names import Shape, is_stacked
from openvla_jax.convert.staging import stage
from openvla_jax.storage import is_remote

CHUNK_BYTES = 16 * 2**20
_TREE_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_CONTEXT = {"file_io_concurrency": {"limit": 8}, "cache_pool": {"total_bytes_limit": 0}}


def chunk_shape(leaf: str, shape: Shape, dtype: np.dtype) -> Shape:
    """One layer at most, and of that an equal share of its rows, as many as fit into `CHUNK_BYTES` (at least one)."""
    lead = shape[:1] if is_stacked(leaf) else ()
    rows, *rest = shape[len(lead) :]
    fit = CHUNK_BYTES // max(1, math.prod(rest) * dtype.itemsize)
    share = next(size for size in range(max(1, min(rows, fit)), 0, -1) if rows % size == 0)
    return (*(1 for _ in lead), share, *rest)


class OrbaxWriter:
    """Writes items (`params`, `unused`) of a checkpoint directory; `finish` makes it one that Orbax recognises."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._chunks: dict[str, Shape] = {}
        self._checksums: checksums.Files = {}

    def _folder(self, leaf: str) -> Path:
        item, *path = leaf.split("/")
        return self.directory / item / ".".join(path)

    def create(self, leaf: str, shape: Shape, dtype: np.dtype) -> None:
        """Announces the leaf `item/path/of/array`."""
        self._chunks[leaf] = chunk_shape(leaf, shape, dtype)
        array = {
            "zarr_format": 2,
            "shape": list(shape),
            "chunks": list(self._chunks[leaf]),
            "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
            "fill_value": None,
            "order": "C",
            "filters": None,
            "compressor": None,
            "dimension_separator": ".",
        }
        self._folder(leaf).mkdir(parents=True)
        (self._folder(leaf) / ".zarray").write_text(json.dumps(array))

    def write(self, leaf: str, layer: int | None, x: np.ndarray) -> None:
        """Writes a layer of a stacked leaf, or all of another one; layers may come in any order and from any thread."""
        chunk = self._chunks[leaf]
        rows = chunk[0 if layer is None else 1]
        x = np.ascontiguousarray(x)
        for index, first in enumerate(range(0, len(x), rows)):
            place = (*(() if layer is None else (layer,)), index, *(0 for _ in x.shape[1:]))
            path, data = self._folder(leaf) / ".".join(map(str, place)), x[first : first + rows]
            with open(path, "wb", buffering=0) as file:
                file.write(data.reshape(-1).view(np.uint8).data)
            self._checksums[os.path.relpath(path, self.directory)] = checksums.entry(data.reshape(-1).view(np.uint8))

    def finish(self) -> None:
        """Writes what makes the folder a checkpoint: metadata, checksums of all its files, and last Orbax's markers."""
        items = sorted({leaf.partition("/")[0] for leaf in self._chunks})
        for item in items:
            paths = [tuple(leaf.split("/")[1:]) for leaf in self._chunks if leaf.startswith(f"{item}/")]
            metadata = {
                "tree_metadata": {
                    str(path): {
                        "key_metadata": [{"key": key, "key_type": 2} for key in path],
                        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
                    }
                    for path in paths
                },
                "use_ocdbt": False,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            }
            (self.directory / item / "_METADATA").write_text(json.dumps(metadata))
        for folder in (path for path in epath.Path(self.directory).iterdir() if path.is_dir()):
            self._checksums |= checksums.digest_folder(folder, known=self._checksums)
        checksums.write(epath.Path(self.directory), self._checksums)
        now = time.time_ns()
        checkpoint = {
            "item_handlers": dict.fromkeys(items, _TREE_HANDLER),
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        }
        (self.directory / "_CHECKPOINT_METADATA").write_text(json.dumps(checkpoint))
        (self.directory / "orbax.checkpoint").touch()
        (self.directory / "commit_success.txt").touch()  # without it Orbax reads no copy in a bucket (gs://)


class OrbaxReader:
    """The arrays of a complete checkpoint directory, written by Orbax or by `OrbaxWriter`.

    One in a bucket is copied first, as far as `items` go; the copy goes with the reader, or at the program's end.
    `leaves`: {item/path: (dtype, shape)}. Raises CheckpointError if the checkpoint is damaged.
    """

    def __init__(self, directory: os.PathLike, items: tuple[str, ...] = ("params", "unused")):
        self._arrays: dict[str, Any] = {}
        self._directory = directory
        local = Path(directory)
        if is_remote(directory):
            local = stage(epath.Path(directory), items)
            weakref.finalize(self, shutil.rmtree, local, ignore_errors=True)
        context = ts.Context(_CONTEXT)
        for item in items:
            folder = local / item
            if not folder.is_dir():
                continue
            check_files(directory, item)
            with reading_item(directory, item):
                metadata = json.loads((folder / "_METADATA").read_text())
                paths = [
                    tuple(key["key"] for key in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()
                ]
                pending = {
                    f"{item}/{'/'.join(p)}": ts.open(_open_spec(folder, p, metadata), context=context) for p in paths
                }
                self._arrays |= {leaf: future.result() for leaf, future in pending.items()}
        self.leaves: dict[str, tuple[np.dtype, Shape]] = {
            leaf: (array.dtype.numpy_dtype, tuple(array.shape)) for leaf, array in self._arrays.items()
        }

    def step(self, leaf: str) -> int:
        """Layers that a stacked leaf's chunks hold: reading fewer at a time would read some bytes again."""
        return max(1, self._arrays[leaf].chunk_layout.read_chunk.shape[0]) if is_stacked(leaf) else 1

    def read(self, leaf: str, first: int = 0, count: int = 1) -> np.ndarray:
        """Layers first..first + count of a stacked leaf, or all of another one."""
        array = self._arrays[leaf]
        with reading_item(self._directory, leaf.partition("/")[0]):
            return np.asarray((array[first : first + count] if is_stacked(leaf) else array).read().result())


def _open_spec(folder: Path, path: tuple[str, ...], metadata: dict[str, Any]) -> dict[str, Any]:
    name = ".".join(path)
    if metadata.get("use_ocdbt", True):
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{folder / name}/"}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    spec = {"driver": driver, "kvstore": store, "open": True, "recheck_cached_data": False}
    if metadata.get("store_array_data_equal_to_fill_value"):
        spec["fill_missing_data_reads"] = False  # a chunk that is not there is lost, not zero
    return spec
