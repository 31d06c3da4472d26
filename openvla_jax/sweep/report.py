"""The report of a sweep, finished or running: results.csv, report.md, figures, and a self-contained HTML page."""

import csv
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from openvla_jax.data.text import literal
from openvla_jax.evaluation.page import COLORS, image_html, new_figure, page, plain, png, table_html
from openvla_jax.storage import atomic_write
from openvla_jax.sweep.points import CONFIG, SweepError
from openvla_jax.sweep.rollouts import BOUNDS, SUCCESS, measured
from openvla_jax.sweep.runner import SWEEP_FILE
from openvla_jax.training.metrics import METRICS_FILE, read_metrics

SEED = "seed"
_LOG_SPAN = 20.0  # an axis whose values differ by more than this factor is drawn on a logarithmic scale


@dataclass
class Result:
    """What one point has reached so far."""

    name: str
    settings: dict[str, Any]  # its overrides, and its config where several are swept
    curve: list[dict[str, float]]

    @property
    def step(self) -> int:
        return int(max((row["step"] for row in self.curve), default=0))

    def last(self, metric: str) -> float:
        """The metric's latest value; NaN if there is none yet."""
        return next((row[metric] for row in reversed(self.curve) if metric in row), math.nan)


@dataclass
class Group:
    """Points that differ in their seed alone."""

    settings: dict[str, Any]
    values: list[float]
    bounds: tuple[float, float] = (math.nan, math.nan)  # 95% interval of a single value, if the metric has one

    @property
    def mean(self) -> float:
        known = [value for value in self.values if not math.isnan(value)]
        return float(np.mean(known)) if known else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Of the mean, 95% (Student's t over seeds); for a single seed what its metric says of itself, or NaN."""
        known = [value for value in self.values if not math.isnan(value)]
        if len(known) < 2:
            return self.bounds
        half = float(stats.t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known)))
        return self.mean - half, self.mean + half


def write_report(workdir: Path, metric: str, lower: bool) -> list[Path]:
    """Writes the report of a sweep into its workdir; the paths, the page first. `lower`: less of `metric` is better."""
    results = load(workdir)
    known = sorted({key for result in results for row in result.curve for key in row} - {"step", "time"})
    if not known:
        raise SweepError(f"{workdir}: no point has metrics yet")
    if metric not in known:
        raise SweepError(f"no point has {metric!r} yet; there are {', '.join(known)}")
    swept = _swept(results)
    groups = _groups(results, swept, metric)
    figures = {"curves": _curves(results, swept, metric)}
    axes = [key for key in swept if key != SEED]
    if len(axes) == 1:
        figures["effect"] = _effect(groups, axes[0], metric, lower)
    if len(axes) == 2 and (picture := _heat_map(groups, axes, metric)) is not None:
        figures["heat_map"] = picture
    rows = _table(groups, axes, metric, lower)
    title = f"Sweep {workdir.name}: {metric}, {len(results)} points"
    progress = f"{sum(math.isfinite(r.last(metric)) for r in results)} of {len(results)} points have it so far."
    paths = [workdir / "report.html", workdir / "report.md", workdir / "results.csv"]
    atomic_write(paths[0], _page(title, progress, rows, figures, results, swept))
    atomic_write(paths[1], _markdown(title, progress, rows, figures))
    atomic_write(paths[2], _csv(results, swept, known))
    for name, data in figures.items():
        path = workdir / f"{name}.png"
        path.write_bytes(data)
        paths.append(path)
    return paths


def load(workdir: Path) -> list[Result]:
    """The points of the sweep in `workdir` with their metrics so far. Raises SweepError if there is none."""
    file = workdir / SWEEP_FILE
    if not file.exists():
        raise SweepError(f"{workdir} holds no sweep ({SWEEP_FILE} is missing)")
    points = json.loads(file.read_text())["points"]
    several = len({point["config"] for point in points.values()}) > 1
    results = []
    for name, point in points.items():
        settings = ({CONFIG: point["config"]} if several else {}) | point["overrides"]
        metrics = workdir / name / METRICS_FILE
        curve = read_metrics(metrics.parent) if metrics.exists() else []
        results.append(Result(name, settings, curve + measured(metrics.parent)))
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def _swept(results: Sequence[Result]) -> list[str]:
    """The settings that differ between points, in the order in which they are written; of settings that change
    together the first."""
    keys = dict.fromkeys(key for result in results for key in result.settings)
    columns = {key: tuple(_text(result.settings.get(key)) for result in results) for key in keys}
    first = {column: key for key, column in reversed(columns.items())}
    return [key for key, column in columns.items() if len(set(column)) > 1 and first[column] == key]


def _groups(results: Sequence[Result], swept: Sequence[str], metric: str) -> list[Group]:
    groups: dict[tuple[str, ...], Group] = {}
    axes = [key for key in swept if key != SEED]
    for result in results:
        settings = {key: result.settings.get(key) for key in axes}
        group = groups.setdefault(tuple(map(_text, settings.values())), Group(settings, []))
        group.values.append(result.last(metric))
        if metric == SUCCESS:
            group.bounds = result.last(BOUNDS[0]), result.last(BOUNDS[1])
    return list(groups.values())


def _table(groups: Sequence[Group], axes: Sequence[str], metric: str, lower: bool) -> list[tuple[str, ...]]:
    """Header and rows; the best value is marked by `**`."""
    means = [group.mean for group in groups]
    best = None
    if any(map(math.isfinite, means)):
        best = int(np.nanargmin(means) if lower else np.nanargmax(means))
    seeds = any(len(group.values) > 1 for group in groups)
    bounds = seeds or any(math.isfinite(group.bounds[0]) for group in groups)
    rows = [(*map(_short, axes), metric, *(("95% interval",) if bounds else ()), *(("seeds",) if seeds else ()))]
    for number, group in enumerate(groups):
        value = "-" if math.isnan(group.mean) else f"{group.mean:.4g}"
        row = [*(_text(group.settings[key]) for key in axes), f"**{value}**" if number == best else value]
        if bounds:
            low, high = group.interval
            row.append("-" if math.isnan(low) else f"{low:.3g} to {high:.3g}")
        if seeds:
            row.append(f"{sum(map(math.isfinite, group.values))} of {len(group.values)}")
        rows.append(tuple(row))
    return rows


def _markdown(title: str, progress: str, rows: Sequence[Sequence[str]], figures: Mapping[str, bytes]) -> str:
    lines = [f"# {title}", "", progress, ""]
    lines += ["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    lines += [""] + [f"![{name.replace('_', ' ')}]({name}.png)\n" for name in figures]
    return "\n".join(lines)


def _csv(results: Sequence[Result], swept: Sequence[str], metrics: Sequence[str]) -> str:
    """A row per point: name, swept settings, step, the latest value of every metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["point", *swept, "step", *metrics])
    for result in results:
        values = [result.last(metric) for metric in metrics]
        writer.writerow(
            [result.name, *(_text(result.settings.get(key)) for key in swept), result.step]
            + ["" if math.isnan(value) else repr(value) for value in values]
        )
    return out.getvalue()


def _page(
    title: str, progress: str, rows: Sequence[Sequence[str]], figures: Mapping[str, bytes],
    results: Sequence[Result], swept: Sequence[str],
) -> str:  # fmt: skip
    body = [f"<p>{html.escape(progress)}</p>", table_html(rows)]
    body += [image_html(data, name.replace("_", " ")) for name, data in figures.items()]
    every = [("point", "step"), *((result.name, str(result.step)) for result in results)]
    body.append(f"<details><summary>All points</summary>{table_html(every)}</details>")
    if swept:
        body.append(f"<p>Swept: {html.escape(', '.join(swept))}.</p>")
    return page(title, body)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def _curves(results: Sequence[Result], swept: Sequence[str], metric: str) -> bytes:
    """The training loss and the metric of every point against the step; seeds share a colour.

    A metric that is known at the end alone, as success, makes no curve: the held-out loss takes its place.
    """
    length = lambda name: max((sum(name in row for row in result.curve) for result in results), default=0)
    second = metric if length(metric) > 1 or length("val/loss") < 2 else "val/loss"
    panels = list(dict.fromkeys(["train/loss", second]))
    axes_of = [key for key in swept if key != SEED]
    labels = [", ".join(_text(result.settings.get(key)) for key in axes_of) or result.name for result in results]
    colors = _colors(list(dict.fromkeys(labels)), results, axes_of)
    figure = new_figure(6.2 * len(panels), 4.2)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        seen: set[str] = set()
        for result, label in zip(results, labels, strict=True):
            points = [(row["step"], row[name]) for row in result.curve if name in row]
            if points:
                style = {"marker": "o", "markersize": 3} if len(points) < 30 else {}
                axes.plot(*zip(*points, strict=True), color=colors[label], linewidth=1.2,
                          label=None if label in seen else label, **style)  # fmt: skip
                seen.add(label)
        axes.set(xlabel="step", title=literal(name))
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain(axes)
    if len(colors) > 1:
        handles, names = figure.axes[0].get_legend_handles_labels()
        title = literal(", ".join(map(_short, axes_of)))
        figure.legend(handles, list(map(literal, names)), loc="outside right center", frameon=False, fontsize=8,
                      title=title, title_fontsize=8)  # fmt: skip
    return png(figure)


def _effect(groups: Sequence[Group], key: str, metric: str, lower: bool) -> bytes:
    """The metric against one swept setting, on that setting's scale, with intervals if there are several seeds."""
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    values = [group.settings[key] for group in groups]
    numbers = _numbers(values)
    x = list(range(len(values))) if numbers is None else numbers
    if numbers is None:
        axes.set_xticks(x, [literal(_text(value)) for value in values])
    elif min(numbers) > 0 and max(numbers) / min(numbers) > _LOG_SPAN:
        axes.set_xscale("log")
    y = [group.mean for group in groups]
    ends = np.array([group.interval for group in groups]).T
    error = np.nan_to_num(np.abs(ends - y))
    axes.errorbar(x, y, yerr=error if error.any() else None, fmt="o" if numbers is None else "o-", color=COLORS[0],
                  ecolor="#9aa7b5", capsize=3)  # fmt: skip
    if any(map(math.isfinite, y)):
        best = int(np.nanargmin(y) if lower else np.nanargmax(y))
        axes.plot(
            [x[best]], [y[best]], "o", color=COLORS[1], markersize=9, label=literal(f"best: {_text(values[best])}")
        )
        axes.legend(frameon=False)
    axes.set(xlabel=literal(key), title=literal(metric))
    plain(axes)
    return png(figure)


def _heat_map(groups: Sequence[Group], axes: Sequence[str], metric: str) -> bytes | None:
    """The metric over two swept settings; None if they form no grid."""
    columns, lines = ([*dict.fromkeys(_text(group.settings[key]) for group in groups)] for key in axes)
    if len(columns) * len(lines) != len(groups):
        return None
    grid = np.full((len(lines), len(columns)), np.nan)
    for group in groups:
        grid[lines.index(_text(group.settings[axes[1]])), columns.index(_text(group.settings[axes[0]]))] = group.mean
    figure = new_figure(2 + 0.9 * len(columns), 1.6 + 0.6 * len(lines))
    plot = figure.subplots()
    image = plot.imshow(grid, cmap="viridis", aspect="auto")
    plot.set_xticks(range(len(columns)), list(map(literal, columns)), rotation=30)
    plot.set_yticks(range(len(lines)), list(map(literal, lines)))
    middle = (np.nanmax(grid) + np.nanmin(grid)) / 2 if np.isfinite(grid).any() else 0.0
    for (i, j), value in np.ndenumerate(grid):
        if math.isfinite(value):
            plot.text(j, i, f"{value:.3g}", ha="center", va="center", color="black" if value > middle else "white")
    plot.set(xlabel=literal(axes[0]), ylabel=literal(axes[1]), title=literal(metric))
    figure.colorbar(image)
    return png(figure)


def _colors(labels: Sequence[str], results: Sequence[Result], axes: Sequence[str]) -> dict[str, Any]:
    """A colour for each label: along a scale if one numeric setting is swept, else distinct ones."""
    from matplotlib import colormaps

    values = list(dict.fromkeys(_text(result.settings.get(key)) for result in results for key in axes))
    if len(axes) == 1 and _numbers([r.settings.get(axes[0]) for r in results]) is not None and len(values) > 3:
        order = sorted(labels, key=float)
        return {label: colormaps["viridis"](0.9 * i / (len(order) - 1)) for i, label in enumerate(order)}
    return {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}


def _numbers(values: Sequence[Any]) -> list[float] | None:
    good = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return [float(value) for value in values] if good else None


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _text(value: Any) -> str:
    return "base" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
