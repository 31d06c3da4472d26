"""Rates with intervals, paired tests between arms, and the page about an evaluation."""

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openvla_jax.errors import InputError
from openvla_jax.evaluation.benchmarks.results import Outcome
from openvla_jax.evaluation.page import page, table_html
from openvla_jax.evaluation.rollouts import wilson_interval
from openvla_jax.storage import atomic_write

Table = list[tuple[str, ...]]
REPORT_FILE = "report.html"
VIDEOS = "videos"


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two arms on the same tasks and states: how often only one of them succeeded, and McNemar's exact test."""

    episodes: int
    only_first: int
    only_second: int

    @property
    def p_value(self) -> float:
        """The probability of a split at least as uneven, if both arms were equally good. 1 if they never differ."""
        from scipy.stats import binomtest

        differing = self.only_first + self.only_second
        return float(binomtest(self.only_first, differing).pvalue) if differing else 1.0


def pair(first: Iterable[Outcome], second: Iterable[Outcome]) -> Pairs:
    """Pairs two arms by task and state; episodes that only one of them has are left out."""
    ours = {(outcome.task, outcome.state): outcome.success for outcome in first}
    theirs = {(outcome.task, outcome.state): outcome.success for outcome in second}
    common = ours.keys() & theirs.keys()
    return Pairs(
        len(common),
        sum(ours[key] and not theirs[key] for key in common),
        sum(theirs[key] and not ours[key] for key in common),
    )


def by_arm(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    """Returns the outcomes of each arm, in the order in which arms first come."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.arm, []).append(outcome)
    return found


def rate(outcomes: Sequence[Outcome]) -> tuple[str, str, str]:
    """Returns successes of trials, the rate, and its 95% interval (Wilson)."""
    successes = sum(outcome.success for outcome in outcomes)
    low, high = wilson_interval(successes, len(outcomes))
    return f"{successes} / {len(outcomes)}", f"{successes / len(outcomes):.1%}", f"{low:.1%} to {high:.1%}"


def arms_table(outcomes: Sequence[Outcome]) -> Table:
    """Rates by arm, each compared with the first one on the same states."""
    arms = by_arm(outcomes)
    rows: Table = [("arm", "success", "rate", "95% interval", "only the first", "only this", "McNemar p")]
    first = next(iter(arms.values()))
    for name, found in arms.items():
        compared: tuple[str, ...] = ("", "", "")
        if found is not first:
            pairs = pair(first, found)
            compared = (str(pairs.only_first), str(pairs.only_second), f"{pairs.p_value:.3g}")
        rows.append((name, *rate(found), *compared))
    return rows


def tasks_table(outcomes: Sequence[Outcome]) -> Table:
    """Rates by task and arm."""
    rows: Table = [("task", "arm", "success", "rate", "95% interval", "instruction")]
    for task in sorted({outcome.task for outcome in outcomes}):
        for arm, found in by_arm(outcome for outcome in outcomes if outcome.task == task).items():
            rows.append((str(task), arm, *rate(found), found[0].instruction))
    return rows


def text_table(rows: Table) -> str:
    """Returns a table of Markdown."""
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def write_report(folder: Path, run: Mapping[str, Any], outcomes: Sequence[Outcome]) -> Path:
    """Writes folder/report.html and returns its path. Raises InputError if there are no outcomes."""
    if not outcomes:
        raise InputError.of(folder, "has no finished episode yet", "run the evaluation first")
    expected = run["episodes"]
    missing = f": {expected - len(outcomes)} of {expected} are missing" if len(outcomes) < expected else ""
    body = [
        f"<p>{len(outcomes)} episodes{missing}.</p>",
        *_other_simulator(run["simulator"]),
        "<h2>Success</h2>",
        table_html(arms_table(outcomes)),
        "<p>An arm is compared with the first one on the same tasks and initial states: episodes that only one of them "
        "solved, and the exact McNemar test of those.</p>",
        "<h2>By task</h2>",
        table_html(tasks_table(outcomes)),
        *_videos(folder),
        "<h2>Protocol</h2>",
        table_html([("setting", "value"), *_settings(run)]),
        "<h2>Simulator</h2>",
        table_html([("what", "value"), *_simulator(run["simulator"], outcomes)]),
    ]
    atomic_write(folder / REPORT_FILE, page(f"{run['suite']}: {run['policy']['name']}", body))
    return folder / REPORT_FILE


def _other_simulator(simulator: Mapping[str, Any]) -> list[str]:
    if simulator["agrees"]:
        return []
    return ["<p><b>Another simulator than the benchmark's drew these episodes: do not compare the rates.</b></p>"]


def _videos(folder: Path) -> list[str]:
    films = sorted((folder / VIDEOS).glob("*.gif"))
    pictures = [f'<img alt="{html.escape(film.stem)}" src="{VIDEOS}/{html.escape(film.name)}">' for film in films]
    return ["<h2>Episodes</h2>", *pictures] if films else []


def _settings(run: Mapping[str, Any]) -> Table:
    return [(name, str(value)) for name, value in (run["policy"] | run["protocol"]).items()]


def _simulator(simulator: Mapping[str, Any], outcomes: Sequence[Outcome]) -> Table:
    rows: Table = list(simulator["versions"].items())
    shares = ", ".join(f"{camera} {share:.2%}" for camera, share in simulator["pixels"].items())
    rows += [("pixels unlike the fingerprint", shares), ("trace off by", f"{simulator['trace']:.1e}")]
    rows.append(("digest", simulator["digest"]))
    rows.append(("episodes done again", str(sum(outcome.redone > 0 for outcome in outcomes))))
    rows.append(("CPU seconds an episode", f"{sum(outcome.cpu_seconds for outcome in outcomes) / len(outcomes):.1f}"))
    return rows
