"""Checksums of a checkpoint's files, written beside them before the checkpoint counts as complete.

Each process notes the files that it wrote: the first in `checksums.json`, the n-th further one in `checksums.<n>.json`.
A file holds {"processes": how many there are, "files": {path in the checkpoint: {"bytes": size, "sha256": digest}}}.
Orbax's markers at the top of a checkpoint are not listed: they say that it is complete, and are written last.
"""

import asyncio
import concurrent.futures
import hashlib
import json
import os
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from openvla_jax.checkpoint.contract import DAMAGED, CheckpointError, is_finite, read_json
from openvla_jax.errors import reading
from openvla_jax.storage import atomic_write, retry

FILE = "checksums.json"
MISSING = "no checksums are stored with it; save or import it again with this version to have them"
# Names of files and folders that a process other than the first writes: Orbax's and the data stream's.
_OF_PROCESS = re.compile(r"(?:process_|stream_)(\d+)")
_UNFINISHED = ".orbax-checkpoint-tmp"
_BLOCK = 2**24
_WORKERS = min(8, os.cpu_count() or 1)
_LOOKS = 16  # files looked at together: a bucket answers each slowly

Files = dict[str, dict[str, Any]]


def entry(data: Any) -> dict[str, Any]:
    """Returns what is noted of a file with this content."""
    return {"bytes": memoryview(data).nbytes, "sha256": hashlib.sha256(data).hexdigest()}


def digest_file(path: epath.Path) -> dict[str, Any]:
    """Returns what is noted of a file, which is read in blocks."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def files_below(folder: epath.Path) -> Iterator[epath.Path]:
    """All files in a folder and its folders, in order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def digest_folder(folder: epath.Path, process: int = 0, known: Mapping[str, Any] | None = None) -> Files:
    """Returns what is noted of the files of an item that a process wrote, by their path in the checkpoint.

    Args:
        folder: the item's folder, directly in the checkpoint's.
        process: the index of the process.
        known: files that were noted while they were written.
    """
    item = folder.name.partition(_UNFINISHED)[0]  # a run's save renames its items when they are complete
    paths = {f"{item}/{os.path.relpath(path, folder)}": path for path in files_below(folder)}
    mine = [name for name in paths if _process_of(name) == process and name not in (known or {})]
    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        return dict(zip(mine, pool.map(lambda name: digest_file(paths[name]), mine), strict=True))


def _process_of(name: str) -> int:
    found = _OF_PROCESS.search(name)
    return int(found[1]) if found else 0


def write(directory: epath.Path, files: Files, process: int = 0, processes: int = 1) -> None:
    """Writes the checksums of one process into the folder of a checkpoint."""
    content = {"processes": processes, "files": dict(sorted(files.items()))}
    atomic_write(directory / _name(process), json.dumps(content, indent=1) + "\n")


def _name(process: int) -> str:
    return FILE if process == 0 else f"checksums.{process}.json"


# ---------------------------------------------------------------------------------------------------------------------
# Saving through Orbax
# ---------------------------------------------------------------------------------------------------------------------


class Note:
    """Collects the checksums of this process's files of a save; the item that is complete last writes them down."""

    def __init__(self, items: int):
        self._left, self._files, self._lock = items, Files(), threading.Lock()  # a run's items are saved by threads
        self._process, self._processes = jax.process_index(), jax.process_count()

    async def take(self, written: Awaitable[None], directory: Any) -> None:
        """Waits until an item is written, and notes its files."""
        await written
        folder = await directory.await_creation()
        files = await asyncio.to_thread(self._tried, folder, lambda: digest_folder(folder, self._process))
        with self._lock:
            self._files |= files
            self._left -= 1
            last = not self._left
        if last:
            save = lambda: write(folder.parent, self._files, self._process, self._processes)
            await asyncio.to_thread(self._tried, folder, save)

    def _tried(self, folder: epath.Path, action: Callable[[], Any]) -> Any:
        # Of one process alone, the whole save is tried again if it fails.
        return action() if self._processes == 1 else retry(f"noting the checksums of {folder}", action)


class _Noted:
    """A tree of arrays to be saved, with the note of its save."""

    def __init__(self, tree: Any, note: Note):
        self.tree, self.note = tree, note


class _NotingHandler(ocp.handlers.CheckpointableHandler):
    """Saves trees as Orbax's own handler does, and notes the checksums of what that wrote."""

    # What Orbax records as the handler that reads the item, which is its own.
    __module__, __qualname__ = ocp.handlers.PyTreeHandler.__module__, ocp.handlers.PyTreeHandler.__qualname__

    def __init__(self) -> None:
        self._handler = ocp.handlers.PyTreeHandler()

    def is_handleable(self, checkpointable: Any) -> bool:
        return isinstance(checkpointable, _Noted)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        return False

    async def save(self, directory: Any, checkpointable: _Noted) -> Awaitable[None]:
        written = await self._handler.save(directory, checkpointable.tree)
        return checkpointable.note.take(written, directory)

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Any:
        raise NotImplementedError(f"{directory} is read by Orbax's own handler")

    async def metadata(self, directory: Any) -> Any:
        raise NotImplementedError(f"{directory} is read by Orbax's own handler")


class _NotedFiles:
    """An item of plain files with the note of its save (`reading.Files`)."""

    def __init__(self, files: Any, note: Note):
        self._files, self._note = files, note

    async def save(self, directory: Any) -> Awaitable[None]:
        return self._note.take(await self._files.save(directory), directory)

    async def load(self, directory: Any) -> Any:
        return await self._files.load(directory)


def noted(items: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the items of a save so that their checksums are written with them, in a context of `noting_context`."""
    note = Note(len(items))
    is_tree = lambda item: not hasattr(item, "save")
    return {name: (_Noted if is_tree(item) else _NotedFiles)(item, note) for name, item in items.items()}


def noting_context() -> Any:
    """Returns an Orbax context in which `noted` items are saved."""
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry().add(_NotingHandler)
    return context


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def stored(directory: epath.Path, item: str = "") -> Files:
    """Returns what is noted of the files of a checkpoint, or of one item of it; empty if it has no checksums.

    Raises:
        CheckpointError: the checksums of a process are missing or damaged.
    """
    files, process, processes = Files(), 0, 1
    while process < processes:
        path = directory / _name(process)
        if process == 0 and not path.exists():
            return {}
        content = read_json(path)
        with reading(path, DAMAGED, CheckpointError):
            processes = content["processes"]
            for name, noted in content["files"].items():
                if not (is_finite(noted["bytes"]) and isinstance(noted["sha256"], str)):
                    raise CheckpointError.of(path, f"the entry of {name} is damaged", DAMAGED)
                if not item or name.startswith(f"{item}/"):
                    files[name] = noted
            process += 1
    return files


def first_damaged(directory: epath.Path, files: Files) -> str | None:
    """Returns the first file that is missing, or of another size than noted, and what is wrong with it."""

    def damage(name: str) -> str:
        path, size = directory / name, files[name]["bytes"]
        if not path.exists():
            return f"{path}: is missing"
        found = path.stat().length
        return "" if found == size else f"{path}: has {found:,} bytes, not the {size:,} that were written"

    with concurrent.futures.ThreadPoolExecutor(_LOOKS) as pool:
        return next(filter(None, pool.map(damage, sorted(files))), None)


def verify(directory: os.PathLike | str, item: str = "") -> tuple[int, int]:
    """Reads the files of a checkpoint, or of one item, and compares them with their checksums; returns (files, bytes).

    Raises:
        CheckpointError: names the files that differ, or says that no checksums are stored.
    """
    folder = epath.Path(directory)
    files = stored(folder, item)
    if not files:
        raise CheckpointError.of(folder, "cannot be verified", MISSING)
    if damage := first_damaged(folder, files):
        raise CheckpointError(f"{damage}; {DAMAGED}")

    def differs(name: str) -> bool:
        with reading(folder / name, DAMAGED, CheckpointError):
            return digest_file(folder / name)["sha256"] != files[name]["sha256"]

    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        bad = [name for name, different in zip(files, pool.map(differs, files), strict=True) if different]
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise CheckpointError.of(folder / bad[0], f"its bytes are not those that were written{more}", DAMAGED)
    return len(files), sum(noted["bytes"] for noted in files.values())
