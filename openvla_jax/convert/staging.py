"""Checkpoints in a bucket: what conversion reads of them is copied to a local folder, which goes when it is done."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from openvla_jax.convert.names import ConversionError
from openvla_jax.convert.progress import run_with_progress
from openvla_jax.storage import is_remote, retry

WORKERS = 8  # files in flight: a bucket answers each slowly, and many at once
COPY_BUFFER = 16 * 2**20  # bytes


def stage(directory: epath.Path, items: Sequence[str]) -> Path:
    """Copies some items of the checkpoint `directory` into a new folder of the system's temporary one, with progress.

    The caller removes the folder. Raises ConversionError if it does not fit there, and StorageError if a file cannot
    be read; then nothing is left of it.
    """
    files = {
        epath.Path(root) / name: epath.Path(root).relative_to(directory) / name
        for item in items
        for root, _, names in (directory / item).walk()
        for name in names
    }
    sizes = {path: path.stat().length for path in files}
    total, place = sum(sizes.values()), tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    if free < total * 1.02:
        raise ConversionError(
            f"{directory}: {total / 1e9:.1f} GB are copied to {place}, which has {free / 1e9:.1f} GB free; "
            "set TMPDIR to a folder with more room"
        )
    folder = Path(tempfile.mkdtemp(prefix="openvla-staging-"))

    def copy(path: epath.Path) -> int:
        target = folder / files[path]
        target.parent.mkdir(parents=True, exist_ok=True)
        retry(f"reading {path}", lambda: _copy(path, target))
        return sizes[path]

    try:
        run_with_progress(copy, files, total, f"copy {directory.name}", WORKERS)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _copy(source: epath.Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, COPY_BUFFER)


def require_local(path: str | os.PathLike, what: str) -> Path:
    """Returns the path of `what`, which conversion reads or writes on a disk. Raises ConversionError for a bucket's."""
    if is_remote(path):
        raise ConversionError(
            f"{path}: {what} has to be on a local disk; name a folder here, and copy it with `gcloud storage cp -r`"
        )
    return Path(path)
