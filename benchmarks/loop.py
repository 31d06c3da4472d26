"""What the training loop itself costs: host time per step, and waiting for data beside a device that takes 200 ms.

  python benchmarks/loop.py        # about half a minute on two cores

The loop, its data pipeline, metrics and logging are the real ones of configs/debug.py. The compiled step is replaced:
by one that takes no time, so that what is left is the loop; and by one that ends 200 ms after it began, as an
accelerator would, while the host works. The first is given as CPU time of the loop's thread, which does not depend on
what else the machine does, and as time on the clock, in which the loop also waits for data as fast as these come.
Fails above 3 ms of CPU per step, or 2% of the time spent waiting for data.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np  # noqa: E402

from configs import debug  # noqa: E402
from openvla_jax.sim.dataset import write_dataset  # noqa: E402
from openvla_jax.training import loop, setup  # noqa: E402
from openvla_jax.training.metrics import read_metrics  # noqa: E402
from openvla_jax.training.progress import Progress  # noqa: E402


class Later:
    """A value on a device that is there at a certain time."""

    def __init__(self, value: float, when: float):
        self._value, self._when = value, when

    def is_ready(self) -> bool:
        return time.perf_counter() >= self._when

    def __array__(self, dtype=None, copy=None):
        while (left := self._when - time.perf_counter()) > 0:
            time.sleep(left)
        return np.asarray(self._value, dtype)


class Step:
    """Takes the place of the jitted step; each begins when the one before it has ended."""

    def __init__(self, seconds: float):
        self._seconds, self._free = seconds, 0.0

    def lower(self, *_):
        return self

    def compile(self, **_):
        return self

    def __call__(self, state, batch):
        self._free = max(self._free, time.perf_counter()) + self._seconds
        names = ("loss", "action_accuracy", "action_l1", "grad_norm", "learning_rate")
        return state, {name: Later(1.0, self._free) for name in names} | {"skipped": Later(False, self._free)}


def run(work: Path, seconds: float, steps: int, log_every: int) -> Path:
    config, workdir = debug.get_config(), work / f"{seconds}-{log_every}"
    config.data.data_dir = str(work / "data")
    config.train.update(dict(steps=steps, eval_every=0, checkpoint_every=10 * steps, log_every=log_every))
    make_job = setup.make_job
    setup.make_job = lambda *args, **settings: dataclasses.replace(make_job(*args, **settings), step=Step(seconds))
    try:
        loop.run(config, workdir)
    finally:
        setup.make_job = make_job
    return workdir


def main() -> None:
    turns: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_dataset(work / "data", episodes=12)

        def timed(self, kind, seconds, paused=Progress.paused):
            turns.append((1000 * time.thread_time(), 1000 * time.perf_counter()))
            paused(self, kind, seconds)

        Progress.paused = timed  # type: ignore[method-assign]  # once a step, after its data
        run(work, 0.0, 400, 1)
        busy, clock = np.median(np.diff(turns, axis=0)[100:], axis=0)
        workdir = run(work, 0.2, 100, 1)
        waits = [row["train/data_wait_fraction"] for row in read_metrics(workdir) if row["step"] > 10]
    wait = statistics.mean(waits)
    print(
        f"loop: {busy:.2f} ms of CPU per step of 8 examples, data and a metrics line included, {clock:.2f} ms on the "
        f"clock; with a step of 200 ms {wait:.2%} of the time is spent waiting for data"
    )
    if busy > 3 or wait > 0.02:
        sys.exit("FAILED: more than 3 ms or 2%")


if __name__ == "__main__":
    main()
