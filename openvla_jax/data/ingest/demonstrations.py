"""Demonstrations from other formats -> a TFDS/RLDS dataset with the file that describes it to training."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from openvla_jax.data import DataError
from openvla_jax.data.ingest.writer import FLAGS, encode, flags, write_dataset

VERSION = "1.0.0"
_ON_WRIST = "wrist|hand|grip|arm|eef|effector"  # in the name of a camera that moves with the robot


@dataclass(frozen=True)
class Episode:
    """One demonstration of T steps. cameras: view -> uint8 [H, W, 3] for each step, drawn one after the other.
    action, state: float32 [T, D]; state may have no columns. instructions: of each step. depth: view -> uint16 [H, W]
    for each step."""

    cameras: Mapping[str, Iterable[np.ndarray]]
    action: np.ndarray
    state: np.ndarray
    instructions: Sequence[str]
    depth: Mapping[str, Iterable[np.ndarray]] = field(default_factory=dict)


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

    count: how many episodes there are. val_share: this share of them, at least one, evenly spread, becomes the split
    "val"; with 0, training holds out the last 20th by itself. primary: the camera that policies see, if it is not
    obvious. Raises DataError for a name that is no Python identifier, for an episode that differs from the first in
    its cameras or widths, and where a description exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise DataError(f"dataset name {name!r}: use small letters, digits and _ (--name)")
    if not 0 <= val_share < 1:
        raise DataError(f"a share of {val_share} of the episodes for validation: give one from 0 to below 1")
    description = folder / f"{name}.py"
    if description.exists():
        raise FileExistsError(f"{description} exists already: remove it, or choose another --name")
    held_out = set(np.linspace(0, count - 1, max(round(count * val_share), 1)).astype(int)) if val_share else set()
    numbered = enumerate(episodes)
    try:
        _, first = next(numbered)
    except StopIteration:
        raise DataError(f"{source} has no episodes") from None
    widths = first.action.shape[1], first.state.shape[1]
    primary = primary_view(list(first.cameras), primary, source)

    # One pass over the source must serve both splits: those held out are kept, encoded, until the others are written.
    kept: list[dict] = []

    def examples() -> Iterator[dict]:
        for number, episode in _chained((0, first), numbered):
            if sorted(episode.cameras) != sorted(first.cameras):
                seen, known = sorted(episode.cameras), sorted(first.cameras)
                raise DataError(f"{source}: episode {number} has cameras {seen}, the first {known}")
            if (episode.action.shape[1], episode.state.shape[1]) != widths:
                raise DataError(
                    f"{source}: episode {number} has actions and states of widths {episode.action.shape[1]} and "
                    f"{episode.state.shape[1]}, the first {widths[0]} and {widths[1]}"
                )
            example = _example(episode, f"{source}: episode {number}")
            if number in held_out:
                kept.append(example)
            else:
                yield example

    observation: dict[str, Any] = {
        view: tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg") for view in first.cameras
    }
    for view in first.depth:
        observation[view] = tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
    if widths[1]:
        observation["state"] = tfds.features.Tensor(shape=(widths[1],), dtype=np.float32)
    step = {
        "observation": observation,
        "action": tfds.features.Tensor(shape=(widths[0],), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        **FLAGS,
    }
    directory = write_dataset(
        folder / name / VERSION,
        {"steps": tfds.features.Dataset(step)},
        {"train": examples()} | ({"val": kept} if held_out else {}),
        description=f"Converted from {source}.",
        episodes_per_file=max(1, min(100, count // 16)),
        progress=_Progress(count),
    )
    description.write_text(_module(name, primary, sorted(first.cameras), sorted(first.depth), *widths))
    return directory, description


def _chained(first: tuple[int, Episode], rest: Iterator[tuple[int, Episode]]) -> Iterator[tuple[int, Episode]]:
    yield first
    yield from rest


def _example(episode: Episode, where: str) -> dict:
    length = len(episode.action)
    if length == 0:
        raise DataError(f"{where} has no steps")
    if len(episode.state) != length:
        raise DataError(f"{where} has {length} actions and {len(episode.state)} states")
    for what, values in (("action", episode.action), ("state", episode.state)):
        if not np.isfinite(values).all():
            raise DataError(f"{where}: {what} is NaN or infinite at step {np.argwhere(~np.isfinite(values))[0][0]}")
    frames = {}
    for view, images in episode.cameras.items():
        frames[view] = [encode(_checked(image, f"{where}, camera {view!r}"), "JPEG") for image in images]
    for view, images in episode.depth.items():
        frames[view] = [encode(image) for image in images]
    for view in frames:
        if len(frames[view]) != length:
            raise DataError(f"{where} has {length} actions and {len(frames[view])} frames of camera {view!r}")
    state = [{"state": row} for row in episode.state.astype(np.float32)] if episode.state.shape[1] else [{}] * length
    return {
        "steps": [
            {
                "observation": {**{view: frames[view][t] for view in frames}, **state[t]},
                "action": episode.action[t].astype(np.float32),
                "language_instruction": episode.instructions[t],
                **flags(t, length),
            }
            for t in range(length)
        ]
    }


def _checked(image: np.ndarray, where: str) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"{where}: a frame is {image.dtype} {list(image.shape)}, not uint8 [height, width, 3]")
    return image


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


def _module(name: str, primary: str, views: list[str], depth: list[str], action: int, state: int) -> str:
    cameras = {"primary": primary} | {view: view for view in views if view != primary}
    return f'''"""{name}: check what is marked below, then train with --config.data.module=THIS FILE."""

from openvla_jax.data.custom import Columns, describe

DATASETS = [
    describe(
        {json.dumps(name)},
        cameras={json.dumps(cameras)},  # policies see the primary one
{f"        depth={json.dumps({view: view for view in depth})}," + chr(10) if depth else ""}\
{f'        state=[Columns("observation/state", 0, {state})],' + chr(10) if state else ""}\
        # CHECK: absolute=True for targets (joint angles, say), and the gripper's column and polarity, as in
        # Columns("action", {action - 1}, gripper="1 is open").
        action=[Columns("action", 0, {action})],
    ),
]
'''
