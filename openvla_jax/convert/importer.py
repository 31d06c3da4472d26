"""PyTorch weights into an Orbax checkpoint with its contract: read from mapped files, written slice by slice."""

import contextlib
import dataclasses
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openvla_jax.checkpoint.contract import REFERENCE_CROP_AREA
from openvla_jax.convert.names import ConversionError, Slot
from openvla_jax.convert.oft import OftOptions
from openvla_jax.convert.orbax_io import OrbaxWriter
from openvla_jax.convert.progress import run_with_progress
from openvla_jax.convert.source import Source, TorchWeights, require_finite
from openvla_jax.convert.sources import open_source
from openvla_jax.convert.staging import require_local


def import_weights(
    src: str | Path,
    dst: str | Path,
    *,
    tokenizer: str | Path | None = None,
    model_config: str | Mapping[str, Any] | None = None,
    parts: Mapping[str, str] | None = None,
    center_crop: bool = False,
    overwrite: bool = False,
    oft: OftOptions | None = None,
    base: str | Path | None = None,
) -> Source:
    """Converts HuggingFace, Prismatic or base weights at `src` into the checkpoint directory `dst`; dtypes stay.

    `dst` appears when it is complete; with `overwrite` an existing one is replaced at that moment. `center_crop` notes
    that the policy was trained with the reference's random crops, 0.9 of the area. `oft` tells what the files of an
    OpenVLA-OFT checkpoint do not, and `base` which model its run adapted, if it was not merged. Raises ConversionError
    or OSError; then `dst` is as it was.
    """
    dst = new_folder(dst, overwrite)
    source = open_source(src, model_config=model_config, tokenizer=tokenizer, parts=parts, oft=oft, base=base)
    if not isinstance(source.weights, TorchWeights):
        raise ConversionError(f"{src} is an Orbax checkpoint already: it needs no import")
    weights = source.weights
    if center_crop:
        cropped = dataclasses.replace(source.preprocessing, crop_area=REFERENCE_CROP_AREA)
        source = dataclasses.replace(source, preprocessing=cropped)
    contract = source.contract()
    with finished_or_gone(dst, source.nbytes) as folder:
        writer = OrbaxWriter(folder)
        for leaf, (dtype, shape) in weights.leaves.items():
            writer.create(leaf, shape, dtype)

        def copy(slot: Slot) -> int:
            x = weights.read_slot(slot)
            require_finite(x, slot.source, source.path)
            writer.write(slot.target, slot.layer, x)
            return x.nbytes

        run_with_progress(copy, weights.slots, source.nbytes, f"import {dst.name}")
        (folder / "contract").mkdir()
        contract.save(folder / "contract")
        writer.finish()
    return source


# ---------------------------------------------------------------------------------------------------------------------
# All or nothing
# ---------------------------------------------------------------------------------------------------------------------


def new_folder(dst: str | os.PathLike, overwrite: bool) -> Path:
    """Returns the destination's path. Raises ConversionError if it exists or is in a bucket."""
    path = require_local(dst, "the destination")
    if path.exists() and not overwrite:
        raise ConversionError(f"{path} exists: name another destination, or pass --overwrite to replace it")
    return path


@contextlib.contextmanager
def finished_or_gone(dst: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `dst` to write into: it takes the name when the block ends well, and is removed when it does not.

    A killed process leaves `.DST.incomplete-*` behind and nothing under the name `dst`.
    """
    parent = dst.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < nbytes * 1.02:
        raise ConversionError(
            f"{parent}: {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} GB are needed: free space or write elsewhere"
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{dst.name}.incomplete-", dir=parent))
    folder.chmod(0o777 & ~_umask())
    old = folder.with_name(folder.name.replace("incomplete", "replaced"))
    try:
        yield folder
        _flush(folder)
        if dst.exists():
            os.replace(dst, old)
        os.replace(folder, dst)
    except BaseException as error:
        if old.exists():
            os.replace(old, dst)
        shutil.rmtree(folder, ignore_errors=True)
        if _is_disk_full(error):
            raise ConversionError(
                f"{parent}: the disk filled up, {nbytes / 1e9:.1f} GB are needed: free space"
            ) from error
        raise
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    """Everything is on the disk before the folder takes its name: a power cut must not leave holes in it."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_disk_full(error: BaseException) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
