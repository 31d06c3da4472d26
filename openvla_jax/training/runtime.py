"""What surrounds the steps of a long run: signals and profiles."""

import contextlib
import signal
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from openvla_jax.storage import copy_tree


class NonFiniteError(FloatingPointError):
    """Too many losses or gradients were no finite numbers."""


class StopSignal(contextlib.AbstractContextManager):
    """SIGTERM, of which preemption notices are made, asks for a save at the end of a step that all processes agree on.

    In a single process that is the running step, and a second signal ends it at once.
    """

    EXIT_CODE = 143  # 128 + SIGTERM: stopped, saved, to be started again

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def at(self, step: int) -> bool:
        """Whether the run is to stop after `step`; True in all processes at the same one."""
        if jax.process_count() > 1:  # jax's own handler tells all processes and finds a step that none has begun
            self.requested = self.requested or multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _handle(self, *_: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, self._previous)

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            signal.signal(signal.SIGTERM, self._previous)


class Skipped:
    """Counts the steps that were skipped because loss or gradient was no finite number."""

    WINDOW = 100

    def __init__(self, limit: int):
        self._limit, self._steps = limit, deque[int]()

    def add(self, step: int, describe: Callable[[], str]) -> None:
        """Counts one more. Raises NonFiniteError if there are more than the limit within the last 100 steps."""
        self._steps.append(step)
        while self._steps[0] <= step - self.WINDOW:
            self._steps.popleft()
        if len(self._steps) > self._limit:
            raise NonFiniteError(
                f"step {step}: {describe()}; {len(self._steps)} of the last {self.WINDOW} steps were like that, "
                f"train.max_skipped allows {self._limit}: lower optimizer.learning_rate or look at the data"
            )


class Profile:
    """Traces steps `first` .. `first + count - 1` of process 0 into WORKDIR/profile, for TensorBoard or Perfetto."""

    def __init__(self, workdir: epath.Path, first: int, count: int):
        mine = first > 0 and count > 0 and jax.process_index() == 0
        self._first, self._last = (first, first + count - 1) if mine else (0, 0)
        self._workdir = workdir
        self._folder: tempfile.TemporaryDirectory | None = None

    def before(self, step: int) -> None:
        if step == self._first and self._first:
            self._folder = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._folder.name)

    def ends(self, step: int) -> bool:
        """Whether `step` is the last of the trace: its work has to be waited for before `stop`."""
        return self._folder is not None and step == self._last

    def stop(self) -> None:
        """Writes the trace; nothing where none runs."""
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        with self._folder as folder:
            copy_tree(folder, self._workdir / "profile")
        self._folder = None
