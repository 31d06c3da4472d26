"""Runs stages in a process with a time limit, and keeps what they recorded however it ends."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_child(
    command: list[str], stages: list[str], rows: Path, seconds: float, environment: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Runs the stages that a command runs one after another, for at most so many seconds.

    Args:
        command: Appends JSON objects to the file `rows`, one a line, each with the key `stage`. The last object of a
            stage is `{"stage": name, "ended": result, "seconds": seconds}`.
        stages: Their names, in order.

    Returns:
        Of each stage `stage`, `result` ("done", "skipped: ...", "failed: ..." or "timed out ..."), `seconds`, and
        `rows` without the key `stage`. If the process ends before its stages do, the first unfinished stage has the
        reason and the last line of the output; the stages after it did not run.
    """
    began = time.perf_counter()
    log = rows.with_suffix(".log")
    with log.open("wb") as output:
        # A separate process group, so that what the stage starts ends with it.
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            end = f"failed: {_last_line(log) or 'no output'} (exit code {code})"
        except subprocess.TimeoutExpired:
            end = f"timed out after {seconds:.0f} s"
        finally:
            _end(process)
    recorded = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    left = time.perf_counter() - began - sum(row["seconds"] for row in recorded if "ended" in row)
    reports = []
    for name in stages:
        mine = [{k: v for k, v in row.items() if k != "stage"} for row in recorded if row["stage"] == name]
        if mine and "ended" in mine[-1]:
            last = mine.pop()
            reports.append({"stage": name, "result": last["ended"], "seconds": last["seconds"], "rows": mine})
        else:
            reports.append({"stage": name, "result": end, "seconds": round(left, 1), "rows": mine})
            end, left = f"not run: {name} ended the process", 0.0
    return reports


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
