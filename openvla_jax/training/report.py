"""What a run reports of its steps: metrics to files, lines to the log."""

import collections
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from openvla_jax.models.heads import summarize
from openvla_jax.storage import atomic_write, retry
from openvla_jax.training import metrics as metrics_lib
from openvla_jax.training.checkpoint import Checkpoints
from openvla_jax.training.progress import Progress, describe
from openvla_jax.training.runtime import Skipped
from openvla_jax.training.setup import Run

CONFIG_FILE = "config.json"


class Report:
    """Records the metrics of a run's steps, and ends a run of which too many steps are not finite."""

    def __init__(self, run: Run, checkpoints: Checkpoints):
        """Writes the config into the workdir and opens the metrics there, on the first process."""
        from openvla_jax.data.batches import resident_memory_gb  # imports TensorFlow

        self._run, self._checkpoints, self._memory = run, checkpoints, resident_memory_gb
        train, contract, workdir = run.config.train, run.contract, run.workdir
        self._writer: metrics_lib.MetricLog | None = None
        if jax.process_index() == 0:
            path = workdir / CONFIG_FILE
            text = json.dumps(contract.training, indent=2)
            retry(f"writing {path}", lambda: atomic_write(path, text))
            self._writer = metrics_lib.MetricLog(workdir, run.start, run.config.wandb, contract.training)
        earlier = self._writer.earlier if self._writer is not None else {}
        self.progress = Progress(run.start, train.steps, train.batch_size, run.began, earlier, run.job.head.metrics)
        self._skipped = Skipped(train.max_skipped)
        self._accuracies: collections.deque[float] = collections.deque(maxlen=train.log_every)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Checks and logs a step's metrics; waits for that step to end.

        Raises NonFiniteError if too many steps were skipped.
        """
        train, progress = self._run.config.train, self.progress
        metrics = dict(jax.device_get(metrics))
        if metrics.pop("skipped"):
            what = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
            self._run.log(f"step {step}: skipped, {what}")
            self._write(step, {"train/skipped": 1.0})
            self._skipped.add(step, lambda: f"{what}; {self._checkpoints.describe_latest()}")
            return
        self._accuracies.append(float(metrics.get("action_accuracy", np.nan)))
        if step % train.log_every == 0 or step == train.steps:
            flat = metrics_lib.flatten(metrics, self._run.iterator.dataset_names, "train")
            flat |= {f"train/{name}": value for name, value in progress.rates(step).items()}
            flat["train/resident_memory_gb"] = self._memory()
            flat |= {f"train/{name}": value for name, value in metrics_lib.device_memory().items()}
            flat |= {f"goodput/{name}": value for name, value in progress.goodput().items()}
            self._write(step, flat)
            self._run.log(progress.line(step, flat))

    def validation(self, step: int, sums: Any) -> None:
        """Logs the evaluation, of which `sums` are the head's sums over all batches."""
        head, train = self._run.job.head, self._run.config.train
        flat = metrics_lib.flatten(jax.device_get(summarize(head, sums)), self._run.iterator.dataset_names, "val")
        self._write(step, flat)
        self._run.log(
            f"step {step}/{train.steps}  validation: loss {flat['val/loss']:.4f}  {describe(flat, 'val', head.metrics)}"
        )

    @property
    def accuracy(self) -> float:
        """The action accuracy, on average over the last `log_every` steps."""
        return float(np.mean(self._accuracies))

    def accurate(self) -> bool:
        """Whether that average has reached where the config stops."""
        train = self._run.config.train
        limit = train.stop_at_action_accuracy
        return limit is not None and len(self._accuracies) == train.log_every and self.accuracy >= limit

    def flush(self) -> None:
        """Writes out what is buffered: what a checkpoint holds is never ahead of its metrics."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(step, values)
