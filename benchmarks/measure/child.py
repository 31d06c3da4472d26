"""Runs a stage in a process of its own, with its own time, and keeps what it recorded however it ended."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run_child(command: list[str], rows: Path, seconds: float, environment: Mapping[str, str]) -> dict[str, Any]:
    """`result` ("done", "skipped: ...", "failed: ..." or "timed out ..."), `seconds`, `rows`: dicts that the command
    wrote to the file `rows`, one JSON object a line. A last line `{"ended": text}` is the result of a command that
    fails knowingly; of others it is the last line of what they printed.
    """
    began = time.perf_counter()
    log = rows.with_suffix(".log")
    with log.open("wb") as output:
        # A group of its own: what the stage itself starts is ended with it.
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            result = "done" if code == 0 else f"failed: {_last_line(log) or f'exit code {code}'}"
        except subprocess.TimeoutExpired:
            result = f"timed out after {seconds:.0f} s"
        finally:
            _end(process)
    recorded = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    if recorded and "ended" in recorded[-1]:
        result = recorded.pop()["ended"]
    return {"result": result, "seconds": round(time.perf_counter() - began, 1), "rows": recorded}


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
