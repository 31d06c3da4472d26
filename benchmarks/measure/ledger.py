"""Writes the ledger of a run: a report as JSON, and as a page of tables."""

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from measure import ROOT

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "orbax-checkpoint", "torch", "triton",
            "transformers", "peft", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # fmt: skip


def about_machine(gpu: bool) -> dict[str, str]:
    """Returns the card, its driver and versions. It does not import jax, which would take the card's memory."""
    found = {"processor": platform.processor() or platform.machine(), "Python": platform.python_version()}
    if gpu:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found |= {"card, memory, driver": _output(query)}
    found |= {"commit": _output(["git", "-C", str(ROOT), "log", "-1", "--format=%h %cs"])}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes `gpu_ledger.json` and `gpu_ledger.md` to `folder`. Each replaces the old file as a whole."""
    for name, text in (("gpu_ledger.json", json.dumps(report, indent=1)), ("gpu_ledger.md", page(report))):
        unfinished = folder / f".{name}"
        unfinished.write_text(text + "\n")
        unfinished.replace(folder / name)


def page(report: Mapping[str, Any]) -> str:
    """Returns Markdown: the machine, the result of each stage, and a table for each kind of row."""
    lines = ["# GPU ledger", "", f"`{report['command']}`, {report['began']}, {report['seconds']:.0f} s in all.", ""]
    if report["small"]:
        lines += ["**`--small`: tiny models on a CPU. These numbers show that the stages run, nothing else.**", ""]
    lines += [*_table([{"": key, "version": value} for key, value in report["machine"].items()]), ""]
    lines += ["## Stages", ""]
    lines += [*_table([{k: v for k, v in stage.items() if k != "rows"} for stage in report["stages"]]), ""]
    rows: dict[str, list[dict[str, Any]]] = {}
    for stage in report["stages"]:
        for row in stage["rows"]:
            rows.setdefault(row["table"], []).append({k: v for k, v in row.items() if k != "table"})
    for name, of_table in rows.items():
        lines += [f"## {name.capitalize()}", "", *_table(of_table), ""]
    return "\n".join(lines).rstrip()


def _table(rows: list[dict[str, Any]]) -> Iterable[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        yield "| " + " | ".join(_cell(row.get(column)) for column in columns) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
