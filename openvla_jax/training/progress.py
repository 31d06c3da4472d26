"""Where the time of a run goes: rates, shares of its whole time, and the line that shows them."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence

from openvla_jax.models.heads import Metric


class Progress:
    """Where the time goes: rates since the last line, the time left, and shares of the whole run since its first start.

    `earlier` is the last metrics line that was kept from before: the time between it and this start, in which nothing
    came about that is still there, is lost to the restart. `metrics` are the head's, which a line shows.
    """

    PAUSES = ("data", "checkpoint", "evaluation")

    def __init__(
        self,
        step: int,
        steps: int,
        batch_size: int,
        began: float,
        earlier: Mapping[str, float],
        metrics: Sequence[Metric] = (),
    ):
        self._steps, self._batch_size, self._metrics = steps, batch_size, metrics
        self._last_step = step
        self._last_time = self._entered = time.perf_counter()
        self._since_line = dict.fromkeys(self.PAUSES, 0.0)
        self._here = dict.fromkeys(self.PAUSES, 0.0)
        total = earlier.get("goodput/seconds", 0.0)
        self._before = {kind: total * earlier.get(f"goodput/{kind}", 0.0) for kind in ("compute", *self.PAUSES)}
        self._began = earlier.get("time", began) - total  # seconds since the epoch: when the run first started

    def paused(self, kind: str, seconds: float) -> None:
        """Time in which the accelerator had, or may have had, nothing to do: data, checkpoint or evaluation."""
        self._since_line[kind] += seconds
        self._here[kind] += seconds

    @contextlib.contextmanager
    def pausing(self, kind: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.paused(kind, time.perf_counter() - began)

    def rates(self, step: int) -> dict[str, float]:
        """Examples per second, steps per second and the share of time spent waiting for data since the last call.

        Evaluation and saving are not counted into the rates.
        """
        now = time.perf_counter()
        paused = self._since_line["checkpoint"] + self._since_line["evaluation"]
        seconds = max(1e-9, now - self._last_time - paused)
        done = step - self._last_step
        rates = {
            "steps_per_second": done / seconds,
            "examples_per_second": done * self._batch_size / seconds,
            "data_wait_fraction": self._since_line["data"] / seconds,
        }
        self._last_step, self._last_time = step, now
        self._since_line = dict.fromkeys(self.PAUSES, 0.0)
        return rates

    def goodput(self) -> dict[str, float]:
        """Shares of the run's whole time, from its first start: compute, data, checkpoint, evaluation, and `restarts`:
        starting, compiling, standing still, and steps that were done twice. And that time, in seconds.
        """
        spent = {kind: self._before[kind] + self._here[kind] for kind in self.PAUSES}
        loop = time.perf_counter() - self._entered
        spent["compute"] = self._before["compute"] + loop - sum(self._here.values())
        total = max(time.time() - self._began, sum(spent.values()), 1e-9)
        shares = {kind: seconds / total for kind, seconds in spent.items()}
        return shares | {"restarts": 1 - sum(shares.values()), "seconds": total}

    def goodput_line(self) -> str:
        shares = self.goodput()
        named = ", ".join(f"{kind} {shares[kind]:.1%}" for kind in (*self.PAUSES, "restarts"))
        return f"goodput {shares['compute']:.1%} of {duration(shares['seconds'])} ({named})"

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        left = (self._steps - step) / max(1e-9, metrics["train/steps_per_second"])
        return (
            f"step {step}/{self._steps}  loss {metrics['train/loss']:.4f}  "
            f"{describe(metrics, 'train', self._metrics)}  "
            f"grad {metrics['train/grad_norm']:.2f}  lr {metrics['train/learning_rate']:.2e}  "
            f"{metrics['train/examples_per_second']:.1f} examples/s  "
            f"data wait {metrics['train/data_wait_fraction']:.0%}  ETA {duration(left)}"
        )


def describe(values: Mapping[str, float], prefix: str, metrics: Sequence[Metric]) -> str:
    """Returns a head's metrics for a progress line; `values` has them as PREFIX/NAME."""
    shown = [(one, values.get(f"{prefix}/{one.name}")) for one in metrics]  # some are for validation only
    finite = [(one, value) for one, value in shown if value is not None and math.isfinite(value)]
    return "  ".join(f"{one.label} {value:{one.format}}" for one, value in finite)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
