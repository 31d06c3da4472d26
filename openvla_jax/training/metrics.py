"""Where metrics go: metrics.jsonl and TensorBoard always, Weights & Biases if it is configured."""

import contextlib
import json
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from openvla_jax.settings import WandbSettings
from openvla_jax.storage import atomic_write, cause, copy_tree, is_remote, retry

METRICS_FILE, WANDB_ID_FILE = "metrics.jsonl", "wandb_id"
_UPLOAD_EVERY = 60.0  # seconds


class MetricLog:
    """Appends metrics of steps to a run's files. On resume, steps after `resume_step` are dropped: they will come
    again.

    metrics.jsonl holds one JSON object a line: {"step": 120, "time": seconds since the epoch, "train/loss": 1.2, ...};
    validation has separate lines with keys `val/...`. Objects in buckets cannot grow: there the file is written anew
    once a minute, and by `flush`. A write that fails is retried (`runtime.StorageError`).
    """

    def __init__(self, workdir: os.PathLike | str, resume_step: int, wandb: WandbSettings, config: Mapping[str, Any]):
        self._path = epath.Path(workdir) / METRICS_FILE
        if self._path.exists():
            _drop_after(self._path, resume_step)
        self._text = self._path.read_text() if self._path.exists() else ""
        kept = [json.loads(line) for line in self._text.splitlines()]
        self.earlier = next((line for line in reversed(kept) if "goodput/seconds" in line), {})
        self._end = len(self._text.encode())
        self._file = None if is_remote(workdir) else open(self._path, "ab")  # noqa: SIM115
        self._written = time.monotonic()
        self._tensorboard = _TensorBoard(epath.Path(workdir) / "tensorboard", resume_step)
        self._wandb = None
        if wandb.project:
            import wandb as client  # an optional dependency, asked for by the config

            self._wandb = client.init(
                project=wandb.project, entity=wandb.entity or None, group=wandb.group or None,
                name=epath.Path(workdir).name, config=dict(config), dir=os.fspath(workdir), resume="allow",
                id=_wandb_id(epath.Path(workdir)),
            )  # fmt: skip

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes finite values; a value that does not exist (a dataset without rows in the batch) is left out."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | finite) + "\n"
        if self._file is None:
            self._text += line
            if time.monotonic() - self._written > _UPLOAD_EVERY:
                self.flush()
        else:
            retry(f"writing {self._path}", lambda: self._append(line.encode()))
        self._tensorboard.write(step, finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        self._file.truncate(self._end)  # of what an attempt before may have left
        self._file.write(line)
        self._file.flush()
        self._end += len(line)

    def flush(self) -> None:
        """Nothing written before is lost after this, even with the machine. To be called before a checkpoint is saved:
        what the run resumes from must not be ahead of its metrics.
        """
        if self._file is None:
            retry(f"writing {self._path}", lambda: atomic_write(self._path, self._text))
        else:
            os.fsync(self._file.fileno())
        self._tensorboard.flush()
        self._written = time.monotonic()

    def close(self) -> None:
        """To be called after `flush`, or where an error ends the run, which must not hide behind another one here."""
        try:
            self.flush()
        except OSError as error:
            logging.warning("the last metrics may be lost: %s", cause(error))
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_id(workdir: epath.Path) -> str:
    """Returns the W&B run id, stored in `workdir` so that a resumed run continues the same page."""
    file = workdir / WANDB_ID_FILE
    if not file.exists():
        file.write_text(secrets.token_hex(6))
    return file.read_text()


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """A module that is not imported yet seems not to be installed."""
    hides = module not in sys.modules
    if hides:
        sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules[module]


class _TensorBoard:
    """Scalars as TensorBoard event files: a convenience, so a failing disk stops them and not the run.

    tensorboardX's SummaryWriter would not do: its thread dies of a full disk, and scalars then wait for it for ever.
    For a bucket they are written here and copied there.
    """

    def __init__(self, folder: epath.Path, resume_step: int):
        with _hidden("torch"):  # if installed it is imported: two seconds, for a tensor type that is not used here
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder = folder
        self._temporary = tempfile.TemporaryDirectory() if is_remote(folder) else None
        self._local = self._temporary.name if self._temporary else os.fspath(folder)
        os.makedirs(self._local, exist_ok=True)
        self._writer: Any = EventsWriter(os.path.join(self._local, "events"))
        if resume_step:  # viewers drop what an earlier start wrote after it
            start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._writer.write_event(Event(step=resume_step + 1, wall_time=time.time(), session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=scalars))
        self._try(lambda: self._writer.write_event(event))

    def flush(self) -> None:
        self._try(lambda: self._writer.flush())
        if self._temporary is not None:
            self._try(lambda: copy_tree(self._local, self._folder))

    def _try(self, action: Callable[[], Any]) -> None:
        if self._writer is None:
            return
        try:
            action()
        except Exception as error:  # file systems of buckets raise types of their own
            logging.warning("no more TensorBoard events: %s", cause(error))
            self._writer = None


def _drop_after(path: epath.Path, step: int) -> None:
    """Rewrites the file without later steps and without a line that a kill cut short; atomic."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    atomic_write(path, "".join(kept))


def read_metrics(workdir: os.PathLike | str) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (epath.Path(workdir) / METRICS_FILE).read_text().splitlines()]


def flatten(metrics: Mapping[str, Any], datasets: Sequence[str], prefix: str) -> dict[str, float]:
    """Returns scalars by name; vectors `x_by_dataset` become `prefix/DATASET/x` if there are several datasets."""
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
    """Returns `device_peak_gb`, the peak of the fullest device of this process, if its allocator reports one."""
    import jax

    peak = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
    return {"device_peak_gb": peak / 1e9} if peak else {}
