"""Local and remote files: paths, writes that are tried again, whole files, and the cache of compiled programs."""

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from absl import logging
from etils import epath


def absolute(path: os.PathLike | str) -> epath.Path:
    """Orbax takes absolute paths only; remote ones (gs://) are."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


T = TypeVar("T")


ATTEMPTS = 4


_CACHE_BYTES = 8 * 2**30
_FIRST_PAUSE = 1.0  # seconds; each further one is four times as long


class StorageError(OSError):
    """A disk or bucket that went on failing after several attempts."""


def retry(what: str, action: Callable[[], T]) -> T:
    """`action()`, tried again after 1, 4 and 16 seconds; then StorageError with `what` and the cause in one line."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:  # file systems of buckets raise types of their own
            if attempt == ATTEMPTS:
                raise StorageError(f"{what} failed {ATTEMPTS} times: {cause(error)}") from error
            logging.warning("%s failed (%s), trying again", what, cause(error))
            pause(attempt)
    raise AssertionError


def pause(attempt: int) -> None:
    time.sleep(_FIRST_PAUSE * 4 ** (attempt - 1))


def cause(error: BaseException) -> str:
    """The first line of an error, short."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def atomic_write(path: os.PathLike | str, content: str | bytes) -> None:
    """Writes a file that readers see whole, or as it was; writers at the same time do not disturb each other.

    Text is UTF-8. Raises what the file system raises; then nothing is left of the new file.
    """
    whole = epath.Path(path)
    data = content.encode() if isinstance(content, str) else content
    if is_remote(whole):  # objects of a bucket appear whole, and renaming one would copy it
        whole.write_bytes(data)
        return
    new = whole.with_name(f".{whole.name}.{uuid.uuid4().hex}")
    try:
        new.write_bytes(data)
        new.replace(whole)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def copy_tree(source: str, target: epath.Path) -> None:
    """Copies files to a folder that may be in a bucket."""
    for path in Path(source).rglob("*"):
        if path.is_file():
            new = target / os.path.relpath(path, source)
            new.parent.mkdir(parents=True, exist_ok=True)
            epath.Path(path).copy(new, overwrite=True)


def use_compilation_cache(folder: str, every_program: bool = False) -> None:
    """Keeps compiled programs in `folder` (empty: nowhere), unless the environment has chosen another.

    `every_program`: those too that were compiled in less than a second.
    """
    import jax  # a second, which commands that end before they need it should not take

    if not folder or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    if not is_remote(folder):  # with a limit jax locks the folder: no process reads what another has written by half
        jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)
    if every_program:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def is_remote(path: os.PathLike | str) -> bool:
    """Whether a path is in a bucket rather than on a disk."""
    return "://" in os.fspath(path)
