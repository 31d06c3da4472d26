"""Finds complete checkpoints and reads parameters from them."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from openvla_jax.checkpoint import checksums
from openvla_jax.checkpoint.contract import (
    CONFIG_FILE,
    DAMAGED,
    STATISTICS_FILE,
    CheckpointError,
    Contract,
    parse_object,
    read_json,
)
from openvla_jax.errors import InputError, reason
from openvla_jax.models.tree import flat, nested, refill, shapes
from openvla_jax.storage import absolute, retry

JSON_FILES = ("_METADATA", "_sharding")  # of an item
MARKER = "_CHECKPOINT_METADATA"  # Orbax's own, written when a checkpoint is complete
READ_BYTES = 2 * 2**30  # of parameters at a time


def steps_in(directory: os.PathLike | str) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; unfinished saves carry other names and are not seen."""
    path = epath.Path(directory)
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit() and is_complete(p))


def is_complete(path: epath.Path) -> bool:
    """Whether a checkpoint has all its parts and was finished: in some buckets it has its final name before that."""
    return lack_of(path) is None


def lack_of(path: epath.Path) -> str | None:
    """Returns what a folder lacks to be a complete checkpoint, or None."""
    notes = path / MARKER
    if not (path / "params").is_dir():
        return f"{path / 'params'}: is missing"
    for part in (path / "contract" / CONFIG_FILE, path / "contract" / STATISTICS_FILE, notes):
        if not part.exists():
            return f"{part}: is missing"
    try:
        finished = read_json(notes).get("commit_timestamp_nsecs", True)
        if not finished:
            return f"{notes}: says that the save was not finished"
        return None if ocp.is_orbax_checkpoint(path) else f"{path}: Orbax does not take it for a finished checkpoint"
    except Exception as error:  # whatever a file system or Orbax raises
        return reason(error).removesuffix(f"; {DAMAGED}")


def open_checkpoint(path: os.PathLike | str, step: int | None = None) -> epath.Path:
    """The directory of a complete checkpoint, from itself, a `checkpoints` folder or a run's workdir (latest step)."""
    given = absolute(path)
    if step is None and given.is_dir() and is_complete(given):
        return given
    for folder in (given, given / "checkpoints"):
        steps = steps_in(folder)
        if steps:
            if step is not None and step not in steps:
                raise CheckpointError(f"{folder} has no complete checkpoint of step {step}; it has {steps}")
            return folder / str(steps[-1] if step is None else step)
    if not given.exists():
        raise CheckpointError(f"checkpoint {given} does not exist")
    if lack := _lack_of_likeliest(given):
        raise CheckpointError(f"{given} holds no complete checkpoint: {lack}; {DAMAGED}")
    held = sorted(p.name for p in given.iterdir())[:8] if given.is_dir() else ["a file"]
    raise CheckpointError(
        f"{given} holds no complete checkpoint (params and contract); it holds: {', '.join(held) or 'nothing'}"
    )


def _lack_of_likeliest(given: epath.Path) -> str | None:
    """Returns what the folder that looks most like a checkpoint lacks: the given one, or the latest step in it."""
    if not given.is_dir():
        return None
    if {"params", "contract", MARKER} & {p.name for p in given.iterdir()}:
        return lack_of(given)
    for folder in (given, given / "checkpoints"):
        steps = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
        if steps:
            return lack_of(max(steps, key=lambda p: int(p.name)))
    return None


@contextlib.contextmanager
def reading_item(path: os.PathLike | str, item: str = "params") -> Iterator[None]:
    """Turns any failure to read an item of a checkpoint into an error that names the file that is damaged.

    Orbax and TensorStore name a tree, or a handler that they have tried.

    Raises:
        CheckpointError: for every exception but InputError, ModuleNotFoundError, and memory that runs out, of this
            machine or of a device: these pass unchanged.
    """
    try:
        yield
    except (InputError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        damage = find_damage(epath.Path(path), item) or f"{path}/{item}: cannot be read: {reason(cause)}"
        raise CheckpointError(f"{damage}; {DAMAGED}") from error


def check_files(path: os.PathLike | str, item: str) -> None:
    """Raises CheckpointError if a file of an item is missing or was cut, as far as checksums are stored.

    Costs a look at each file, not its content.
    """
    files = checksums.stored(epath.Path(path), item)
    if damage := checksums.first_damaged(epath.Path(path), files):
        raise CheckpointError(f"{damage}; {DAMAGED}")


def find_damage(path: epath.Path, item: str) -> str | None:
    """Returns the first file of an item that is damaged, and what is wrong with it; None if it cannot be told.

    With checksums all files are read. Without, one that is missing, empty or no JSON is found, and no other.
    """
    try:
        checksums.verify(path, item)
        return None
    except CheckpointError as error:
        if checksums.MISSING not in str(error):
            return str(error).removesuffix(f"; {DAMAGED}")
    names = ["_METADATA", *(["manifest.ocdbt"] if list((path / item).glob("ocdbt.process_*")) else [])]
    for file in (path / item / name for name in names):
        if not file.exists():
            return f"{file}: is missing"
    for file in checksums.files_below(path / item):
        content = file.read_bytes() if file.name in JSON_FILES or file.parent.name == "array_metadatas" else None
        if not file.stat().length:
            return f"{file}: is empty"
        if content is not None and (wrong := _no_object(content)):
            return f"{file}: {wrong}"
    return None


def _no_object(content: bytes) -> str:
    try:
        parse_object(content)
        return ""
    except ValueError as error:
        return str(error)


def load_contract(path: os.PathLike | str) -> Contract:
    """The contract of a checkpoint, without reading weights."""
    return Contract.load(open_checkpoint(path) / "contract")


def load_params(path: os.PathLike | str, abstract: nnx.State) -> nnx.State:
    """Parameters as `abstract` describes them: tree, shape, dtype (cast while reading) and sharding of each leaf."""
    path = open_checkpoint(path)
    check_tree(path, abstract)
    return refill(abstract, nested(read_leaves(path, flat(nnx.to_pure_dict(nnx.as_pure(abstract))))))


def read_leaves(path: epath.Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Some parameters by path, as `wanted` describes each (dtype, sharding).

    They are read a few at a time: what is read is held twice, until it lies on its device.
    """
    arrays: dict[str, jax.Array] = {}
    groups: list[dict[str, Any]] = []
    free = 0
    for name, leaf in wanted.items():
        size = leaf.size * leaf.dtype.itemsize
        if not groups or size > free:
            groups.append({})
            free = READ_BYTES
        groups[-1][name] = leaf
        free -= size
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, reading_item(path):
        for group in groups:
            arrays |= flat(ocp.load_checkpointables(path, {"params": nested(group)})["params"])
    return arrays


def stored_params(path: os.PathLike | str) -> Any:
    """Returns shapes and dtypes of a checkpoint's parameters, as a nested dict."""
    check_files(path, "params")
    with reading_item(path):
        stored = ocp.metadata(path, "params").metadata
        if not stored:  # Orbax logs why, and continues
            raise ValueError("Orbax cannot read its metadata")
        return stored


def check_tree(path: epath.Path, abstract: nnx.State) -> None:
    """Raises with all differences at once if the stored parameters are not those of the model."""
    with reading_item(path):
        stored = shapes(stored_params(path))
    wanted = shapes(nnx.to_pure_dict(nnx.as_pure(abstract)))
    problems = [f"{name} is missing" for name in wanted if name not in stored]
    problems += [f"{name} is not in the model" for name in stored if name not in wanted]
    problems += [
        f"{name} has shape {stored[name]}, the model {wanted[name]}"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    if problems:
        more = f" (and {len(problems) - 8} more)" if len(problems) > 8 else ""
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(problems[:8])}{more}")


def load_unused(path: os.PathLike | str) -> Any | None:
    """The reference's never-run tensors of a checkpoint as host arrays, or None where it has none."""
    directory = open_checkpoint(path)
    with reading_item(directory, "unused"):
        return ocp.load(directory, checkpointable_name="unused") if (directory / "unused").is_dir() else None


class Files:
    """An Orbax item of plain files: `write(directory)` runs at once, on the first process or on every one.

    Reading needs no Orbax: the files lie in the item's directory.
    """

    def __init__(self, write: Callable[[epath.Path], None], every_process: bool = False):
        self._write, self._every_process = write, every_process

    async def save(self, directory):
        if jax.process_index() == 0 or self._every_process:
            path = await directory.await_creation()
            if jax.process_count() == 1:  # the whole save is tried again where it fails
                self._write(path)
            else:
                retry(f"writing {path}", lambda: self._write(path))

        async def nothing() -> None:
            return None

        return nothing()

    async def load(self, directory):
        raise NotImplementedError(f"the files of {directory} are read where they lie")
