"""The report of one training run, finished or running: one HTML page that opens without a network."""

import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.reading import load_contract, open_checkpoint, steps_in
from openvla_jax.config import VLAConfig
from openvla_jax.errors import InputError
from openvla_jax.evaluation import figures
from openvla_jax.evaluation.page import COLORS, image_html, new_figure, page, plain, png, table_html
from openvla_jax.models.openvla import count_parameters
from openvla_jax.storage import absolute, atomic_write
from openvla_jax.training.metrics import METRICS_FILE, read_metrics
from openvla_jax.training.progress import duration

REPORT_FILE = "report.html"
Rows = list[tuple[str, ...]]


def write_report(directory: str | os.PathLike, frames: int = 4) -> epath.Path:
    """Writes W/report.html: progress, curves, data mixture, throughput, memory, checkpoints, and what the latest
    checkpoint predicts on `frames` held-out frames of each dataset (0: none). A section that cannot be
    rendered says why. Raises InputError if `directory` holds no run.
    """
    workdir = absolute(directory)
    files = [workdir / "config.json", workdir / METRICS_FILE]
    if missing := [file.name for file in files if not file.exists()]:
        raise InputError(f"{workdir} holds no training run ({' and '.join(missing)} missing)")
    config, metrics = json.loads(files[0].read_text()), read_metrics(workdir)
    if not any("train/loss" in row for row in metrics):
        raise InputError(f"{workdir} has no metrics yet: wait for its first lines")
    steps = steps_in(workdir / "checkpoints")
    contract = load_contract(workdir) if steps else None
    body = [
        table_html(summary(config, metrics, contract)),
        "<h2>Curves</h2>",
        image_html(png(figures.curves_figure(metrics)), "training curves"),
        "<h2>Data</h2>",
        table_html(mixture(config, metrics, contract.statistics if contract else {})),
        "<h2>Throughput and optimiser</h2>",
        image_html(png(series(metrics, _SERIES)), "throughput, learning rate and gradient norm"),
        "<h2>Memory</h2>",
        table_html(memory(metrics, contract.model if contract else None)),
        "<h2>Checkpoints</h2>",
        table_html(checkpoints(workdir, steps, metrics)),
        "<h2>Held-out frames</h2>",
        *predictions(workdir, contract, frames),
        f"<details><summary>Config</summary><pre>{html.escape(json.dumps(config, indent=2))}</pre></details>",
    ]
    atomic_write(workdir / REPORT_FILE, page(f"Run {workdir.name}", body))
    return workdir / REPORT_FILE


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------

_SERIES = (
    ("train/examples_per_second", "examples per second"),
    ("train/data_wait_fraction", "share of time waiting for data"),
    ("train/learning_rate", "learning rate"),
    ("train/grad_norm", "gradient norm"),
)


def summary(config: Mapping[str, Any], metrics: Sequence[Mapping[str, float]], contract: Contract | None) -> Rows:
    train, last = config["train"], metrics[-1]
    step, seconds = int(last["step"]), last["time"] - metrics[0]["time"]
    rows: Rows = [("run", "")]
    if contract is not None:
        rows.append(("model", f"{contract.model.name}, {count_parameters(contract.model):,} parameters"))
    rows.append(("started from", config.get("init_from") or "random weights"))
    rows.append(("data", config["data"]["dataset"]))
    rows.append(("batch", f"{train['batch_size']} in {train['accumulation']} part(s), seed {config['seed']}"))
    rows.append(("learning rate", f"{config['optimizer']['learning_rate']:g}, {config['optimizer']['schedule']}"))
    rows.append(("step", f"{step:,} of {train['steps']:,}, {duration(seconds)} between first and last line"))
    for name, what in (("loss", "loss"), ("action_accuracy", "action token accuracy"), ("action_l1", "L1")):
        if not any(f"{split}/{name}" in row for split in ("train", "val") for row in metrics):
            continue  # of another head
        values = [
            f"{split} {_latest(metrics, f'{split}/{name}'):.4g}" for split in ("train", "val") if
            np.isfinite(_latest(metrics, f"{split}/{name}"))
        ]  # fmt: skip
        rows.append((what, ", ".join(values)))
    return rows


def mixture(config: Mapping[str, Any], metrics: Sequence[Mapping[str, float]], statistics: Mapping[str, Any]) -> Rows:
    """Each dataset's size, its share of the frames that are drawn, and how well it is learnt."""
    from openvla_jax.data.custom import catalogue
    from openvla_jax.data.mixture import probabilities  # TensorFlow comes with these
    from openvla_jax.data.oxe.mixtures import resolve_mixture

    rows: Rows = [("dataset", "weight", "episodes", "steps", "share", "accuracy (train)", "L1 (train)")]
    try:
        weights = dict(resolve_mixture(config["data"]["dataset"], *catalogue(config["data"].get("module"))))
    except ValueError:  # its file is gone
        weights = {}
    names = [name for name in statistics if "num_transitions" in statistics[name]]
    sizes = np.array([statistics[name]["num_transitions"] for name in names])
    shares = probabilities(np.array([weights.get(name, 1.0) for name in names]), sizes) if names else []
    for name, size, share in zip(names, sizes, shares, strict=True):
        learnt = (_latest(metrics, f"train/{name + '/' if len(names) > 1 else ''}{what}") for what in _LEARNT)
        episodes = statistics[name].get("num_trajectories", 0)
        cells = (f"{weights.get(name, 1.0):g}", f"{episodes:,}", f"{size:,}", f"{share:.1%}")
        rows.append((name, *cells, *(f"{value:.3g}" if np.isfinite(value) else "-" for value in learnt)))
    return rows if names else [("dataset", ""), (config["data"]["dataset"], "its statistics come with a checkpoint")]


_LEARNT = ("action_accuracy", "action_l1")


def series(metrics: Sequence[Mapping[str, float]], names: Iterable[tuple[str, str]]) -> Any:
    """A figure with a panel for each metric that is there."""
    there = [(name, label) for name, label in names if any(name in row for row in metrics)]
    figure = new_figure(12, 3 * -(-len(there) // 2))
    panels = figure.subplots(-(-len(there) // 2), 2, squeeze=False).flat
    for axes in panels[len(there) :]:
        axes.set_visible(False)
    for axes, (name, label) in zip(panels, there, strict=False):
        axes.plot(*zip(*((row["step"], row[name]) for row in metrics if name in row), strict=True), color=COLORS[0])
        axes.set(xlabel="step", title=label)
        axes.set_ylim(bottom=0)
        plain(axes)
    return figure


def memory(metrics: Sequence[Mapping[str, float]], model: VLAConfig | None) -> Rows:
    rows: Rows = [("what", "GB")]
    for name, what in (
        ("train/device_peak_gb", "fullest device of the first process, at most"),
        ("train/resident_memory_gb", "first process on its host, at most"),
    ):
        values = [row[name] for row in metrics if name in row]
        rows.append((what, f"{max(values):.2f}" if values else "not recorded"))
    if model is not None:
        parameters = 4 * count_parameters(model) / 1e9
        rows.append(("parameters in float32, all devices together", f"{parameters:.3f}"))
        rows.append(("with Adam's moments of all of them", f"{3 * parameters:.3f}"))
    return rows


def checkpoints(workdir: epath.Path, steps: Sequence[int], metrics: Sequence[Mapping[str, float]]) -> Rows:
    """Kept checkpoints with their size and the validation at their step."""
    validated = {int(row["step"]): row for row in metrics if "val/loss" in row}
    rows: Rows = [("step", "MB", "validation loss", "action accuracy")]
    for step in steps:
        row = validated.get(step, {})
        values = (f"{row[name]:.4g}" if name in row else "-" for name in ("val/loss", "val/action_accuracy"))
        rows.append((f"{step:,}", f"{_bytes(workdir / 'checkpoints' / str(step)) / 1e6:,.1f}", *values))
    return rows if steps else [("step", "MB"), ("none yet", "")]


def predictions(workdir: epath.Path, contract: Contract | None, count: int) -> list[str]:
    """HTML: held-out frames with their instruction, what was done, and what the latest checkpoint would do."""
    if count < 1:
        return ["<p>Not asked for.</p>"]
    try:
        if contract is None:
            raise CheckpointError("there is no checkpoint yet")
        return list(_predictions(workdir, contract, count))
    except (ValueError, OSError) as error:  # the data may lie elsewhere
        return [f"<p>Not shown: {html.escape(' '.join(str(error).split()))}</p>"]


def _predictions(workdir: epath.Path, contract: Contract, count: int) -> Iterable[str]:
    from openvla_jax.evaluation import offline
    from openvla_jax.inference.policy import Policy

    policy = Policy.from_checkpoint(workdir, check_images=False)
    data = contract.training["data"]
    yield (
        f"<p>Checkpoint {open_checkpoint(workdir).name}, greedy, through the serving path; actions in the dataset's "
        "units.</p>"
    )
    for name, statistics in contract.statistics.items():
        frames = offline.held_out_frames(
            name, data["data_dir"], statistics, count, module=data.get("module", ""),
            observation=contract.observation, normalization=contract.action.normalization,
        )  # fmt: skip
        result = offline.compare(offline.predict(policy, frames, name), frames, statistics["action"], contract.action)
        yield f"<h3>{html.escape(name)}: {result.accuracy:.0%} of the tokens</h3>"
        for i, frame in enumerate(frames):
            rows: Rows = [("", *(f"dim {d}" for d in range(result.true.shape[1])))]
            for what, actions in (("done", result.true), ("predicted", result.predicted)):
                rows.append((what, *(f"{value + 0.0:.3f}" for value in actions[i].round(3))))
            picture = image_html(figures.enlarged_png(frame.image, 144), frame.instruction)
            caption = f"<b>{html.escape(frame.instruction)}</b> (step {frame.step})"
            yield f"<div class=frame>{picture}<div>{caption}{table_html(rows)}</div></div>"


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def _latest(metrics: Sequence[Mapping[str, float]], name: str) -> float:
    return next((row[name] for row in reversed(metrics) if name in row), float("nan"))


def _bytes(path: epath.Path) -> int:
    return sum(_bytes(child) if child.is_dir() else child.stat().length for child in path.iterdir())
