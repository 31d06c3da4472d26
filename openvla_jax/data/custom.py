"""Datasets that users describe in a file of their own, named by `data.module`; docs/data.md has an example.

Such a file defines DATASETS, a list of `describe(...)` or DatasetConfig, and may define MIXTURES, a dict of (dataset,
weight) pairs. Its names join those of Open X-Embodiment.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from openvla_jax.data import DataError, text
from openvla_jax.data.oxe.datasets import DATASETS, DatasetConfig, Trajectory
from openvla_jax.data.oxe.mixtures import MIXTURES, Mixture
from openvla_jax.data.oxe.state import StateEncoding
from openvla_jax.data.statistics import GRIPPER_TOLERANCE

# How a gripper command is written: its values when closed and when open.
GRIPPERS: dict[str, tuple[float, float]] = {
    "1 is open": (0.0, 1.0),
    "0 is open": (1.0, 0.0),
    "1 is open, -1 closed": (-1.0, 1.0),
    "-1 is open, 1 closed": (1.0, -1.0),
}


@dataclass(frozen=True)
class Columns:
    """Columns start to stop (excluded) of a raw feature, or column start alone; a feature of shape [] has one column.

    Args:
        key: path in a step, "action" or "observation/joints".
        start, stop: the columns.
        absolute: a target, not a change; at the end of an episode it is repeated, where a change becomes 0.
        normalize: by the dataset's statistics.
        gripper: a gripper command, written as one of GRIPPERS. It becomes 1 = open, 0 = closed, and is absolute and not
            normalised. Values beyond, by more than 5% of the range, end training (see `statistics.check_grippers`).
        gripper_range: the same for other units: the command's values when (closed, open), such as (0, 100) for percent,
            (0, 0.08) for metres, or (850, 0).
    """

    key: str
    start: int = 0
    stop: int | None = None
    absolute: bool = False
    normalize: bool = True
    gripper: str | None = None
    gripper_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.gripper is not None and self.gripper not in GRIPPERS:
            raise DataError(
                f"gripper {self.gripper!r} is unknown: one of {', '.join(map(repr, GRIPPERS))}; for other units give "
                f"gripper_range=(closed, open)"
            )
        if self.gripper_range is not None:
            if self.gripper is not None:
                raise DataError(f"column {self.start} of {self.key!r} has gripper and gripper_range: give one of them")
            _check_range(self.gripper_range)
        if self.start < 0 or self.width < 1:
            raise DataError(f"columns {self.start}:{self.stop} of {self.key!r} are none: count from 0, stop excluded")

    @property
    def width(self) -> int:
        return 1 if self.stop is None else self.stop - self.start

    @property
    def closed_open(self) -> tuple[float, float] | None:
        """A gripper's values when closed and when open, in the data's units; None for other columns."""
        return self.gripper_range if self.gripper is None else GRIPPERS[self.gripper]

    @property
    def names(self) -> tuple[str, ...]:
        """What a policy's `ObservationSpec.state` calls these columns: "joints_0", "joints_1", ..."""
        return tuple(f"{self.key.removeprefix('observation/')}_{self.start + i}" for i in range(self.width))

    def read(self, step: Mapping) -> tf.Tensor:
        """float32 [T, columns] of a raw trajectory."""
        values = tf.cast(_find(step, self.key), tf.float32)
        if values.shape.rank == 1:
            values = values[:, None]
        stop = self.start + self.width
        if values.shape.rank != 2 or values.shape[1] is None or stop > values.shape[1]:
            raise DataError(
                f"columns {self.start}:{stop} of {self.key!r} do not fit its shape {values.shape.as_list()}"
            )
        values = values[:, self.start : stop]
        return values if self.closed_open is None else _opening(values, *self.closed_open)


def _check_range(ends: Any) -> None:
    numbers = isinstance(ends, Sequence) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
    if not numbers or not all(map(math.isfinite, ends)) or ends[0] == ends[1]:
        raise DataError(f"gripper_range is {ends!r}: give two different numbers, (closed, open), in the data's units")


def _opening(values: tf.Tensor, closed: float, opened: float) -> tf.Tensor:
    """0 for closed to 1 for open. Values a little beyond are clipped; further ones stay, to be found."""
    opening = (values - closed) / (opened - closed)
    clipped = tf.clip_by_value(opening, 0.0, 1.0)
    return tf.where(tf.abs(opening - clipped) <= GRIPPER_TOLERANCE, clipped, opening)


def describe(
    name: str,
    *,
    cameras: Mapping[str, str],
    action: Sequence[Columns],
    state: Sequence[Columns] = (),
    instruction: str = "language_instruction",
    fixed_instruction: str | None = None,
    depth: Mapping[str, str] | None = None,
    transform: Callable[[Trajectory], Trajectory] | None = None,
    frame_filter: Callable[[Trajectory], tf.Tensor] | None = None,
) -> DatasetConfig:
    """A dataset by its keys.

    cameras, depth: view -> key of the observation ("image", or "cameras/front"); policies see "primary" unless their
    `ObservationSpec` names others. action, state: what they consist of, in order; a state is not needed, and its
    columns are called as in `Columns.names`. instruction: where the text is; fixed_instruction: the text of every
    step, if the data carry none. transform: runs first, raw trajectory -> raw trajectory with whatever else must be
    done, in TensorFlow operations. frame_filter: see DatasetConfig. Raises DataError if there is no action or camera.
    """
    if not action:
        raise DataError(f"dataset {name!r}: no action columns")
    if not cameras:
        raise DataError(f"dataset {name!r}: no cameras: give at least one, as in cameras={{'primary': 'image'}}")
    if fixed_instruction is not None:
        (fixed_instruction,) = text.instructions(fixed_instruction, 1, f"dataset {name!r}: fixed_instruction")

    def standard(trajectory: Trajectory) -> Trajectory:
        trajectory = transform(trajectory) if transform else trajectory
        views = {**cameras, **{f"depth_{view}": key for view, key in (depth or {}).items()}}
        observation = {f"{view}_frames": _find(trajectory, f"observation/{key}") for view, key in views.items()}
        if state:
            observation["state"] = tf.concat([columns.read(trajectory) for columns in state], axis=1)
        full = tf.concat([columns.read(trajectory) for columns in action], axis=1)
        if fixed_instruction is None:
            language = _find(trajectory, instruction)
        else:
            language = tf.fill(tf.shape(full)[:1], fixed_instruction)
        kept = {key: trajectory[key] for key in ("_frame_index",) if key in trajectory}
        return {"observation": observation, "action": full, "language_instruction": language, **kept}

    return DatasetConfig(
        name=name,
        image_keys={view: f"{view}_frames" for view in cameras},
        depth_keys={view: f"depth_{view}_frames" for view in depth or {}},
        state_keys=("state",) if state else (None,),
        state_encoding=StateEncoding.NONE,
        state_columns=tuple(name for columns in state for name in columns.names),
        action_encoding=None,
        transform=standard,
        frame_filter=frame_filter,
        action_masks=(
            _per_dimension(action, lambda columns: columns.absolute or columns.closed_open is not None),
            _per_dimension(action, lambda columns: columns.normalize and columns.closed_open is None),
        ),
        grippers={"action": _grippers(action), "proprio": _grippers(state)},
    )


def _grippers(parts: Sequence[Columns]) -> dict[int, tuple[float, float]]:
    ends = [columns.closed_open for columns in parts for _ in range(columns.width)]
    return {dimension: pair for dimension, pair in enumerate(ends) if pair is not None}


def _per_dimension(action: Sequence[Columns], answer: Callable[[Columns], bool]) -> tuple[bool, ...]:
    return tuple(answer(columns) for columns in action for _ in range(columns.width))


def _find(tree: Any, path: str) -> Any:
    node = tree
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            raise KeyError(path)
        node = node[key]
    return node


# ---------------------------------------------------------------------------------------------------------------------
# The user's file
# ---------------------------------------------------------------------------------------------------------------------


def catalogue(module: str | None) -> tuple[Mapping[str, DatasetConfig], Mapping[str, Mixture]]:
    """All datasets and mixtures by name: those of Open X-Embodiment and, with a path or module name, the user's own.

    Raises DataError where the file is not there, fails, or defines no datasets, and for a name that is taken.
    """
    if not module:
        return DATASETS, MIXTURES
    user = _load(module)
    datasets = getattr(user, "DATASETS", None)
    entries = list(datasets.values()) if isinstance(datasets, Mapping) else datasets
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, DatasetConfig) for entry in entries):
        raise DataError(
            f"data.module {module!r} defines no DATASETS: give a list of openvla_jax.data.custom.describe(...)"
        )
    configs = {entry.name: entry for entry in entries}
    mixtures = getattr(user, "MIXTURES", {})
    taken = sorted(configs.keys() & DATASETS.keys() | mixtures.keys() & (MIXTURES.keys() - DATASETS.keys()))
    if taken or len(configs) != len(entries):
        what = ", ".join(taken) or "one of its own"
        raise DataError(f"data.module {module!r} uses a name that is taken ({what}): choose another")
    return {**DATASETS, **configs}, {**MIXTURES, **mixtures}


def _load(module: str) -> Any:
    path = Path(module).expanduser()
    try:
        if path.suffix != ".py":
            return importlib.import_module(module)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        name = f"openvla_jax_user_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[name] = loaded
        spec.loader.exec_module(loaded)
        return loaded
    except DataError as error:
        raise DataError(f"data.module {module!r}: {error}") from error
    except Exception as error:  # whatever the user's file does
        cause = " ".join(str(error).split())
        raise DataError(f"data.module {module!r} cannot be loaded ({type(error).__name__}: {cause})") from error
