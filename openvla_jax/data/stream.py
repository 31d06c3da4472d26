"""The endless training stream of one process, which can be saved and taken up again exactly."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow as tf
from etils import epath

from openvla_jax.data import DataError
from openvla_jax.data.faults import Skipped
from openvla_jax.storage import atomic_write
from openvla_jax.types import Batch


@runtime_checkable
class Encodes(Protocol):
    """What a stream needs of an encoder: `encoder.Encoder` is one."""

    truncated_instructions: int
    skipped: Skipped

    def __call__(self, rows: Mapping[str, np.ndarray]) -> Batch: ...


class TrainIterator(Iterator[Batch]):
    """The endless training stream of one process. The same arguments give the same batches.

    dataset_names: what Batch.dataset indexes. statistics: {name: statistics with mask}. num_examples: frames of a
    nominal epoch (see `mixture.nominal_length`). step: batches so far, those before a resume included. state_bytes:
    about how much memory the shuffle buffer, the prefetched batches and the readers take, and at most what `save`
    writes. summary: the datasets and that estimate, to be printed. identity: what makes the stream (datasets and their
    versions, weights, seed, process), JSON values; a saved state is restored only into the same. simulators: what drew
    the datasets that come from a simulator, by name.
    """

    def __init__(
        self,
        phases: Sequence[tuple[float, Callable[[], tf.data.Dataset]]],
        encoder: Encodes,
        *,
        dataset_names: Sequence[str],
        statistics: Mapping[str, Mapping],
        step: int,
        num_examples: int,
        state_bytes: int,
        summary: str,
        identity: dict[str, Any],
        simulators: Mapping[str, Mapping] = MappingProxyType({}),
        explain_errors: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        """phases: (last step, makes the rows) in order. explain_errors: wraps reading, to explain what it raises."""
        self.dataset_names = tuple(dataset_names)
        self.statistics = dict(statistics)
        self.num_examples = num_examples
        self.state_bytes = state_bytes
        self.summary = summary
        self.identity = identity
        self.simulators = dict(simulators)
        self.step = step
        self._phases, self._encoder, self._explain_errors = phases, encoder, explain_errors
        self._open(step + 1)
        self._started = False

    def _open(self, step: int) -> None:
        """Begins the stream that the batch of this step comes from."""
        self._last_step, rows = next((last, rows) for last, rows in self._phases if step <= last)
        self._iterator = iter(rows())

    @property
    def truncated_instructions(self) -> int:
        """Rows so far whose instruction was cut to fit."""
        return self._encoder.truncated_instructions

    @property
    def skipped_images(self) -> int:
        """Frames left out so far because an image is broken (data.bad_images = "skip")."""
        return self._encoder.skipped.images

    @property
    def skipped_episodes(self) -> int:
        """Episodes left out so far because they are shorter than a chunk; each counts once per pass."""
        return self._encoder.skipped.short_episodes

    def __next__(self) -> Batch:
        if self.step >= self._last_step:
            logging.info("step %d: the next mixture of data.schedule begins", self.step)
            self._open(self.step + 1)
        self._started = True
        with self._explain_errors():
            rows = next(self._iterator)
        batch = self._encoder({key: value.numpy() for key, value in rows.items()})
        self.step += 1
        return batch

    def save(self, directory: str) -> None:
        """Writes the state of the stream, shuffle buffer and prefetched batches included, one file set per process.

        The JSON file comes last: without it the set is not complete, and `restore` refuses it.
        """
        prefix = self._prefix(directory)
        path = prefix.with_name(prefix.name + ".json")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        tf.train.Checkpoint(iterator=self._iterator).write(str(prefix))
        counts = {"truncated_instructions": self.truncated_instructions, "skipped_images": self.skipped_images}
        if self.skipped_episodes:
            counts["skipped_episodes"] = self.skipped_episodes
        notes = {"identity": self.identity, "step": self.step, **counts}
        atomic_write(path, json.dumps(notes, indent=2) + "\n")

    def restore(self, directory: str) -> None:
        """Takes the stream up where `save` wrote it: the next batch is the one that would have followed.

        Raises DataError if there is no complete state for this process, or one of another data configuration, and
        RuntimeError after the first batch: tf.data restores all of a stream's state only before that.
        """
        if self._started:
            raise RuntimeError("the stream has begun: restore it before its first batch is drawn")
        prefix = self._prefix(directory)
        path = prefix.with_name(prefix.name + ".json")
        if not path.exists():
            raise DataError(f"{path} is missing: the stream cannot continue exactly; use data.resume='reseed'")
        notes = json.loads(path.read_text())
        for key in sorted(self.identity.keys() | notes["identity"].keys()):
            was, now = notes["identity"].get(key), self.identity.get(key)
            if was != now:
                raise DataError(f"{path}: {key} was {was!r}, now is {now!r}: set it back, or use data.resume='reseed'")
        self.step = notes["step"]
        self._open(max(self.step, 1))
        try:
            tf.train.Checkpoint(iterator=self._iterator).read(str(prefix)).assert_consumed()
        except Exception as error:  # TensorFlow's reader has no error of its own for files that are cut off
            reason = str(error).splitlines()[0]
            raise DataError(f"{prefix}.* cannot be read ({reason}): use data.resume='reseed'") from error
        self._encoder.truncated_instructions = notes["truncated_instructions"]
        self._encoder.skipped.images = notes["skipped_images"]
        self._encoder.skipped.short_episodes = notes.get("skipped_episodes", 0)

    def _prefix(self, directory: str) -> epath.Path:
        index, count = self.identity["process_index"], self.identity["process_count"]
        return epath.Path(directory) / f"stream_{index:05d}-of-{count:05d}"
