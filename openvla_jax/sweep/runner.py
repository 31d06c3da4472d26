"""Runs the points of a sweep on this machine: a process each, at most N at once, in directories of their own.

What a point's directory holds decides its state, so a sweep can be killed and run again at any moment: a checkpoint of
the last step means finished, an earlier one that the run resumes from there. A run holds a lock on its directory for as
long as it lives, even when the process that started it does not.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from openvla_jax.storage import atomic_write
from openvla_jax.sweep.points import Point, SweepError
from openvla_jax.training.metrics import METRICS_FILE
from openvla_jax.training.progress import duration

SWEEP_FILE, LOG_FILE, LOCK_FILE = "sweep.json", "log.txt", ".lock"
POLL_SECONDS = 0.1
STOPPED = 143  # exit code of a run that was told to stop, and saved
LINE_SECONDS = 30.0  # between two reports if the output is no terminal
SHOWN = ("val/action_accuracy", "val/loss", "train/loss")
_TAIL_BYTES = 65536
_STATES = ("running", "failed", "waiting", "interrupted", "finished")


@dataclass
class Run:
    """A point and what is known of its run."""

    point: Point
    directory: Path
    state: str = "waiting"  # running, failed, interrupted, finished
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    process: subprocess.Popen | None = None
    slot: int = 0

    def look(self) -> None:
        """Reads step and metrics from the run's files."""
        for row in tail(self.directory / METRICS_FILE):
            self.step = int(row["step"])
            self.metrics |= row

    @property
    def eta(self) -> str:
        rate = self.metrics.get("train/steps_per_second", 0.0)
        return duration((self.point.steps - self.step) / rate) if rate > 0 and self.state == "running" else ""


def tail(path: Path) -> list[dict[str, float]]:
    """The last lines of a metrics.jsonl, without one that is still being written."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def saved_step(directory: Path) -> int:
    """The step of the run's latest complete checkpoint, 0 without one; what is being written has another name."""
    folder = directory / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def prepare(workdir: Path, points: Sequence[Point]) -> list[Run]:
    """Returns the runs of a sweep in `workdir`, with the state of each that has begun.

    Raises SweepError if `workdir` holds another sweep: points may be added, not removed or changed.
    """
    record = {point.name: {"config": point.config, "overrides": _plain(point.overrides)} for point in points}
    file = workdir / SWEEP_FILE
    if file.exists():
        before = json.loads(file.read_text())["points"]
        changed = [name for name in before if before[name] != record.get(name)]
        if changed:
            raise SweepError(
                f"{workdir} holds another sweep: its point {changed[0]} is not in this one, or has other settings "
                f"({len(changed)} of {len(before)} differ); name another --workdir"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise SweepError(f"{workdir} is not empty and holds no sweep: name another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps({"points": record}, indent=2) + "\n")
    return read(workdir, points)


@contextlib.contextmanager
def only_one(workdir: Path) -> Iterator[None]:
    """Holds the sweep's own lock. SweepError where another process runs it."""
    lock = _lock(workdir)
    if lock is None:
        raise SweepError(f"another process runs the sweep in {workdir}: wait for it or stop it")
    with lock:
        yield


def read(workdir: Path, points: Sequence[Point]) -> list[Run]:
    runs = []
    for point in points:
        run = Run(point, workdir / point.name)
        run.look()
        saved = saved_step(run.directory)
        run.state = "finished" if saved >= point.steps else "interrupted" if run.directory.exists() else "waiting"
        runs.append(run)
    return runs


def run_all(
    runs: Sequence[Run], parallel: int = 1, devices: Sequence[str] = (), show: Callable[[Sequence[Run]], None] = print
) -> bool:
    """Runs what is not finished; True if all are in the end. A failed one does not stop the rest.

    `devices`: for each of the parallel runs, its CUDA_VISIBLE_DEVICES. Ctrl-C and SIGTERM stop the runs, which save
    first, and raise KeyboardInterrupt.
    """
    if devices and len(devices) < parallel:
        raise SweepError(f"{parallel} runs in parallel, but {len(devices)} devices: name one for each, --devices 0,1")
    waiting = [run for run in runs if run.state != "finished"]
    running: list[Run] = []
    free = list(range(parallel))
    # SIGINT too: a shell starts background jobs with it ignored.
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while waiting or running:
            while waiting and free:
                run = waiting.pop(0)
                run.slot = free.pop(0)
                _start(run, devices[run.slot] if devices else None)
                running.append(run)
            show(runs)
            time.sleep(POLL_SECONDS)
            for run in list(running):
                run.look()
                if not _ended(run):
                    continue
                running.remove(run)
                free.append(run.slot)
                if run.state == "waiting":
                    waiting.insert(0, run)
    except KeyboardInterrupt:
        _stop(running)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        show(runs)
    return all(run.state == "finished" for run in runs)


def log_tail(run: Run, lines: int = 5) -> list[str]:
    """The last lines of a run's log."""
    try:
        text = (run.directory / LOG_FILE).read_text(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _plain(overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in overrides.items()}


def _lock(directory: Path) -> IO[str] | None:
    """The directory's lock file, locked; None where another process holds it."""
    file = (directory / LOCK_FILE).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _start(run: Run, device: str | None) -> None:
    """Starts the run's process; not if one of an earlier sweep is still alive in its directory."""
    run.directory.mkdir(parents=True, exist_ok=True)
    run.state, run.process = "running", None
    lock = _lock(run.directory)
    if lock is None:
        return
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    command = [sys.executable, *run.point.arguments(str(run.directory.absolute()))]
    with lock, (run.directory / LOG_FILE).open("a") as log:
        # The child keeps the lock, which belongs to the open file, until it ends. Of Ctrl-C on the terminal it hears
        # through us alone.
        run.process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, pass_fds=(lock.fileno(),), preexec_fn=_die_with_parent,
        )  # fmt: skip


def _ended(run: Run) -> bool:
    """Whether the run's process has ended; sets its state (`waiting`: to be started, its directory is free now)."""
    finished = saved_step(run.directory) >= run.point.steps
    if run.process is None:
        lock = _lock(run.directory)
        if lock is None:
            return False
        lock.close()
        run.state = "finished" if finished else "waiting"
        return True
    code = run.process.poll()
    if code is None:
        return False
    run.state = "finished" if code == 0 and finished else "interrupted" if code == STOPPED else "failed"
    return True


def _die_with_parent() -> None:
    """Linux sends the child SIGTERM, upon which it saves and ends, when the sweep's process dies in any way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _stop(running: Sequence[Run]) -> None:
    """Asks all runs to save and end, and waits for them."""
    print(f"stopping {len(running)} runs; each saves first, and the same command resumes them", file=sys.stderr)
    for run in running:
        if run.process is not None:
            run.process.send_signal(signal.SIGTERM)
    for run in running:
        if run.process is not None:
            run.process.wait()
            run.state = "interrupted"


class Table:
    """Shows the state of all runs: redrawn in place on a terminal, else a line for each change and now and then.

    To be used in a `with` block, at whose end the terminal is as before.
    """

    def __init__(self, out: IO[str] = sys.stdout):
        self._out = out
        self._live = Live(console=Console(file=out), auto_refresh=False) if out.isatty() else None
        self._shown = 0.0
        self._states: dict[str, str] = {}

    def __enter__(self) -> "Table":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, runs: Sequence[Run]) -> None:
        changes = [run for run in runs if self._states.get(run.point.name) != run.state]
        due = time.monotonic() - self._shown > (0.5 if self._live else LINE_SECONDS)
        if not (due or changes):
            return
        self._shown = time.monotonic()
        if self._live:
            self._live.update(Text("\n".join(table(runs)), no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            for run in changes if changes else [run for run in runs if run.state == "running"]:
                if self._states or run.state != "waiting":
                    self._out.write("  ".join(_cells(run)).rstrip() + "\n")
        self._states = {run.point.name: run.state for run in runs}
        self._out.flush()


def table(runs: Sequence[Run]) -> list[str]:
    """Lines: a row for each run, and the count of runs by state."""
    rows = [("point", "state", "step", "rate", "ETA", "last metrics"), *(_cells(run) for run in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = [(state, sum(run.state == state for run in runs)) for state in _STATES]
    return [*lines, ", ".join(f"{count} {state}" for state, count in counts if count)]


def _cells(run: Run) -> tuple[str, ...]:
    rate = run.metrics.get("train/steps_per_second")
    metrics = [f"{key} {run.metrics[key]:.4g}" for key in SHOWN if key in run.metrics]
    return (
        run.point.name,
        run.state,
        f"{run.step}/{run.point.steps}",
        f"{rate:.1f}/s" if rate and run.state == "running" else "",
        run.eta,
        "  ".join(metrics),
    )
