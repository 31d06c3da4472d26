"""PyTorch's two file formats, without PyTorch: safetensors and the zip archives of `torch.save`.

Reading finds out where each tensor's bytes lie (`Tensor`) and maps them into memory one at a time. Writing lays a
file out first and then fills tensors in any order, in parts. Nothing of a file is ever executed: the pickle inside a
`.pt` may build containers and describe tensors, and every other object in it is refused.
"""

import collections
import dataclasses
import json
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from openvla_jax.convert.names import ConversionError, Shape

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16,
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
TORCH_STORAGES = {
    "DoubleStorage": np.dtype(np.float64), "FloatStorage": np.dtype(np.float32), "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16, "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16), "CharStorage": np.dtype(np.int8), "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}  # fmt: skip
SHARD_BYTES = 7 * 10**9  # the reference's converter splits its files there
ALIGNMENT = 64  # of tensors in a .pt


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file: `read` maps it into memory, and letting go of the array unmaps it."""

    file: Path
    offset: int
    shape: Shape
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        return np.asarray(np.memmap(self.file, self.dtype, "r", self.offset, self.shape))


# ---------------------------------------------------------------------------------------------------------------------
# Reading safetensors
# ---------------------------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, checked: the header must describe every byte of the file once."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ConversionError(f"{path}: no safetensors header ({size} bytes in all): download the file again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (SAFETENSORS_DTYPES[e["dtype"]], tuple(map(int, e["shape"])), *map(int, e["data_offsets"]))
                for name, e in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{path}: damaged safetensors header ({error!r}): download the file again") from None
    tensors, end = {}, 0
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        tensor = Tensor(path, 8 + length + start, shape, dtype)
        if min(shape, default=0) < 0 or start != end or stop - start != tensor.nbytes:
            raise ConversionError(
                f"{path}: the header gives {name} bytes {start} to {stop}, but {dtype} {list(shape)} after byte {end} "
                f"takes {tensor.nbytes}: the header lies, get the file again"
            )
        tensors[name], end = tensor, stop
    if 8 + length + end != size:
        what = "truncated" if 8 + length + end > size else "followed by foreign bytes"
        raise ConversionError(
            f"{path}: {what}, {size} bytes where the header says {8 + length + end}: download it again"
        )
    return tensors


def read_torch_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, safetensors before pickles: through its index if it has one, else of its only file."""
    for stem, pattern, read in (
        ("model.safetensors", "*.safetensors", read_safetensors),
        ("pytorch_model.bin", "*.bin", _read_bin),
    ):
        index, files = folder / f"{stem}.index.json", sorted(folder.glob(pattern))
        if index.exists():
            return _read_shards(index, read)
        if (folder / stem).exists() or len(files) == 1:
            return read(folder / stem if (folder / stem).exists() else files[0])
        if files:
            raise ConversionError(f"{folder}: {len(files)} {pattern} files and no {index.name}: download it")
    raise ConversionError(f"{folder}: no .safetensors and no .bin files: there are no weights here")


def _read_shards(index: Path, read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{index}: not an index of shards ({error!r}): download it again") from None
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing:
        raise ConversionError(f"{index} names shards that are not there: {', '.join(missing)}: download them")
    shards = {name: read(index.parent / name) for name in names}
    problems = [f"{name} is not in {shard}" for name, shard in weight_map.items() if name not in shards[shard]]
    problems += [
        f"{name} in {s} is not in the index" for s, held in shards.items() for name in held if weight_map.get(name) != s
    ]
    if problems:
        raise ConversionError(f"{index} does not fit its shards: {'; '.join(problems[:20])}: download the folder again")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Reading .pt
# ---------------------------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Described(NamedTuple):
    """What the pickle says of a tensor."""

    storage: _Storage
    offset: int  # in elements
    shape: Shape
    stride: Shape


def _rebuild_tensor(storage, offset, shape, stride, *_) -> _Described:
    return _Described(storage, offset, tuple(shape), tuple(stride))


_PICKLE_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", name): _StorageType(dtype) for name, dtype in TORCH_STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Builds containers and tensor descriptions; any other object stops it before it exists."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_NAMES:
            raise ConversionError(f"holds a foreign object, {module}.{name}: only tensors in plain containers are read")
        return _PICKLE_NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, storage_type, key, *_ = pid
        return _Storage(str(key), storage_type.dtype)


def read_pt(path: Path) -> dict[str, Any]:
    """The top-level dict of a `torch.save` archive, with `Tensor`s in place of tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
            if "data.pkl" not in members:
                raise ConversionError(f"{path}: a zip file, but not one of torch.save")
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise ConversionError(f"{path}: big-endian tensors: save it again on a little-endian machine")
            with archive.open(members["data.pkl"]) as data:
                content = _Unpickler(data).load()
    except zipfile.BadZipFile as error:
        raise ConversionError(
            f"{path}: not a complete torch.save archive ({error}): download it, or save it with PyTorch >= 1.6, again"
        ) from None
    except ConversionError as error:
        raise ConversionError(f"{error}" if str(error).startswith(str(path)) else f"{path} {error}") from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise ConversionError(f"{path}: damaged pickle ({type(error).__name__}: {error}): download it again") from None
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path}: holds {type(content).__name__}, wanted a dict of tensors")
    with path.open("rb") as file:
        return _place(content, path, file, members)


def _read_bin(path: Path) -> dict[str, Tensor]:
    """A flat state dict, as transformers saved them before safetensors."""
    return {name: tensor for name, tensor in read_pt(path).items() if isinstance(tensor, Tensor)}


def _place(node: Any, path: Path, file: Any, members: Mapping[str, zipfile.ZipInfo]) -> Any:
    """Replaces descriptions of tensors by where their bytes lie."""
    if isinstance(node, Mapping):
        return {key: _place(value, path, file, members) for key, value in node.items()}
    if not isinstance(node, _Described):
        return node
    member = members.get(f"data/{node.storage.key}")
    itemsize, size = node.storage.dtype.itemsize, math.prod(node.shape)
    contiguous = tuple(math.prod(node.shape[i + 1 :]) for i in range(len(node.shape)))
    steps = [
        (stride, wanted)
        for stride, wanted, length in zip(node.stride, contiguous, node.shape, strict=True)
        if length > 1
    ]
    if any(stride != wanted for stride, wanted in steps):
        raise ConversionError(
            f"{path}: a tensor of shape {list(node.shape)} is stored with strides {node.stride}: save it contiguous"
        )
    if member is None or member.compress_type or (node.offset + size) * itemsize > member.file_size:
        raise ConversionError(f"{path}: storage {node.storage.key} is missing or too short: download it again")
    file.seek(member.header_offset)
    header = file.read(30)  # the local header's name and extra field may differ from the directory's
    start = member.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26)) + node.offset * itemsize
    return Tensor(path, start, node.shape, node.storage.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Writing: `lay_out_*` makes the file and says where each tensor goes, `fill` puts bytes there
# ---------------------------------------------------------------------------------------------------------------------

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
