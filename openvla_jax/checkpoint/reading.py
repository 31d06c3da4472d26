"""Finds complete checkpoints and reads parameters from them."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from openvla_jax.checkpoint.contract import CONFIG_FILE, CheckpointError, Contract
from openvla_jax.models.tree import flat, nested, refill, shapes
from openvla_jax.storage import absolute, retry

READ_BYTES = 2 * 2**30  # of parameters at a time


def steps_in(directory: os.PathLike | str) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; unfinished saves carry other names and are not seen."""
    path = epath.Path(directory)
    if not path.is_dir():
        return []
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit() and is_complete(p))


def is_complete(path: epath.Path) -> bool:
    """Whether a checkpoint has all its parts and was finished: in some buckets it has its final name before that."""
    notes = path / "_CHECKPOINT_METADATA"
    if not ((path / "params").is_dir() and (path / "contract" / CONFIG_FILE).exists() and notes.exists()):
        return False
    try:
        finished = json.loads(notes.read_text()).get("commit_timestamp_nsecs", True)
    except ValueError:
        return False
    return bool(finished) and ocp.is_orbax_checkpoint(path)


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
    held = sorted(p.name for p in given.iterdir())[:8] if given.is_dir() else ["a file"]
    raise CheckpointError(
        f"{given} holds no complete checkpoint (params and contract); it holds: {', '.join(held) or 'nothing'}"
    )


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
    with context:
        for group in groups:
            arrays |= flat(ocp.load_checkpointables(path, {"params": nested(group)})["params"])
    return arrays


def check_tree(path: epath.Path, abstract: nnx.State) -> None:
    """Raises with all differences at once if the stored parameters are not those of the model."""
    stored = shapes(ocp.metadata(path, "params").metadata)
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
