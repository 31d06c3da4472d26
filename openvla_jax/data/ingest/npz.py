"""A folder of npz files, one per episode, -> RLDS.

Each file holds action float [T, D], and images uint8 [T, H, W, 3] under "image" or "image_<view>". It may hold state
float [T, S] and language_instruction: a text, or one for each step.
"""

import contextlib
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from openvla_jax.data import DataError, text
from openvla_jax.data.ingest.demonstrations import Episode, write
from openvla_jax.errors import reading

MAX_BYTES = 2**30  # of a frame, or of an array that is read whole; images are read frame by frame
_FIX = "copy the file again, or write it again with numpy.savez"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def convert(
    source: Path,
    folder: Path,
    name: str | None = None,
    instruction: str | None = None,
    val_share: float = 0.0,
    primary: str | None = None,
) -> str:
    """Converts a folder of npz episodes, in the order of their names; returns what to do next.

    Args:
        source: the folder.
        folder: where the dataset is written.
        name: of the dataset; None takes the folder's.
        instruction: for episodes that have none.
        val_share: see `demonstrations.write`.
        primary: the camera that policies see, if it is not obvious.

    Raises:
        DataError: names the file and what is wrong with it. Files with Python objects in them are refused, because
            reading those would run what they contain.
    """
    paths = sorted(source.glob("*.npz"))
    if not paths:
        raise DataError(f"{source} has no .npz files: give the folder that holds one per episode")
    episodes = (read_episode(path, instruction) for path in paths)
    _, description = write(folder, name or source.name.lower(), episodes, len(paths), val_share, str(source), primary)
    return f"{len(paths)} episodes; look over {description}, then train with data.module={description}"


def read_episode(path: Path, instruction: str | None = None) -> Episode:
    """Returns the episode of one file; its frames are read as they are drawn.

    Raises DataError as `convert` does; for damaged frames, while they are drawn.
    """
    stored = _stored(path)
    cameras: dict[str, Iterator[np.ndarray]] = {}
    for key in filter(_is_camera, stored):
        view = "primary" if key == "image" else key.removeprefix("image_")
        if len(stored[key].shape) != 4:
            raise DataError(f"{path}: {key} has shape {list(stored[key].shape)}, not [steps, height, width, 3]")
        if view in cameras:
            raise DataError(f"{path} holds the camera 'primary' twice, as image and as image_primary: rename one")
        cameras[view] = stored[key].frames()
    if not cameras or "action" not in stored:
        raise DataError(f"{path} holds {', '.join(sorted(stored))}: 'action' and 'image' or 'image_<view>' are needed")
    action = _numbers(stored["action"])
    state = _numbers(stored["state"]) if "state" in stored else np.zeros((len(action), 0), np.float32)
    texts = stored["language_instruction"].whole() if "language_instruction" in stored else instruction
    if texts is None or not np.size(texts):
        raise DataError(f"{path} has no language_instruction: give one with --instruction")
    return Episode(cameras, action, state, text.instructions(texts, len(action), f"{path}: language_instruction"))


@dataclass(frozen=True)
class _Array:
    """An array of an npz file, known by its header. No more is allocated than the file holds."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool  # order
    offset: int  # bytes of the header

    def whole(self) -> np.ndarray:
        """Reads all of it, at most MAX_BYTES."""
        if math.prod(self.shape) * self.dtype.itemsize > MAX_BYTES:
            raise DataError(
                f"{self.path}: {self.member} has shape {list(self.shape)} in {self.dtype}, more than "
                f"{MAX_BYTES / 2**30:g} GiB: store numbers as float32, images in C order (numpy.ascontiguousarray)"
            )
        with self._open() as file:
            return np.ndarray(self.shape, self.dtype, file.read(), order="F" if self.fortran else "C")

    def frames(self) -> Iterator[np.ndarray]:
        """Reads it row by row."""
        if self.fortran:
            yield from self.whole()
            return
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        if size > MAX_BYTES:
            raise DataError(f"{self.path}: {self.member} has frames of shape {list(self.shape[1:])}: shrink them")
        with self._open() as file:
            for _ in range(self.shape[0]):
                yield np.ndarray(self.shape[1:], self.dtype, file.read(size))

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        """Opens it behind its header; reading to the end checks its checksum."""
        with reading(self.path, _FIX, DataError), zipfile.ZipFile(self.path) as archive:
            file = archive.open(self.member)
            file.read(self.offset)
            yield file


def _is_camera(name: str) -> bool:
    return name == "image" or name.startswith("image_")


def _stored(path: Path) -> dict[str, _Array]:
    """The arrays of a file that an episode is made of, by name, before any is read."""
    with reading(path, _FIX, DataError), zipfile.ZipFile(path) as archive:
        arrays = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in ("action", "state", "language_instruction") or _is_camera(name):
                arrays[name] = _header(path, archive, member)
        return arrays


def _header(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Array:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise DataError.of(path, f"{member.filename} has format {version}, which numpy.savez does not write", _FIX)
        shape, fortran, dtype = _HEADERS[version](file)
        offset = file.tell()
    if dtype.hasobject:
        raise DataError.of(path, f"{member.filename} holds Python objects, which are not read", "store plain arrays")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or offset + size != member.file_size:
        raise DataError.of(
            path, f"{member.filename} declares {size:,} bytes and holds {member.file_size - offset:,}", _FIX
        )
    return _Array(path, member.filename, shape, dtype, fortran, offset)


def _numbers(array: _Array) -> np.ndarray:
    """A table as float32 [T, D]."""
    name = array.member.removesuffix(".npy")
    if array.dtype.kind not in "fiub":
        raise DataError(f"{array.path}: {name} is {array.dtype}, not numbers")
    if len(array.shape) != 2 or not array.shape[1]:
        raise DataError(f"{array.path}: {name} has shape {list(array.shape)}, not [steps, columns]")
    return array.whole().astype(np.float32)
