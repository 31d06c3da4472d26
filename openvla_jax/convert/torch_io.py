"""PyTorch's two file formats, without PyTorch: safetensors and the zip archives of `torch.save`.

Reading finds out where each tensor's bytes lie (`Tensor`) and maps them into memory one at a time. Writing lays a
file out first and then fills tensors in any order, in parts. Nothing of a file is ever executed: the pickle inside a
`.pt` may build containers and describe tensors, and every other object in it is refused.
"""

import collections
import dataclasses
import io
import json
import math
import os
import pickle
import pickletools
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
from openvla_jax.errors import InputError, reading, reason

AGAIN = "download the file again"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16,
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I16": np.dtype(np.int16), "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_), "F8_E4M3": E4M3, "F8_E5M2": E5M2,
}  # fmt: skip
TORCH_STORAGES = {
    "DoubleStorage": np.dtype(np.float64), "FloatStorage": np.dtype(np.float32), "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16, "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16), "CharStorage": np.dtype(np.int8), "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}  # fmt: skip
TORCH_DTYPES = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2}  # of storages without a type, as newer PyTorch saves some
HEADER_BYTES = 100_000_000  # of a safetensors file, the format's own limit
MAX_AXES = 64  # PyTorch's own limit
PICKLE_BYTES, PICKLE_NODES = 100_000_000, 50_000  # of a .pt: its description, and the entries of dicts in it
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
    """Returns the tensors of one file by name, without reading them.

    Raises:
        ConversionError: the header does not describe every byte of the file once, or a tensor's type is not supported.
    """
    with reading(path, AGAIN, ConversionError):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, HEADER_BYTES):
                raise ConversionError.of(path, f"no safetensors header ({size} bytes in all)", AGAIN)
            text = file.read(length)
        entries = {name: _entry(path, name, entry) for name, entry in _header(path, text).items()}
    tensors, end = {}, 0
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        tensor = Tensor(path, 8 + length + start, shape, dtype)
        if start != end or stop - start != tensor.nbytes:
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


def _header(path: Path, text: bytes) -> dict[str, Any]:
    with reading(path, AGAIN, ConversionError):
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ConversionError.of(path, f"damaged safetensors header (a {type(header).__name__})", AGAIN)
        header.pop("__metadata__", None)
        return header


def _entry(path: Path, name: str, entry: Any) -> tuple[np.dtype, Shape, int, int]:
    """Returns (type, shape, first byte, end) of what the header says of a tensor."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(place) and len(place) == 2):
        raise ConversionError.of(path, f"damaged safetensors header (tensor {name!r})", AGAIN)
    if dtype not in SAFETENSORS_DTYPES:
        raise _unsupported(path, name, dtype)
    return SAFETENSORS_DTYPES[dtype], tuple(shape), *place


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(value) is int and value >= 0 for value in values)


def _unsupported(path: Path, name: str, dtype: str) -> InputError:
    return ConversionError.of(
        path, f"tensor {name} has type {dtype}, which is not supported", "save it as float32, bfloat16 or float16"
    )


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
    with reading(index, AGAIN, ConversionError):
        weight_map = dict(json.loads(index.read_bytes())["weight_map"])
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ConversionError.of(index, "not an index of shards: weight_map holds more than file names", AGAIN)
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


class _Type(NamedTuple):
    """A type of numbers; `dtype` is None if it is not supported, or not known yet."""

    name: str
    dtype: np.dtype | None


class _Storage(NamedTuple):
    key: str
    type: _Type


class _Described(NamedTuple):
    """What the pickle says of a tensor."""

    storage: _Storage
    offset: int  # in elements
    shape: Shape
    stride: Shape


def _rebuild_tensor(storage, offset, shape, stride, *_) -> _Described:
    return _Described(storage, offset, _size(shape), _size(stride))


def _rebuild_typed_tensor(storage, offset, shape, stride, requires_grad, hooks, dtype, *_) -> _Described:
    """Describes a tensor whose storage has no type of its own."""
    return _Described(_Storage(storage.key, dtype), offset, _size(shape), _size(stride))


def _size(values: Any) -> tuple[Any, ...]:
    """Returns a copy, of short ones only: a pickle of some kB can ask for many copies of one list."""
    if len(values) > MAX_AXES:
        raise ValueError(f"a tensor of {len(values)} axes")
    return tuple(values)


def _empty_dict() -> collections.OrderedDict:
    return collections.OrderedDict()


_PICKLE_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _empty_dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch.storage", "UntypedStorage"): _Type("UntypedStorage", None),
    **{("torch", name): _Type(name, dtype) for name, dtype in (TORCH_STORAGES | TORCH_DTYPES).items()},
}
_TYPE = re.compile(r"(u?int|float|bfloat|complex|quint|qint|bits|bool)\w*|\w+Storage")


class _Unpickler(pickle.Unpickler):
    """Builds containers and tensor descriptions; any other object stops it before it exists."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PICKLE_NAMES:
            return _PICKLE_NAMES[module, name]
        if module == "torch" and _TYPE.fullmatch(name):
            return _Type(name, None)  # `_place` names the tensor that has it
        raise ConversionError(f"holds a foreign object, {module}.{name}: only tensors in plain containers are read")

    def persistent_load(self, pid: Any) -> _Storage:
        _, storage_type, key, *_ = pid
        if not isinstance(storage_type, _Type):
            raise TypeError("a storage without a type")
        return _Storage(str(key), storage_type)


def read_pt(path: Path) -> dict[str, Any]:
    """Returns the top-level dict of a `torch.save` archive, with `Tensor`s in place of tensors.

    Raises:
        ConversionError: no such archive, a damaged one, or one with objects that are neither containers nor tensors.
    """
    with reading(path, AGAIN, ConversionError):
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
                content = _unpickle(path, archive, members)
        except zipfile.BadZipFile as error:
            raise ConversionError.of(
                path,
                f"not a complete torch.save archive ({error})",
                "download it, or save it with PyTorch >= 1.6, again",
            ) from None
        if not isinstance(content, Mapping):
            raise ConversionError.of(path, f"holds {type(content).__name__}, wanted a dict of tensors")
        with path.open("rb") as file:
            return _Places(path, file, members).of_dict(content, "")


def _unpickle(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> Any:
    if "data.pkl" not in members:
        raise ConversionError.of(path, "a zip file, but not one of torch.save")
    if members["data.pkl"].file_size > PICKLE_BYTES:
        raise ConversionError.of(path, f"its pickle would have {members['data.pkl'].file_size:,} bytes", AGAIN)
    if "byteorder" in members:
        with archive.open(members["byteorder"]) as order:
            if order.read(16) != b"little":
                raise ConversionError.of(path, "big-endian tensors", "save it again on a little-endian machine")
    with archive.open(members["data.pkl"]) as file:
        data = file.read()
    try:
        # Before the unpickler makes room for what an opcode declares: for bytes that are not there, or a place in
        # its memo beyond any that a pickle of this size can have filled.
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > len(data):
                raise ValueError(f"place {argument} of the memo")
        return _Unpickler(io.BytesIO(data)).load()
    except ConversionError as error:
        raise ConversionError.of(path, str(error)) from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise ConversionError.of(path, f"damaged pickle ({reason(error)})", AGAIN) from None


def _read_bin(path: Path) -> dict[str, Tensor]:
    """A flat state dict, as transformers saved them before safetensors."""
    return {name: tensor for name, tensor in read_pt(path).items() if isinstance(tensor, Tensor)}


class _Places:
    """Finds out where the bytes of described tensors lie in an archive."""

    def __init__(self, path: Path, file: Any, members: Mapping[str, zipfile.ZipInfo]):
        self._path, self._file, self._members = path, file, members
        self._size = path.stat().st_size
        self._left = PICKLE_NODES  # a pickle of some bytes can name one dict in another very often

    def of_dict(self, node: Mapping[Any, Any], where: str) -> dict[Any, Any]:
        self._left -= len(node)
        if self._left < 0:
            raise ConversionError.of(self._path, f"has more than {PICKLE_NODES:,} entries", AGAIN)
        return {key: self._of(value, f"{where}.{key}" if where else str(key)) for key, value in node.items()}

    def _of(self, node: Any, where: str) -> Any:
        if isinstance(node, Mapping):
            return self.of_dict(node, where)
        return self._tensor(node, where) if isinstance(node, _Described) else node

    def _tensor(self, node: _Described, where: str) -> Tensor:
        kind, shape = node.storage.type, node.shape
        if not (
            isinstance(kind, _Type) and _are_sizes(shape) and _are_sizes(node.stride) and _are_sizes((node.offset,))
        ):
            raise ConversionError.of(self._path, f"damaged pickle (tensor {where})", AGAIN)
        if kind.dtype is None:
            raise _unsupported(self._path, where, kind.name)
        contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        steps = [s for s, length in zip(zip(node.stride, contiguous, strict=True), shape, strict=True) if length > 1]
        if any(stride != wanted for stride, wanted in steps):
            raise ConversionError.of(
                self._path, f"tensor {where} of shape {list(shape)} is stored with strides {node.stride}",
                "save it contiguous",
            )  # fmt: skip
        start = self._start(node.storage.key, (node.offset + math.prod(shape)) * kind.dtype.itemsize)
        return Tensor(self._path, start + node.offset * kind.dtype.itemsize, shape, kind.dtype)

    def _start(self, key: str, nbytes: int) -> int:
        """Returns where the data of a storage begins, which must have at least `nbytes`."""
        member = self._members.get(f"data/{key}")
        if member is None or member.compress_type or nbytes > member.file_size:
            raise ConversionError(f"{self._path}: storage {key} is missing or too short: download it again")
        self._file.seek(member.header_offset)
        header = self._file.read(30)  # the local header's name and extra field may differ from the directory's
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if start + nbytes > self._size:
            raise ConversionError(f"{self._path}: storage {key} is missing or too short: download it again")
        return start


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
