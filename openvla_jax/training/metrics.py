"""Where metrics go: metrics.jsonl and TensorBoard always, Weights & Biases if configured, and a progress line."""

import json
import math
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

METRICS_FILE, WANDB_ID_FILE = "metrics.jsonl", "wandb_id"


class MetricLog:
    """Appends metrics of steps to a run's files. On resume, steps after `resume_step` are dropped: they will come
    again.

    metrics.jsonl holds one JSON object a line: {"step": 120, "time": seconds since the epoch, "train/loss": 1.2, ...};
    validation has lines of its own with keys `val/...`.
    """

    def __init__(self, workdir: os.PathLike | str, resume_step: int, wandb: ConfigDict, config: Mapping[str, Any]):
        import tensorboardX

        path = epath.Path(workdir) / METRICS_FILE
        if path.exists():
            _drop_after(path, resume_step)
        self._jsonl = path.open("a")
        self._tensorboard = tensorboardX.SummaryWriter(
            os.fspath(epath.Path(workdir) / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
        )
        self._wandb = None
        if wandb.get("project"):
            import wandb as client  # an optional dependency, asked for by the config

            self._wandb = client.init(
                project=wandb["project"], entity=wandb.get("entity") or None, group=wandb.get("group") or None,
                name=epath.Path(workdir).name, config=dict(config), dir=os.fspath(workdir), resume="allow",
                id=_wandb_id(epath.Path(workdir)),
            )  # fmt: skip

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes finite values; a value that does not exist (a dataset without rows in the batch) is left out."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        self._jsonl.write(json.dumps({"step": step, "time": round(time.time(), 3)} | finite) + "\n")
        self._jsonl.flush()
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        self._jsonl.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(workdir: epath.Path) -> str:
    """Of the run in `workdir`, kept there: a resumed run goes on in its own page."""
    file = workdir / WANDB_ID_FILE
    if not file.exists():
        file.write_text(secrets.token_hex(6))
    return file.read_text()


def _drop_after(path: epath.Path, step: int) -> None:
    """Rewrites the file without later steps and without a line that a kill cut short; atomic."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    new = path.parent / (path.name + ".new")
    new.write_text("".join(kept))
    new.replace(path)


def read_metrics(workdir: os.PathLike | str) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (epath.Path(workdir) / METRICS_FILE).read_text().splitlines()]


def flatten(metrics: Mapping[str, Any], datasets: Sequence[str], prefix: str) -> dict[str, float]:
    """Scalars by name; vectors `x_by_dataset` become `prefix/DATASET/x` where there is more than one dataset."""
    flat = {}
    for name, value in metrics.items():
        value = np.asarray(value)
        if value.ndim == 0:
            flat[f"{prefix}/{name}"] = float(value)
        elif len(datasets) > 1:
            what = name.removesuffix("_by_dataset")
            flat |= {f"{prefix}/{dataset}/{what}": float(v) for dataset, v in zip(datasets, value, strict=True)}
    return flat


def device_memory() -> dict[str, float]:
    """`device_peak_gb`, the most that the fullest device of this process has held, where its allocator says."""
    import jax

    peak = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
    return {"device_peak_gb": peak / 1e9} if peak else {}


class Progress:
    """Rates since the last line, and the time left. Evaluation and saving are not counted into the rates."""

    def __init__(self, step: int, steps: int, batch_size: int):
        self._steps, self._batch_size = steps, batch_size
        self._last_step = step
        self._last_time = time.perf_counter()
        self._waited = self._paused = 0.0

    def waited(self, seconds: float) -> None:
        """Time in which the accelerator may have had nothing to do, waiting for data."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        self._paused += seconds

    def rates(self, step: int) -> dict[str, float]:
        """Examples per second, steps per second and the share of time spent waiting for data since the last call."""
        now = time.perf_counter()
        seconds = max(1e-9, now - self._last_time - self._paused)
        done = step - self._last_step
        rates = {
            "steps_per_second": done / seconds,
            "examples_per_second": done * self._batch_size / seconds,
            "data_wait_fraction": self._waited / seconds,
        }
        self._last_step, self._last_time = step, now
        self._waited = self._paused = 0.0
        return rates

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        left = (self._steps - step) / max(1e-9, metrics["train/steps_per_second"])
        return (
            f"step {step}/{self._steps}  loss {metrics['train/loss']:.4f}  "
            f"accuracy {metrics['train/action_accuracy']:.1%}  L1 {metrics['train/action_l1']:.4f}  "
            f"grad {metrics['train/grad_norm']:.2f}  lr {metrics['train/learning_rate']:.2e}  "
            f"{metrics['train/examples_per_second']:.1f} examples/s  "
            f"data wait {metrics['train/data_wait_fraction']:.0%}  ETA {duration(left)}"
        )


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
