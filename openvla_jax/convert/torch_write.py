"""Writes PyTorch's files: safetensors and `.pt`. `lay_out_*` makes a file and says where each tensor goes, `fill` puts
bytes there.
"""

import json
import math
import os
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openvla_jax.convert.names import Shape
from openvla_jax.convert.torch_io import SAFETENSORS_DTYPES, TORCH_STORAGES, Tensor

SHARD_BYTES = 7 * 10**9  # the reference's converter splits its files there
ALIGNMENT = 64  # of tensors in a .pt

Specs = Mapping[str, tuple[np.dtype, Shape]]


def fill(tensor: Tensor, start: int, data: np.ndarray) -> None:
    """Writes contiguous `data` at byte `start` of a tensor's place."""
    view, at = data.reshape(-1).view(np.uint8).data, tensor.offset + start
    assert start + len(view) <= tensor.nbytes, (tensor, start, len(view))
    with open(tensor.file, "r+b", buffering=0) as file:
        while view:
            written = os.pwrite(file.fileno(), view, at)
            view, at = view[written:], at + written


def _create(path: Path, size: int) -> None:
    """A file of its final size: a full disk shows now, not after an hour."""
    with path.open("wb") as file:
        if size and hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)


def lay_out_safetensors(folder: Path, specs: Specs, shard_bytes: int = SHARD_BYTES) -> dict[str, Tensor]:
    """Files for tensors in the given order, split as transformers does, with an index if there is more than one."""
    shards: list[dict[str, int]] = [{}]
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in specs.items()}
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    tensors, weight_map = {}, {}
    codes = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, size in shard.items():
            dtype, shape = specs[key]
            header[key] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        _create(folder / name, 8 + len(text) + end)
        with (folder / name).open("r+b") as file:
            file.write(len(text).to_bytes(8, "little") + text)
        for key in shard:
            dtype, shape = specs[key]
            tensors[key] = Tensor(folder / name, 8 + len(text) + header[key]["data_offsets"][0], shape, dtype)
            weight_map[key] = name
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return tensors


class PtWriter:
    """One `.pt` file with nested dicts of tensors, laid out at once (`tensors`, by dotted name), to be `finish`ed."""

    def __init__(self, path: Path, tree: Mapping[str, Any]):
        """`tree`: nested dicts with (dtype, shape) leaves."""
        self.path, self.tensors, self._members = path, {}, []
        self._root = re.sub(r"[^\w.=-]", "_", path.stem)
        pickled, leaves = _pickle_tree(tree)
        self._small = {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}
        offset = 0
        for name, content in self._small.items():
            offset = self._add(name, offset, len(content))
        for number, (name, (dtype, shape)) in enumerate(leaves.items()):
            size = math.prod(shape) * dtype.itemsize
            end = self._add(f"data/{number}", offset, size)
            self.tensors[name] = Tensor(path, end - size, shape, dtype)
            offset = end
        self._end = offset
        _create(path, offset)

    def _add(self, name: str, offset: int, size: int) -> int:
        """Notes a member whose header is at `offset`; returns where its data ends."""
        encoded = f"{self._root}/{name}".encode()
        padding = -(offset + 30 + len(encoded) + 4) % ALIGNMENT
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        start = offset + 30 + len(encoded) + len(extra)
        self._members.append((encoded, extra, offset, start, size))
        return start + size

    def finish(self) -> None:
        """Writes checksums, headers and directory: only now is the file an archive."""
        with self.path.open("r+b") as file:
            for content, (_, _, _, start, _) in zip(self._small.values(), self._members, strict=False):
                file.seek(start)
                file.write(content)
            directory = b""
            for name, extra, offset, start, size in self._members:
                file.seek(start)
                crc, left = 0, size
                while left:
                    block = file.read(min(left, 1 << 24))
                    crc, left = zlib.crc32(block, crc), left - len(block)
                common = struct.pack("<HHHHIIIH", 0x800, 0, 0, 0x21, crc, size, size, len(name))
                file.seek(offset)
                file.write(b"PK\3\4" + struct.pack("<H", 45) + common + struct.pack("<H", len(extra)) + name + extra)
                far = struct.pack("<HHQ", 1, 8, offset) if offset >= 0xFFFFFFFF else b""
                directory += b"PK\1\2" + struct.pack("<HH", 45, 45) + common
                directory += struct.pack("<HHHHII", len(far), 0, 0, 0, 0, min(offset, 0xFFFFFFFF)) + name + far
            file.seek(self._end)
            count = len(self._members)
            file.write(directory)
            file.write(b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), self._end))
            file.write(b"PK\6\7" + struct.pack("<IQI", 0, self._end + len(directory), 1))
            small = struct.pack(
                "<HHII", min(count, 0xFFFF), min(count, 0xFFFF), len(directory), min(self._end, 0xFFFFFFFF)
            )
            file.write(b"PK\5\6" + bytes(4) + small + bytes(2))


def _pickle_tree(tree: Mapping[str, Any]) -> tuple[bytes, dict[str, tuple[np.dtype, Shape]]]:
    """The pickle (protocol 2) that `torch.load` expects for nested dicts of contiguous tensors, one storage each."""
    storages = {dtype: name for name, dtype in TORCH_STORAGES.items()}
    leaves: dict[str, tuple[np.dtype, Shape]] = {}

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def integer(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def integers(values: Shape) -> bytes:
        return b"(" + b"".join(map(integer, values)) + b"t"

    def emit(node: Any, path: str) -> bytes:
        if isinstance(node, Mapping):
            items = (text(key) + emit(value, f"{path}.{key}" if path else key) for key, value in node.items())
            return b"}(" + b"".join(items) + b"u"
        dtype, shape = node
        key = str(len(leaves))
        leaves[path] = node
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        storage = b"(" + text("storage") + f"ctorch\n{storages[dtype]}\n".encode() + text(key) + text("cpu")
        storage += integer(math.prod(shape)) + b"tQ"
        hooks = b"ccollections\nOrderedDict\n)R"
        arguments = b"(" + storage + integer(0) + integers(shape) + integers(stride) + b"\x89" + hooks + b"t"
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"

    return b"\x80\x02" + emit(tree, "") + b".", leaves
