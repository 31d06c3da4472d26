"""Checkpoints: weights, and the contract that says how to use them.

A checkpoint is a directory written by Orbax (v1) with these items:

    params/      nested dict of arrays, paths as in the model (`llama/blocks/attention/q/kernel`); of a run that froze
                 some, only what it trained: such a checkpoint, an adapter, is used together with its base
    unused/      reference tensors that are never run, by tower (only in imported weights; copied along)
    optimizer/   optimiser state and step (only while training)
    data/        position in the data stream, per process (only where `data.resume` is exact)
    contract/    config.json, dataset_statistics.json, tokenizer files: model, preprocessing, prompt, action statistics

Training keeps them as W/checkpoints/<step>/; an imported checkpoint is one such directory by itself. A directory
appears under its final name only when it is complete.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from openvla_jax.config import VLAConfig
from openvla_jax.training.runtime import ATTEMPTS, StorageError, cause, pause, retry

FORMAT = 1
READ_BYTES = 2 * 2**30  # of parameters at a time
CONFIG_FILE, STATISTICS_FILE, TOKENIZER_DIR = "config.json", "dataset_statistics.json", "tokenizer"

# What training does to an image and an action before the model sees them; inference repeats it from here.
PREPROCESSING = {
    "resize_kernel": "lanczos3",  # "bicubic": PIL's, as the HF processor of imported checkpoints
    "center_crop": False,  # true when trained with random crops
    "jpeg": False,  # images go through JPEG first, as in the reference's LIBERO and Bridge evaluations
    "text_length": 64,  # tokens of a training row: prompt, action and end token
    "action_normalization": "bounds_q99",
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete, of another model, or not one at all."""


@dataclasses.dataclass(frozen=True)
class Contract:
    """Everything that a user of the weights must know and must not retype."""

    model: VLAConfig
    tokenizer: Any  # transformers fast tokenizer; None where an import found no tokenizer files
    statistics: Mapping[str, Any]  # {dataset: {"action": {...}, "num_transitions", ...}}
    preprocessing: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(PREPROCESSING))
    training: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # the run's config, or the source of an import
    default_key: str | None = None  # the statistics that unnormalise actions where nobody names others
    adapter: Mapping[str, Any] | None = None  # {base, fingerprint, tuning} where params hold only what was trained

    def save(self, directory: os.PathLike | str) -> None:
        """Writes the contract's files into an existing directory."""
        from openvla_jax.tokens import save_tokenizer

        path = epath.Path(directory)
        config = {
            "format": FORMAT,
            "model": self.model.to_dict(),
            "preprocessing": dict(self.preprocessing),
            "training": dict(self.training),
            "default_key": self.default_key,
        }
        if self.adapter is not None:
            config["adapter"] = dict(self.adapter)
        (path / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        (path / STATISTICS_FILE).write_text(json.dumps(dict(self.statistics), indent=2))
        if self.tokenizer is not None:
            (path / TOKENIZER_DIR).mkdir(exist_ok=True)
            save_tokenizer(self.tokenizer, path / TOKENIZER_DIR)

    @classmethod
    def load(cls, directory: os.PathLike | str) -> "Contract":
        """Reads what `save` wrote."""
        from openvla_jax.tokens import load_tokenizer

        path = epath.Path(directory)
        config = _read_json(path / CONFIG_FILE)
        if config.get("format") != FORMAT:
            raise CheckpointError(f"{path / CONFIG_FILE}: format {config.get('format')!r}, this version reads {FORMAT}")
        return cls(
            model=VLAConfig.from_dict(config["model"]),
            tokenizer=load_tokenizer(path / TOKENIZER_DIR) if (path / TOKENIZER_DIR).is_dir() else None,
            statistics=_read_json(path / STATISTICS_FILE),
            preprocessing=config["preprocessing"],
            training=config["training"],
            default_key=config.get("default_key"),
            adapter=config.get("adapter"),
        )


def _read_json(path: epath.Path) -> Any:
    if not path.exists():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): the checkpoint is damaged") from None


# ---------------------------------------------------------------------------------------------------------------------
# Finding and reading
# ---------------------------------------------------------------------------------------------------------------------


def absolute(path: os.PathLike | str) -> epath.Path:
    """Orbax takes absolute paths only; remote ones (gs://) are."""
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


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
    stored = _shapes(ocp.metadata(path, "params").metadata)
    wanted = _shapes(nnx.to_pure_dict(nnx.as_pure(abstract)))
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


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def flat(tree: Any) -> dict[str, Any]:
    """Leaves of nested dicts by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flat`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def refill(abstract: Any, pure: Any) -> Any:
    """Puts plain leaves back under the `nnx.Variable`s of `abstract` (dicts iterate in one order on both sides)."""
    names = {name: i for i, name in enumerate(_shapes(pure))}
    order = [names[name] for name in _shapes(nnx.to_pure_dict(nnx.as_pure(abstract)))]
    leaves = jax.tree.leaves(pure)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[i] for i in order])


def with_shardings(abstract: Any, placed: Any) -> Any:
    """Shape structs that carry their shardings: a target for restoring."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, placed)


# ---------------------------------------------------------------------------------------------------------------------
# Saving and resuming a run
# ---------------------------------------------------------------------------------------------------------------------


def restore_state(workdir: os.PathLike | str, step: int, abstract: Any, placed: Any) -> Any:
    """The training state of a step, onto the shardings in `placed`, whatever mesh saved it; `frozen` stays abstract."""
    path = open_checkpoint(workdir, step)
    check_tree(path, abstract.params)
    target = with_shardings(abstract, placed)
    rest = nnx.as_pure({"step": target.step, "opt_state": target.opt_state})
    loaded = ocp.load_checkpointables(path, {"params": nnx.to_pure_dict(nnx.as_pure(target.params)), "optimizer": rest})
    rest_structure = jax.tree.structure({"step": abstract.step, "opt_state": abstract.opt_state})
    rest = jax.tree.unflatten(rest_structure, jax.tree.leaves(loaded["optimizer"]))
    params = refill(abstract.params, loaded["params"])
    return abstract.replace(step=rest["step"], opt_state=rest["opt_state"], params=params)


def restore_iterator(workdir: os.PathLike | str, step: int, iterator: Any) -> None:
    """Moves the data stream to where it was at `step`; raises ValueError where that was not saved for this process."""
    directory = open_checkpoint(workdir, step) / "data"
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing: the stream's position was not saved")
    iterator.restore(os.fspath(directory))


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


def _tells_no_threads(record: Any) -> bool:
    return "_SignalingThread.run() raised" not in record.getMessage()


class Checkpoints:
    """The checkpoints of a run: asynchronous saves, the latest N kept and every N-th step for good."""

    def __init__(self, workdir: os.PathLike | str, keep_last: int, keep_every: int | None):
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_last)] + ([policies.EveryNSteps(keep_every)] if keep_every else [])
        self.directory = absolute(workdir) / "checkpoints"
        # `failed` tells of a save that fails, in one line: each of Orbax's threads would with a stack trace as well.
        logging.get_absl_logger().addFilter(_tells_no_threads)
        self._policy = policies.AnyPreservationPolicy(keep)
        self._checkpointer = self._open()
        self._pending = None
        self._step = 0
        self._failures = 0
        self._failure: Exception | None = None

    def _open(self) -> Any:
        """Leftovers of saves that did not come to their end are removed."""
        context = ocp.Context()
        # Devices that hold the same array share the writing of it: pieces of some kB would cost more than they save.
        context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
        return ocp.training.Checkpointer(
            self.directory, preservation_policy=self._policy, cleanup_tmp_directories=True, context=context
        )

    @property
    def latest(self) -> int | None:
        steps = steps_in(self.directory)
        return steps[-1] if steps else None

    def describe_latest(self) -> str:
        latest = self.latest
        return "no checkpoint was saved before" if latest is None else f"the last good checkpoint is step {latest}"

    def save(
        self, step: int, state: Any, contract: Contract, iterator: Any | None = None, unused: Any | None = None
    ) -> None:
        """Starts a save; `failed` tells how it and an earlier one went. `iterator` is saved at its position of this
        moment.
        """
        self.wait()
        items = {
            "params": nnx.to_pure_dict(nnx.as_pure(state.params)),
            "optimizer": nnx.as_pure({"step": state.step, "opt_state": state.opt_state}),
            "contract": Files(contract.save),
        }
        if unused is not None:
            items["unused"] = unused
        if iterator is not None:
            items["data"] = Files(lambda directory: iterator.save(os.fspath(directory)), every_process=True)
        self._step = step
        try:
            self._pending = self._checkpointer.save_checkpointables_async(step, items, force=True)
        except Exception as error:  # a disk or bucket; Orbax and its libraries raise types of their own
            self._failure = error

    def failed(self, wait: bool = False) -> bool:
        """Whether a save has failed, and is to be started again with the present state, for which this makes room.

        To be asked at every step; with `wait` the save under way is waited for. Raises StorageError after a number of
        failures in a row, and at once where there are other processes, of which this one alone may know: starting all
        of them again is then the way on.
        """
        if self._pending is not None:
            try:
                self._pending.result(None if wait else 0)
                self._pending, self._failures = None, 0
            except TimeoutError:
                return False
            except Exception as error:
                self._pending, self._failure = None, error
        if self._failure is None:
            return False
        error, self._failure = self._failure, None
        self._failures += 1
        if self._failures >= ATTEMPTS or jax.process_count() > 1:
            raise StorageError(
                f"{self.directory}: saving step {self._step} failed, {self._failures} times in a row ({cause(error)}); "
                f"{self.describe_latest()}; make room or mend the storage, then the same command goes on from there"
            ) from error
        logging.warning("saving step %d failed (%s), trying again", self._step, cause(error))
        pause(self._failures)
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        self._make_room()
        self._checkpointer = self._open()
        return True

    def _make_room(self) -> None:
        """Removes what the failed save has left, also where it has its final name from the start (some buckets)."""
        for path in self.directory.iterdir():
            unfinished = path.name == str(self._step) and not is_complete(path)
            if unfinished or ".orbax-checkpoint-tmp" in path.name:
                with contextlib.suppress(Exception):  # a thread may still write to it; the next start removes it
                    path.rmtree()

    def wait(self) -> None:
        """Blocks until a save under way has ended, well or not."""
        if self._pending is not None:
            try:
                self._pending.result()
                self._failures = 0
            except Exception as error:
                self._failure = error
            self._pending = None

    def close(self) -> None:
        """Ends the save under way; to be called after `failed(wait=True)`, or where another error ends the run."""
        self.wait()
        with contextlib.suppress(Exception):  # it raises again what a save has raised
            self._checkpointer.close()
