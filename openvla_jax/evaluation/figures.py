"""Figures and the report of an evaluation: training curves, a strip and an animation of rollouts, report.md."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openvla_jax.data.text import literal
from openvla_jax.errors import InputError
from openvla_jax.evaluation.page import COLORS, new_figure, plain, png
from openvla_jax.evaluation.rollouts import Rollouts

SUCCESS, FAILURE = (46, 139, 87), (192, 57, 43)
INK, PAPER = (40, 40, 40), (255, 255, 255)
_PANELS = (
    ("loss", "loss"),
    ("action_accuracy", "action token accuracy"),
    ("action_l1", "L1 of normalised actions"),
)


def training_curves(metrics: Sequence[Mapping[str, float]], path: Path) -> Path:
    """PNG of `curves_figure`."""
    path.write_bytes(png(curves_figure(metrics)))
    return path


def curves_figure(metrics: Sequence[Mapping[str, float]]) -> Any:
    """Loss, token accuracy (of heads that predict tokens) and action L1 against the step, training and validation;
    `metrics` as read from metrics.jsonl, keys `train/...` and `val/...`. Raises InputError if it holds no training
    loss."""
    if not any("train/loss" in row for row in metrics):
        raise InputError(f"no train/loss in {len(metrics)} lines of metrics: nothing to draw")
    figure = new_figure(12, 3.4)
    known = {name.partition("/")[2] for row in metrics for name in row}
    there = [panel for panel in _PANELS if panel[0] in known]
    for axes, (name, label) in zip(figure.subplots(1, len(there), squeeze=False)[0], there, strict=True):
        for split, style in (
            ("train", {"color": "#9aa7b5", "linewidth": 1}),
            ("val", {"color": COLORS[1], "marker": "o"}),
        ):
            points = [(row["step"], row[f"{split}/{name}"]) for row in metrics if f"{split}/{name}" in row]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label={"train": "training", "val": "held-out episodes"}[split], **style
                )
        axes.set(xlabel="step", title=label)
        plain(axes)
        if axes.lines:
            axes.legend(frameon=False)
    return figure


def action_scatter(predicted: np.ndarray, true: np.ndarray, path: Path, title: str) -> Path:
    """PNG: predicted against true action, both [N, A] in physical units, one panel per dimension."""

    dims = true.shape[1]
    columns = min(dims, 4)
    rows = -(-dims // columns)
    figure = new_figure(3 * columns, 3 * rows)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= dims:
            axes.set_visible(False)
            continue
        low, high = (bound(np.concatenate([predicted[:, i], true[:, i]])) for bound in (np.min, np.max))
        margin = 0.05 * (high - low) or 0.5
        ends = [low - margin, high + margin]
        axes.plot(ends, ends, color="#9aa7b5", linewidth=1)
        axes.scatter(true[:, i], predicted[:, i], s=8, alpha=0.4, color="#c0392b", edgecolors="none")
        axes.set(xlim=ends, ylim=ends, title=f"dimension {i}", xlabel="true", ylabel="predicted")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(literal(title))
    figure.savefig(path, dpi=110)
    return path


def enlarged_png(image: np.ndarray, height: int) -> bytes:
    """PNG of an image uint8 [H, W, 3], small ones enlarged without smoothing to about `height` pixels."""
    out = io.BytesIO()
    _enlarge(image, max(1, height // image.shape[0])).save(out, format="PNG")
    return out.getvalue()


def rollout_strip(rollouts: Rollouts, path: Path, columns: int = 8, scale: int = 2) -> Path:
    """PNG: one recorded scene per row, `columns` frames from first to last, the instruction above, green where it
    succeeded.
    """
    return _save(_grid([_strip(rollouts, index, columns, scale) for index in range(len(rollouts.frames))], 1), path)


def rollout_animation(rollouts: Rollouts, path: Path, columns: int = 4, scale: int = 3) -> Path:
    """GIF of all recorded scenes side by side, each framed in green once it has succeeded."""
    length = max(len(frames) for frames in rollouts.frames)
    pictures = []
    for time in range(length + 3):  # the end stays for a moment
        tiles = []
        for index, frames in enumerate(rollouts.frames):
            ended = time >= len(frames) - 1
            color = PAPER if not ended else SUCCESS if rollouts.success[index] else FAILURE
            picture = _enlarge(frames[min(time, len(frames) - 1)], scale)
            tiles.append(_captioned(picture, rollouts.instructions[index], color))
        pictures.append(_grid(tiles, columns))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=250, loop=0)
    return path


def write_report(results: Mapping[str, Rollouts], path: Path, title: str, figures: Sequence[Path] = ()) -> Path:
    """Markdown: success by condition with 95% intervals, and the figures, which lie in the same folder."""
    lines = [f"# {title}", "", success_table(results), ""]
    lines += [f"![{figure.stem.replace('_', ' ')}]({figure.name})\n" for figure in figures]
    path.write_text("\n".join(lines))
    return path


def success_table(results: Mapping[str, Rollouts]) -> str:
    """A markdown table: condition, successes, rate, Wilson 95% interval, median steps of the successes."""
    rows = [("condition", "success", "rate", "95% interval (Wilson)", "median steps to success"), ("---",) * 5]
    for name, result in results.items():
        low, high = result.interval
        median = f"{np.median(result.steps[result.success]):.0f}" if result.success.any() else "-"
        successes = f"{result.success.sum()} / {len(result.success)}"
        rows.append((name, successes, f"{result.rate:.0%}", f"{low:.1%} to {high:.1%}", median))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _strip(rollouts: Rollouts, index: int, columns: int, scale: int) -> Image.Image:
    frames = rollouts.frames[index]
    # Evenly spaced, first and last included; a short episode shows every frame and leaves the rest empty.
    chosen = np.unique(np.linspace(0, len(frames) - 1, columns).round().astype(int))
    empty = np.full_like(frames[0], 255)
    tiles = [_enlarge(frames[i], scale) for i in chosen] + [_enlarge(empty, scale)] * (columns - len(chosen))
    success = bool(rollouts.success[index])
    outcome = f"{rollouts.achieved} after {rollouts.steps[index]} steps" if success else f"not {rollouts.achieved}"
    return _captioned(
        _grid(tiles, columns, gap=2), f"{rollouts.instructions[index]}: {outcome}", SUCCESS if success else FAILURE
    )


def _enlarge(frame: np.ndarray, scale: int) -> Image.Image:
    return Image.fromarray(frame).resize((frame.shape[1] * scale, frame.shape[0] * scale), Image.Resampling.NEAREST)


def _captioned(
    picture: Image.Image, caption: str, color: tuple[int, int, int], border: int = 3, line: int = 18
) -> Image.Image:
    framed = Image.new("RGB", (picture.width + 2 * border, picture.height + 2 * border + line), PAPER)
    framed.paste(color, (0, line, framed.width, framed.height))
    framed.paste(picture, (border, border + line))
    ImageDraw.Draw(framed).text((border, 1), caption, INK, ImageFont.load_default(12))
    return framed


def _grid(tiles: Sequence[Image.Image], columns: int, gap: int = 6) -> Image.Image:
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    columns = min(columns, len(tiles))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), PAPER)
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % columns * (width + gap), index // columns * (height + gap)))
    return sheet


def _save(picture: Image.Image, path: Path) -> Path:
    picture.save(path)
    return path
