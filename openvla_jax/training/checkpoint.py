"""Saves the checkpoints of a run and resumes it from them (the layout: `checkpoint/contract.py`)."""

import contextlib
import os
from typing import Any

import jax
from absl import logging
from flax import nnx
from orbax.checkpoint import v1 as ocp

from openvla_jax.checkpoint.checksums import noted, noting_context
from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.reading import (
    Files,
    check_files,
    check_tree,
    is_complete,
    open_checkpoint,
    reading_item,
    steps_in,
)
from openvla_jax.errors import reading
from openvla_jax.models.tree import refill, with_shardings
from openvla_jax.storage import ATTEMPTS, StorageError, absolute, cause, pause


def restore_state(workdir: os.PathLike | str, step: int, abstract: Any, placed: Any) -> Any:
    """The training state of a step, onto the shardings in `placed`, whatever mesh saved it; `frozen` stays abstract."""
    path = open_checkpoint(workdir, step)
    check_tree(path, abstract.acting)
    target = with_shardings(abstract, placed)
    wanted = {"params": nnx.to_pure_dict(nnx.as_pure(target.acting)), "optimizer": nnx.as_pure(_behind(target))}
    check_files(path, "optimizer")
    with reading_item(path, "optimizer"):
        loaded = ocp.load_checkpointables(path, wanted)
    behind = jax.tree.unflatten(jax.tree.structure(_behind(abstract)), jax.tree.leaves(loaded["optimizer"]))
    acting = refill(abstract.acting, loaded["params"])
    if abstract.ema is None:
        return abstract.replace(params=acting, **behind)
    return abstract.replace(ema=acting, **behind)


def _behind(state: Any) -> dict[str, Any]:
    """Returns what only training needs of a checkpoint: step, optimiser and, beside an average, the weights."""
    behind = {"step": state.step, "opt_state": state.opt_state}
    return behind if state.ema is None else behind | {"params": state.params}


def restore_iterator(workdir: os.PathLike | str, step: int, iterator: Any) -> None:
    """Moves the data stream to where it was at `step`; raises ValueError where that was not saved for this process."""
    directory = open_checkpoint(workdir, step) / "data"
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is missing: the stream's position was not saved")
    with reading(directory, "use data.resume='reseed'", CheckpointError):
        iterator.restore(os.fspath(directory))


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
        context = noting_context()
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
            "params": nnx.to_pure_dict(nnx.as_pure(state.acting)),
            "optimizer": nnx.as_pure(_behind(state)),
            "contract": Files(contract.save),
        }
        if unused is not None:
            items["unused"] = unused
        if iterator is not None:
            items["data"] = Files(lambda directory: iterator.save(os.fspath(directory)), every_process=True)
        self._step = step
        try:
            self._pending = self._checkpointer.save_checkpointables_async(step, noted(items), force=True)
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
                f"{self.describe_latest()}; make room or fix the storage, then run the same command again"
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
