"""PyTorch's two file formats, without PyTorch: safetensors and the zip archives of `torch.save`.

Reading finds out where each tensor's bytes lie (`Tensor`) and maps them into memory one at a time. Nothing of a file is
ever executed: the pickle inside a `.pt` may build containers and describe tensors, and every other object in it is
refused. `torch_write.py` writes them.
"""

import collections
import dataclasses
import io
import json
import math
import pickle
import pickletools
import re
import struct
import zipfile
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
