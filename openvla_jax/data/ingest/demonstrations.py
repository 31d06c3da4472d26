"""Demonstrations from other formats -> a TFDS/RLDS dataset with the file that describes it to training."""

import dataclasses
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from openvla_jax.data import DataError, text
from openvla_jax.data.ingest import writer
from openvla_jax.data.ingest.writer import FLAGS, all_or_nothing, encode, flags, write_interleaved, writing
from openvla_jax.storage import atomic_write

VERSION = "1.0.0"
_JPEG_SIDE = 65500  # pixels
_ON_WRIST = "wrist|hand|grip|arm|eef|effector"  # in the name of a camera that moves with the robot


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration of T steps.

    cameras: view -> uint8 [H, W, 3] for each step, drawn one after the other.
    depth: view -> uint16 [H, W] for each step, likewise.
    action, state: float32 [T, D]; state may have no columns.
    instructions: a text of each step, or one for all; what readers take from files is checked (`text.instructions`).
    """

    cameras: Mapping[str, Iterable[np.ndarray]]
    action: np.ndarray
    state: np.ndarray
    instructions: Any
    depth: Mapping[str, Iterable[np.ndarray]] = dataclasses.field(default_factory=dict)


def write(
    folder: Path,
    name: str,
    episodes: Iterable[Episode],
    count: int,
    val_share: float,
    source: str,
    primary: str | None = None,
) -> tuple[Path, Path]:
    """Writes folder/<name>/1.0.0, and folder/<name>.py with its description; returns both paths.

    One frame of each camera is held at a time, and encoded episodes as `writer.write_interleaved` says.

    Args:
        folder: where both are written; after an error nothing is left of them.
        name: of the dataset.
        episodes: drawn one after the other.
        count: how many there are.
        val_share: this share of them, at least one, evenly spread, becomes the split "val"; with 0, training holds out
            the last 20th by itself.
        source: names the demonstrations in messages.
        primary: the camera that policies see, if it is not obvious.

    Raises:
        FileExistsError: there is such a dataset or description.
        DataError: a name that is no Python identifier; a share that leaves nothing to train on; an episode that is too
            long, holds bad values, or differs from the first in its cameras or widths; a disk that cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(f"dataset name {name!r}: use small letters, digits and _ (--name)")
    description = folder / f"{name}.py"
    if description.exists():
        raise FileExistsError(f"{description} exists already: remove it, or choose another --name")
    held_out = _held_out(count, val_share)
    numbered = enumerate(episodes)
    try:
        _, first = next(numbered)
    except StopIteration:
        raise DataError(f"{source} has no episodes") from None
    _check_views((*first.cameras, *first.depth), source)
    primary = primary_view(list(first.cameras), primary, source)
    ranges = _Ranges()

    def examples() -> Iterator[tuple[str, dict]]:
        for number, episode in itertools.chain([(0, first)], numbered):
            where = f"{source}: episode {number}"
            _check_alike(episode, first, where)
            ranges.note(episode.action)
            yield "val" if number in held_out else "train", _example(episode, where)

    directory = folder / name / VERSION
    with all_or_nothing(directory):
        write_interleaved(
            directory,
            {"steps": tfds.features.Dataset(_step_features(first))},
            ["train", "val"] if held_out else ["train"],
            examples(),
            description=f"Converted from {source}.",
            episodes_per_file=max(1, min(100, count // 16)),
            progress=_Progress(count),
        )
        with writing(description):
            atomic_write(description, _module(name, primary, first, ranges))
    return directory, description


def _held_out(count: int, val_share: float) -> set[int]:
    """The episodes of the split "val"."""
    if not 0 <= val_share < 1:
        raise DataError(f"a share of {val_share} of the episodes for validation: give one from 0 to below 1")
    if not val_share:
        return set()
    held_out = set(np.linspace(0, count - 1, max(round(count * val_share), 1)).astype(int).tolist())
    if len(held_out) >= count:
        raise DataError(
            f"a share of {val_share} of {count} episodes for validation leaves none to train on: lower --val_share"
        )
    return held_out


def _check_views(views: Iterable[str], source: str) -> None:
    """Raises DataError for a camera whose name cannot be a key of an observation."""
    for view in views:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", view) or view == "state":
            raise DataError(f"{source}: camera {view!r}: use letters, digits, _ and -, and not 'state'")


def _check_alike(episode: Episode, first: Episode, where: str) -> None:
    views, firsts = (sorted((*one.cameras, *one.depth)) for one in (episode, first))
    if views != firsts:
        raise DataError(f"{where} has cameras {views}, the first {firsts}")
    widths, known = ((one.action.shape[1], one.state.shape[1]) for one in (episode, first))
    if widths != known:
        raise DataError(
            f"{where} has actions and states of widths {widths[0]} and {widths[1]}, the first {known[0]} and {known[1]}"
        )


def _step_features(first: Episode) -> dict[str, Any]:
    observation: dict[str, Any] = {
        view: tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg") for view in first.cameras
    }
    for view in first.depth:
        observation[view] = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
    if first.state.shape[1]:
        observation["state"] = tfds.features.Tensor(shape=(first.state.shape[1],), dtype=np.float32)
    return {
        "observation": observation,
        "action": tfds.features.Tensor(shape=(first.action.shape[1],), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        **FLAGS,
    }


def _example(episode: Episode, where: str) -> dict:
    length = len(episode.action)
    if length == 0:
        raise DataError(f"{where} has no steps")
    if len(episode.state) != length:
        raise DataError(f"{where} has {length} actions and {len(episode.state)} states")
    for what, values in (("action", episode.action), ("state", episode.state)):
        if not np.isfinite(values).all():
            raise DataError(f"{where}: {what} is NaN or infinite at step {np.argwhere(~np.isfinite(values))[0][0]}")
    texts = text.instructions(episode.instructions, length, where)
    frames = _encoded(episode, length, where)
    state = [{"state": row} for row in episode.state.astype(np.float32)] if episode.state.shape[1] else [{}] * length
    return {
        "steps": [
            {
                "observation": {**{view: frames[view][t] for view in frames}, **state[t]},
                "action": episode.action[t].astype(np.float32),
                "language_instruction": texts[t],
                **flags(t, length),
            }
            for t in range(length)
        ]
    }


def _encoded(episode: Episode, length: int, where: str) -> dict[str, list[io.BytesIO]]:
    """The frames as JPEG, depth as PNG, by camera. Ends as soon as they no longer fit a record."""
    frames: dict[str, list[io.BytesIO]] = {}
    held, cameras = 0, {**episode.cameras, **episode.depth}
    for view, images in cameras.items():
        frames[view] = []
        for image in images:
            jpeg = view in episode.cameras
            frames[view].append(_jpeg(image, f"{where}, camera {view!r}") if jpeg else encode(image))
            held += frames[view][-1].getbuffer().nbytes
            if held > writer.MAX_EPISODE_BYTES:
                share = sum(map(len, frames.values())) / (length * len(cameras))  # of the frames, so far
                raise DataError(writer.too_long(where, length, held / min(share, 1.0)))
        if len(frames[view]) != length:
            raise DataError(f"{where} has {length} actions and {len(frames[view])} frames of camera {view!r}")
    return frames


def _jpeg(image: np.ndarray, where: str) -> io.BytesIO:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise DataError(f"{where}: a frame is {image.dtype} {list(image.shape)}, not uint8 [height, width, 3]")
    if max(image.shape) > _JPEG_SIDE:
        raise DataError(f"{where}: a frame is {list(image.shape)}, and JPEG has {_JPEG_SIDE} pixels a side: shrink it")
    return encode(image, "JPEG")


class _Ranges:
    """The smallest and largest value of each dimension of the actions."""

    def __init__(self) -> None:
        self.low = self.high = np.array([])

    def note(self, values: np.ndarray) -> None:
        if not len(values):
            return
        low, high = values.min(axis=0), values.max(axis=0)
        self.low, self.high = (np.minimum(self.low, low), np.maximum(self.high, high)) if self.low.size else (low, high)


class _Progress:
    """Tells how far a conversion is, a line for each tenth."""

    def __init__(self, count: int):
        self.count, self.told = count, 0

    def __call__(self, done: int) -> None:
        tenth = 10 * done // max(self.count, 1)
        if tenth > self.told:
            self.told = tenth
            print(f"{done} of {self.count} episodes", flush=True)


def primary_view(views: Sequence[str], asked: str | None, source: str) -> str:
    """Returns the camera that policies see: the one asked for, else one called "primary", else the only one that is
    not on a wrist. Raises DataError if that is no camera or several."""
    if asked is not None and asked not in views:
        raise DataError.of(source, f"has no camera {asked!r}", f"--primary may be {', '.join(views)}")
    if "primary" in views:
        if asked not in (None, "primary"):
            raise DataError.of(source, "a camera is called 'primary' already", "give --primary primary, or rename it")
        return "primary"
    fixed = [view for view in views if not re.search(_ON_WRIST, view, re.IGNORECASE)]
    candidates = [asked] if asked else list(views) if len(views) == 1 else fixed
    if len(candidates) != 1:
        known = ", ".join(views)
        raise DataError.of(source, f"has cameras {known}", "name the one that policies see with --primary")
    return candidates[0]


def _module(name: str, primary: str, first: Episode, ranges: _Ranges) -> str:
    views, depth = sorted(first.cameras), {view: view for view in sorted(first.depth)}
    action, state = first.action.shape[1], first.state.shape[1]
    cameras = {"primary": primary} | {view: view for view in views if view != primary}
    return f'''"""{name}: check what is marked below, then train with --config.data.module=THIS FILE."""

from openvla_jax.data.custom import Columns, describe

DATASETS = [
    describe(
        {json.dumps(name)},
        cameras={json.dumps(cameras)},  # policies see the primary one
{f"        depth={json.dumps(depth)}," + chr(10) if depth else ""}\
{f'        state=[Columns("observation/state", 0, {state})],' + chr(10) if state else ""}\
        # CHECK: absolute=True for targets (joint angles, say), and the gripper's column and polarity, as in
        # Columns("action", {action - 1}, gripper="1 is open"), or gripper_range=(closed, open) for other units.
        # Column {action - 1} goes from {ranges.low[-1]:.4g} to {ranges.high[-1]:.4g}.
        action=[Columns("action", 0, {action})],
    ),
]
'''
