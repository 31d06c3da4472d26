"""Looking at datasets before training on them: what is in them, and what is suspicious about it."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from openvla_jax.data import DataError, SplitNotFoundError, images, pipeline, statistics, text
from openvla_jax.data import trajectory as traj
from openvla_jax.data.episodes import Traced, explain_errors, read_episodes
from openvla_jax.data.source import Source, episode_ranges
from openvla_jax.errors import InputError

_NONE_HELD_OUT = (
    "no episodes are held out: hold some out in a split 'val' (--val_share at conversion), or set train.eval_every=0"
)
_REACHED = 0.9  # of its range: a gripper that never comes so far may have another range

# ---------------------------------------------------------------------------------------------------------------------
# inspect
# ---------------------------------------------------------------------------------------------------------------------


def describe(source: Source, stats: Mapping) -> str:
    """Where a dataset was found, its schema, what is used of it, its episodes and its statistics, as text."""
    config = source.config
    used = {split: _count(source, split) for split in ("train", "val")}
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
    """Writes frames of the first episodes and histograms of their actions as PNG; returns the paths.

    Raises DataError for an instruction that is not text, and if all these episodes are empty.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    view = next(iter(_views(source)))
    sample = list(itertools.islice(_episodes(source, _traced(source), "train"), episodes))
    sample = [episode for episode in sample if len(episode["action"])]
    if not sample:
        raise DataError(f"dataset {source.name!r}: the first {episodes} episodes have no steps: nothing to draw")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{source.name}_frames.png", folder / f"{source.name}_actions.png"]

    shown, columns = sample[:4], 6
    figure, axes = plt.subplots(len(shown), columns, figsize=(2 * columns, 2.3 * len(shown)), squeeze=False)
    for row, episode in zip(axes, shown, strict=True):
        frames = episode[f"image_{view}"]
        for axis, step in zip(row, np.linspace(0, len(frames) - 1, columns).astype(int), strict=True):
            (pixels,), (decoded,) = images.decode_and_resize(tf.constant([frames[step]]), 224)
            axis.imshow(pixels.numpy())
            axis.set_title(f"step {step}" if decoded else f"step {step}: broken", fontsize=8)
            axis.axis("off")
        instruction = text.literal(_instruction(source, episode, 0))
        row[0].text(0, -0.12, instruction, transform=row[0].transAxes, fontsize=9, va="top")
    figure.suptitle(text.literal(f"{source.name}, as policies see it"))
    figure.tight_layout()
    figure.savefig(paths[0], dpi=100)
    plt.close(figure)

    actions = np.concatenate([episode["action"] for episode in sample])
    figure, axes = plt.subplots(1, actions.shape[1], figsize=(2.2 * actions.shape[1], 2.4), squeeze=False)
    for i, axis in enumerate(axes[0]):
        axis.hist(actions[:, i], bins=50)
        axis.set_title(f"action {i}", fontsize=9)
        axis.tick_params(labelsize=7)
    title = f"{source.name}: {len(actions):,} steps of {len(sample)} episodes, before normalisation"
    figure.suptitle(text.literal(title), fontsize=10)
    figure.tight_layout()
    figure.savefig(paths[1], dpi=100)
    plt.close(figure)
    return paths


def _instruction(source: Source, episode: Mapping, step: int) -> str:
    """One instruction, as training reads it; "" if it has none and training leaves the frame out."""
    raw = episode["language"][step]
    try:
        return text.decode(raw) if raw.strip() else ""
    except InputError as error:
        raise DataError(f"dataset {source.name!r}, {_place(episode, step)}: {error}") from error


def _place(episode: Mapping, step: int) -> str:
    return f"episode {episode['episode'][step].decode()}, step {episode['step'][step]}"


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _views(source: Source) -> list[str]:
    """The cameras that the dataset has, first the one that policies see unless they name others."""
    present = [view for view, key in source.config.image_keys.items() if key]
    return sorted(present, key=lambda view: view != "primary")


def _traced(source: Source) -> Traced:
    """What is looked at of an episode: image_<view> (encoded), action, proprio, language, episode and step."""

    def columns(full: traj.Trajectory, _: tf.Tensor) -> dict:
        return {
            **{f"image_{view}": full["observation"][f"image_{view}"] for view in _views(source)},
            "action": full["action"],
            "proprio": full["observation"]["proprio"],
            "language": full["task"]["language_instruction"],
            "episode": full["episode"],
            "step": full["step"],
        }

    return pipeline.compose(source, views=_views(source), load_proprio=True, then=columns)


def _episodes(source: Source, traced: Traced, split: str, seed: int | None = None) -> Iterator[dict]:
    with explain_errors([source]):
        yield from read_episodes(traced, episode_ranges(source, split), seed=seed).as_numpy_iterator()


def _count(source: Source, split: str) -> int:
    """Episodes of a split, 0 if there are none."""
    try:
        return sum(run.take for run in episode_ranges(source, split))
    except SplitNotFoundError:
        return 0


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
    """Checks up to so many episodes from all over the train split, and as many of those held out.

    Episodes are read as training reads them. What training stops at is an error, found by the same functions. Of the
    episodes held out errors alone are reported.
    """
    read = _Reader(source, episodes)
    sample, whole_val = read("train"), _count(source, "val")
    held_out = read("val") if whole_val else []
    actions = [episode["action"] for episode in sample]
    stacked = np.concatenate(actions)
    whole = _count(source, "train")
    findings = [
        _complete("episodes", sample, min(episodes, whole), f" of {whole:,}" if len(sample) < whole else ""),
        *_lengths(sample),
        *_strict(source, sample),
        *_grippers(source, [*sample, *held_out]),
    ]
    if len(stacked):
        findings += [*_variance(stacked), *_idle(actions), *_gripper_polarity(source, actions)]
    if not whole_val:
        return [*findings, Finding("validation", "warning", _NONE_HELD_OUT)]
    errors = [finding for finding in _strict(source, held_out) if finding.level == "error"]
    return [
        *findings,
        _complete("validation", held_out, min(episodes, whole_val), f" of {whole_val:,} held out"),
        *(dataclasses.replace(finding, check=f"validation: {finding.check}") for finding in errors),
    ]


def _strict(source: Source, sample: Sequence[Mapping]) -> list[Finding]:
    """What training stops at, but for grippers."""
    return [*_numbers(sample), *_language(source, sample), *_pictures(sample)]


def _complete(check: str, sample: Sequence[Mapping], expected: int, of: str) -> Finding:
    if len(sample) < expected:
        detail = f"{expected - len(sample)} episodes fewer than dataset_info.json says: is the download complete?"
        return Finding(check, "error", detail)
    return Finding(check, "ok", f"{len(sample)}{of} read, {sum(len(e['action']) for e in sample):,} steps")


def _lengths(sample: Sequence[Mapping]) -> list[Finding]:
    lengths = [len(episode["action"]) for episode in sample]
    empty = lengths.count(0)
    if empty:
        return [Finding("empty episodes", "warning", f"{empty} of {len(sample)} have no steps; they are left out")]
    return [Finding("episode length", "ok", f"{min(lengths)} to {max(lengths)} steps, median {np.median(lengths):.0f}")]


def _numbers(sample: Sequence[Mapping]) -> list[Finding]:
    findings = []
    for what, name in (("action", "action"), ("proprio", "state")):
        values = np.concatenate([episode[what] for episode in sample])
        bad = np.argwhere(~np.isfinite(values))
        dimensions = sorted({int(dimension) for _, dimension in bad})
        if len(bad):
            detail = f"{len(bad)} values are NaN or infinite, in dimensions {dimensions}"
            findings.append(Finding(name, "error", detail))
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


def _grippers(source: Source, sample: Sequence[Mapping]) -> list[Finding]:
    """Gripper commands that a description declares: in their range, and opening and closing at some time."""
    findings = []
    for what, name in (("action", "gripper"), ("proprio", "gripper in the state")):
        for dimension, (closed, opened) in source.config.grippers.get(what, {}).items():
            values = np.concatenate([episode[what][:, dimension] for episode in sample])
            values = values[np.isfinite(values)]
            if len(values):
                findings.append(_gripper_use(f"{name} {dimension}", values, closed, opened))
    return findings


def _gripper_use(check: str, values: np.ndarray, closed: float, opened: float) -> Finding:
    """values: 0, closed, to 1, open; `closed` and `opened` are those in the data's units."""
    least, most = float(values.min()), float(values.max())
    low, high = sorted(closed + end * (opened - closed) for end in (least, most))
    seen = f"values from {low:.4g} to {high:.4g}, declared as {closed:g} closed, {opened:g} open"
    advice = f"declare gripper_range=(closed, open) in the data's units, ({low:.4g}, {high:.4g}) or the reverse"
    if least < -statistics.GRIPPER_TOLERANCE or most > 1 + statistics.GRIPPER_TOLERANCE:
        return Finding(check, "error", f"{seen}: outside this range; {advice}")
    if most < 0.5 or least > 0.5:
        never = "opens" if most < 0.5 else "closes"
        return Finding(check, "error", f"{seen}: never {never}; {advice}, or no gripper if it is not used")
    if most < _REACHED or least > 1 - _REACHED:
        return Finding(check, "warning", f"{seen}: never fully {'open' if most < _REACHED else 'closed'}; {advice}")
    return Finding(check, "ok", seen)


def _gripper_polarity(source: Source, actions: Sequence[np.ndarray]) -> list[Finding]:
    """The last dimension, if it is absolute and not normalised: it should lie in [0, 1], with 1 for open."""
    if source.config.action_normalization_mask[-1] or not source.config.absolute_action_mask[-1]:
        return [Finding("gripper", "ok", "the last dimension is no gripper command (it is normalised): not checked")]
    values = np.concatenate([a[:, -1] for a in actions])
    values = values[np.isfinite(values)]
    if not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    findings = []
    if not any(source.config.grippers.values()):  # else `_grippers` has checked it
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


def _language(source: Source, sample: Sequence[Mapping]) -> list[Finding]:
    """Empty texts are left out by training; it stops at others that it cannot read."""
    first: dict[bytes, tuple[Mapping, int]] = {}  # text -> where it comes first
    empty = frames = 0
    for episode in sample:
        for step, raw in enumerate(episode["language"]):
            frames += 1
            if raw.strip():
                first.setdefault(raw, (episode, step))
            else:
                empty += 1
    if empty == frames:
        return [Finding("language", "error", "no frame has an instruction: give one with fixed_instruction")]
    strange = []
    for episode, step in first.values():
        try:
            if reason := text.suspicion(_instruction(source, episode, step)):
                strange.append(f"{_place(episode, step)}: {episode['language'][step].decode()[:60]!r} {reason}")
        except DataError as error:
            return [Finding("language", "error", str(error))]
    share = empty / frames
    detail = f"{len(first)} different instructions, {share:.1%} of the frames have none"
    detail += " and are left out" if empty else ""
    found = [Finding("language", "warning" if share > 0.05 else "ok", detail)]
    if strange:
        found.append(Finding("text", "warning", f"{len(strange)} instructions are strange, the first in {strange[0]}"))
    return found


class _Reader:
    """Reads episodes of a split, and looks at their pictures at once: kept, they would fill the memory.

    All are decoded; of four of each camera, sizes and colours are noted. "pictures" of an episode says what was seen.
    """

    def __init__(self, source: Source, episodes: int):
        self.source, self.episodes, self.traced = source, episodes, _traced(source)
        self.decodable = tf.function(images.decodable, input_signature=[tf.TensorSpec([None], tf.string)])

    def __call__(self, split: str) -> list[dict]:
        return [
            {key: value for key, value in episode.items() if not key.startswith("image_")}
            | {"pictures": [self._camera(episode, view) for view in _views(self.source)]}
            for episode in itertools.islice(_episodes(self.source, self.traced, split, seed=0), self.episodes)
        ]

    def _camera(self, episode: Mapping, view: str) -> dict:
        frames = episode[f"image_{view}"]
        good = self.decodable(tf.constant(frames, tf.string)).numpy() if len(frames) else np.ones(0, bool)
        broken = [
            f"{_place(episode, step)}, camera {view!r} ({images.reason(frames[step])})"
            for step in np.flatnonzero(~good)[:1].tolist()
        ]
        sizes, warmth = [], []
        for step in np.unique(np.linspace(0, len(frames) - 1, 4).astype(int)) if len(frames) else ():
            if good[step] and frames[step]:
                pixels = images.decode(tf.constant(frames[step])).numpy().astype(np.float32)
                sizes.append(pixels.shape[:2])
                warmth.append(pixels[..., 0].mean() / max(pixels[..., 2].mean(), 1.0))
        empty = sum(frame == b"" for frame in frames)
        return {"broken": broken, "count": int((~good).sum()), "empty": empty, "sizes": sizes, "warmth": warmth}


def _pictures(sample: Sequence[Mapping]) -> list[Finding]:
    looked = [camera for episode in sample for camera in episode["pictures"]]
    broken = [place for camera in looked for place in camera["broken"]]
    sizes = {size for camera in looked for size in camera["sizes"]}
    warmth = np.array([value for camera in looked for value in camera["warmth"]])
    findings = []
    if broken:
        count = sum(camera["count"] for camera in looked)
        detail = f"{count} frames cannot be decoded, the first is {broken[0]}"
        findings.append(Finding("images", "error", f"{detail}: fix them, or set data.bad_images=skip"))
    if empty := sum(camera["empty"] for camera in looked):
        findings.append(Finding("images", "warning", f"{empty} frames are empty; they are trained as black"))
    if sizes:
        seen = ", ".join(f"{h}x{w}" for h, w in sorted(sizes))
        findings.append(Finding("image size", "ok" if len(sizes) == 1 else "warning", f"{seen} (height x width)"))
        cold = float(np.mean(warmth < 0.85))
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
