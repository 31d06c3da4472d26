"""Arrays of an Orbax checkpoint, slice by slice: a stacked leaf of 6 GB is never in memory.

Orbax itself saves and restores whole arrays. Its format on disk is Zarr arrays under `<item>/`, named by their dotted path,
and a `_METADATA` file that lists them; this module writes that format (uncompressed, chunks of at most `CHUNK_BYTES`, so
that each host of a pod reads little more than its share) and reads whatever Orbax wrote.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from openvla_jax.convert.names import ConversionError, Shape, is_stacked

CHUNK_BYTES = 16 * 2**20
_TREE_HANDLER = "orbax.checkpoint.experimental.v1._src.handlers.pytree_handler.PyTreeHandler"
_CONTEXT = {"file_io_concurrency": {"limit": 8}, "cache_pool": {"total_bytes_limit": 0}}


def chunk_shape(leaf: str, shape: Shape, dtype: np.dtype) -> Shape:
    """One layer at most, and of that as many leading rows as fit into `CHUNK_BYTES` (at least one)."""
    stacked = is_stacked(leaf)
    layer = shape[1:] if stacked else shape
    if not layer:
        return (1,) * len(shape)
    rows = max(1, min(layer[0], CHUNK_BYTES // max(1, math.prod(layer[1:]) * dtype.itemsize)))
    rows = -(-layer[0] // -(-layer[0] // rows))  # equal blocks
    return ((1,) if stacked else ()) + (rows, *layer[1:])


class OrbaxWriter:
    """Writes items (`params`, `unused`) of a checkpoint directory; `finish` makes it one that Orbax recognises."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._context = ts.Context(_CONTEXT)
        self._leaves: dict[str, list[tuple[str, ...]]] = {}

    def create(self, leaf: str, shape: Shape, dtype: np.dtype) -> Any:
        """A leaf `item/path/of/array`, to be assigned in slices: `result[layer].write(array).result()`."""
        item, *path = leaf.split("/")
        self._leaves.setdefault(item, []).append(tuple(path))
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{self.directory / item / '.'.join(path)}/"},
            "metadata": {
                "shape": list(shape),
                "chunks": list(chunk_shape(leaf, shape, dtype)),
                "dtype": "bfloat16" if dtype.name == "bfloat16" else dtype.str,
                "compressor": None,
            },
            "store_data_equal_to_fill_value": True,
            "create": True,
            "recheck_cached_data": False,
        }
        return ts.open(spec, context=self._context).result()

    def finish(self) -> None:
        for item, leaves in self._leaves.items():
            metadata = {
                "tree_metadata": {
                    str(path): {
                        "key_metadata": [{"key": key, "key_type": 2} for key in path],
                        "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
                    }
                    for path in leaves
                },
                "use_ocdbt": False,
                "use_zarr3": False,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            }
            (self.directory / item / "_METADATA").write_text(json.dumps(metadata))
        now = time.time_ns()
        checkpoint = {
            "item_handlers": dict.fromkeys(self._leaves, _TREE_HANDLER),
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        }
        (self.directory / "_CHECKPOINT_METADATA").write_text(json.dumps(checkpoint))
        (self.directory / "orbax.checkpoint").touch()


class OrbaxReader:
    """The arrays of a complete checkpoint directory, written by Orbax or by `OrbaxWriter`; `arrays` by `item/path`."""

    def __init__(self, directory: Path, items: tuple[str, ...] = ("params", "unused")):
        self.arrays: dict[str, Any] = {}
        context = ts.Context(_CONTEXT)
        for item in items:
            folder = directory / item
            if not folder.is_dir():
                continue
            try:
                metadata = json.loads((folder / "_METADATA").read_text())
                paths = [
                    tuple(key["key"] for key in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()
                ]
                pending = {
                    f"{item}/{'/'.join(p)}": ts.open(_open_spec(folder, p, metadata), context=context) for p in paths
                }
                self.arrays |= {leaf: future.result() for leaf, future in pending.items()}
            except (OSError, ValueError, KeyError) as error:
                raise ConversionError(
                    f"{folder} is not a readable Orbax item ({error}): the checkpoint is damaged"
                ) from None

    def step(self, leaf: str) -> int:
        """Layers that a stacked leaf's chunks hold: reading fewer at a time would read some bytes again."""
        return max(1, self.arrays[leaf].chunk_layout.read_chunk.shape[0]) if is_stacked(leaf) else 1

    def read(self, leaf: str, first: int = 0, count: int = 1) -> np.ndarray:
        """Layers first..first + count of a stacked leaf, or all of another one."""
        array = self.arrays[leaf]
        return np.asarray((array[first : first + count] if is_stacked(leaf) else array).read().result())


def _open_spec(folder: Path, path: tuple[str, ...], metadata: dict[str, Any]) -> dict[str, Any]:
    name = ".".join(path)
    if metadata.get("use_ocdbt", True):
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    else:
        store = {"driver": "file", "path": f"{folder / name}/"}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    return {"driver": driver, "kvstore": store, "open": True, "recheck_cached_data": False}
