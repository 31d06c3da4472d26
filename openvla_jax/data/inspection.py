"""Looking at datasets before training on them: what is in them, and what is suspicious about it."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from openvla_jax.data import images, pipeline, statistics
from openvla_jax.data import trajectory as traj
from openvla_jax.data.episodes import explain_errors, read_episodes
from openvla_jax.data.source import Source, episode_ranges

# ---------------------------------------------------------------------------------------------------------------------
# inspect
# ---------------------------------------------------------------------------------------------------------------------


def describe(source: Source, stats: Mapping) -> str:
    """Where a dataset was found, its schema, what is used of it, its episodes and its statistics, as text."""
    config = source.config
    used = {split: sum(run.take for run in episode_ranges(source, split)) for split in ("train", "val")}
    return "\n".join(
        [
            f"dataset {source.name}, version {source.info.version}: {source.directory}",
            f"schema: {source.info.features}",
            f"cameras {config.image_keys}, depth {config.depth_keys}, state {config.state_keys}",
            f"state {config.state_encoding.name}, actions {config.encoding_name}",
            f"episodes {source.splits}; used {used}",
            statistics.table({source.name: stats}),
        ]
    )


def figures(source: Source, folder: Path, episodes: int) -> list[Path]:
    """Writes frames of the first episodes and histograms of their actions as PNG; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sample = list(itertools.islice(_episodes(source), episodes))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{source.name}_frames.png", folder / f"{source.name}_actions.png"]

    shown, columns = sample[:4], 6
    figure, axes = plt.subplots(len(shown), columns, figsize=(2 * columns, 2.3 * len(shown)), squeeze=False)
    for row, episode in zip(axes, shown, strict=True):
        for axis, step in zip(row, np.linspace(0, len(episode["image"]) - 1, columns).astype(int), strict=True):
            (pixels,), (decoded,) = images.decode_and_resize(tf.constant([episode["image"][step]]), 224)
            axis.imshow(pixels.numpy())
            axis.set_title(f"step {step}" if decoded else f"step {step}: broken", fontsize=8)
            axis.axis("off")
        row[0].text(0, -0.12, episode["language"][0].decode(), transform=row[0].transAxes, fontsize=9, va="top")
    figure.suptitle(f"{source.name}, as policies see it")
    figure.tight_layout()
    figure.savefig(paths[0], dpi=100)
    plt.close(figure)

    actions = np.concatenate([episode["action"] for episode in sample])
    figure, axes = plt.subplots(1, actions.shape[1], figsize=(2.2 * actions.shape[1], 2.4), squeeze=False)
    for i, axis in enumerate(axes[0]):
        axis.hist(actions[:, i], bins=50)
        axis.set_title(f"action {i}", fontsize=9)
        axis.tick_params(labelsize=7)
    figure.suptitle(
        f"{source.name}: {len(actions):,} steps of {len(sample)} episodes, before normalisation", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(paths[1], dpi=100)
    plt.close(figure)
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# validate
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found: level "ok", "warning" (look at it) or "error" (it cannot be trained on)."""

    check: str
    level: str
    detail: str


def validate(source: Source, episodes: int) -> list[Finding]:
    """Checks up to so many episodes from all over the train split, as the training stream will see them."""
    sample = list(itertools.islice(_episodes(source, seed=0), episodes))
    actions = [episode["action"] for episode in sample]
    stacked = np.concatenate(actions)
    findings = [
        Finding("episodes", "ok", f"{len(sample)} read, {len(stacked):,} steps"),
        *_lengths(sample),
        *_numbers(stacked, sample),
        *_language(sample),
        *_pictures(sample),
    ]
    if len(stacked):
        findings += [*_variance(stacked), *_idle(actions), *_gripper(source, actions)]
    return findings


def _episodes(source: Source, seed: int | None = None) -> Iterator[dict]:
    """Standardised episodes: image (encoded), action, language and, if there is one, proprio."""

    def columns(full: traj.Trajectory, _: tf.Tensor) -> dict:
        return {
            "image": full["observation"]["image_primary"],
            "action": full["action"],
            "proprio": full["observation"]["proprio"],
            "language": full["task"]["language_instruction"],
            "episode": full["episode"],
        }

    traced = pipeline.compose(source, load_proprio=True, then=columns)
    with explain_errors([source]):
        yield from read_episodes(traced, episode_ranges(source, "train"), seed=seed).as_numpy_iterator()


def _lengths(sample: Sequence[Mapping]) -> list[Finding]:
    lengths = [len(episode["action"]) for episode in sample]
    empty = lengths.count(0)
    if empty:
        return [Finding("empty episodes", "warning", f"{empty} of {len(sample)} have no steps; they are left out")]
    return [Finding("episode length", "ok", f"{min(lengths)} to {max(lengths)} steps, median {np.median(lengths):.0f}")]


def _numbers(actions: np.ndarray, sample: Sequence[Mapping]) -> list[Finding]:
    findings = []
    for name, values in (("action", actions), ("proprio", np.concatenate([e["proprio"] for e in sample]))):
        bad = np.argwhere(~np.isfinite(values))
        dimensions = sorted({int(dimension) for _, dimension in bad})
        if len(bad):
            detail = f"{len(bad)} values are NaN or infinite, in dimensions {dimensions}"
            findings.append(Finding(name, "error" if name == "action" else "warning", detail))
        else:
            findings.append(Finding(name, "ok", f"{values.shape[1]} dimensions, all finite"))
    return findings


def _variance(actions: np.ndarray) -> list[Finding]:
    finite = np.where(np.isfinite(actions), actions, 0.0)
    constant = [i for i in range(finite.shape[1]) if np.ptp(finite[:, i]) == 0]
    if constant:
        return [Finding("variance", "warning", f"dimensions {constant} never change: they are trained, and act, as 0")]
    return [Finding("variance", "ok", "every dimension of the action changes")]


def _idle(actions: Sequence[np.ndarray]) -> list[Finding]:
    """Frames in which nothing is done: no change, and the gripper as before."""
    stacked = np.concatenate(actions)
    moved = np.abs(stacked[:, :-1]) > 1e-3 * np.nanstd(stacked[:, :-1], axis=0).clip(1e-9)
    gripper = np.concatenate([np.abs(np.diff(a[:, -1], prepend=a[:1, -1])) > 1e-3 for a in actions])
    share = float(np.mean(~moved.any(axis=1) & ~gripper))
    level = "warning" if share > 0.2 else "ok"
    advice = ": a policy learns to stand still; drop them with a frame_filter" if level == "warning" else ""
    return [Finding("idle frames", level, f"{share:.1%} of the frames{advice}")]


def _gripper(source: Source, actions: Sequence[np.ndarray]) -> list[Finding]:
    """The last dimension, where it is absolute and not normalised: it should lie in [0, 1], with 1 for open."""
    if source.config.action_normalization_mask[-1] or not source.config.absolute_action_mask[-1]:
        return [Finding("gripper", "ok", "the last dimension is no gripper command (it is normalised): not checked")]
    values = np.concatenate([a[:, -1] for a in actions])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < -1e-3 or high > 1 + 1e-3:
        detail = f"values from {low:.3g} to {high:.3g}: 0 closed to 1 open is expected; fix the transform"
        return [Finding("gripper range", "warning", detail)]
    findings = [Finding("gripper range", "ok", f"{low:.3g} to {high:.3g}")]
    starts = np.array([a[0, -1] for a in actions if len(a)])
    closed = float(np.mean(starts < 0.5))
    if closed > 0.8 and high > 0.5:
        detail = f"{closed:.0%} of the episodes start closed (below 0.5): is 1 open here, or is it inverted?"
        findings.append(Finding("gripper polarity", "warning", detail))
    else:
        findings.append(Finding("gripper polarity", "ok", f"{1 - closed:.0%} of the episodes start open"))
    return findings


def _language(sample: Sequence[Mapping]) -> list[Finding]:
    texts = [text.decode(errors="replace").strip() for episode in sample for text in episode["language"]]
    empty = texts.count("")
    if empty == len(texts):
        return [Finding("language", "error", "no frame has an instruction: give one with fixed_instruction")]
    share = empty / len(texts)
    different = len(set(texts) - {""})
    return [
        Finding(
            "language",
            "warning" if share > 0.05 else "ok",
            f"{different} different instructions, {share:.1%} of the frames have none"
            + (" and are left out" if empty else ""),
        )
    ]


def _pictures(sample: Sequence[Mapping]) -> list[Finding]:
    """Four frames of each episode are decoded."""
    sizes: dict[tuple[int, ...], int] = {}
    broken, empty, warmth = [], 0, []
    for episode in sample:
        for step in (
            np.unique(np.linspace(0, len(episode["image"]) - 1, 4).astype(int)) if len(episode["image"]) else ()
        ):
            encoded = episode["image"][step]
            if encoded == b"":
                empty += 1
                continue
            try:
                pixels = images.decode(tf.constant(encoded)).numpy().astype(np.float32)
            except tf.errors.InvalidArgumentError:
                broken.append(f"{episode['episode'][step].decode()} step {step}")
                continue
            sizes[pixels.shape[:2]] = sizes.get(pixels.shape[:2], 0) + 1
            warmth.append(pixels[..., 0].mean() / max(pixels[..., 2].mean(), 1.0))
    findings = []
    if broken:
        detail = f"{len(broken)} sampled frames cannot be decoded, the first is {broken[0]}"
        findings.append(Finding("images", "error", f"{detail}: fix them, or set data.bad_images=skip"))
    if empty:
        findings.append(Finding("images", "warning", f"{empty} sampled frames are empty; they are trained as black"))
    if sizes:
        seen = ", ".join(f"{h}x{w}" for h, w in sorted(sizes))
        findings.append(Finding("image size", "ok" if len(sizes) == 1 else "warning", f"{seen} (height x width)"))
        cold = float(np.mean(np.array(warmth) < 0.85))
        if cold > 0.8:
            detail = f"blue outweighs red in {cold:.0%} of the sampled frames: were they written as BGR (OpenCV)?"
            findings.append(Finding("colour order", "warning", detail))
        else:
            findings.append(Finding("colour order", "ok", f"red / blue is {np.median(warmth):.2f} on average"))
    return findings


def report(name: str, findings: Sequence[Finding]) -> str:
    """A line per finding."""
    width = max(len(finding.check) for finding in findings)
    return "\n".join([f"{name}:", *(f"  {f.level:<8} {f.check:<{width}}  {f.detail}" for f in findings)])
