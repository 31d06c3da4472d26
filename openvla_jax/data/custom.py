"""Datasets that users describe in a file of their own, named by `data.module`; docs/data.md has an example.

Such a file defines DATASETS, a list of `describe(...)` or DatasetConfig, and may define MIXTURES, a dict of (dataset,
weight) pairs. Its names join those of Open X-Embodiment.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow as tf

from openvla_jax.data import DataError
from openvla_jax.data.oxe.datasets import DATASETS, DatasetConfig, Trajectory
from openvla_jax.data.oxe.mixtures import MIXTURES, Mixture
from openvla_jax.data.oxe.state import StateEncoding

# How a gripper command is written, and what makes it 1 = open, 0 = closed, as everything here has it.
GRIPPERS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "1 is open": lambda x: x,
    "0 is open": lambda x: 1 - x,
    "1 is open, -1 closed": lambda x: (x + 1) / 2,
    "-1 is open, 1 closed": lambda x: (1 - x) / 2,
}


@dataclass(frozen=True)
class Columns:
    """Columns start to stop (excluded) of a raw feature, or column start alone; a feature of shape [] has one column.

    key: path in a step, "action" or "observation/joints". absolute: a target, not a change; at the end of an episode it
    is repeated, where a change becomes 0. normalize: by the dataset's statistics. gripper: one of GRIPPERS; it is
    absolute, clipped to [0, 1] and not normalised.
    """

    key: str
    start: int = 0
    stop: int | None = None
    absolute: bool = False
    normalize: bool = True
    gripper: str | None = None

    def __post_init__(self) -> None:
        if self.gripper is not None and self.gripper not in GRIPPERS:
            raise DataError(f"gripper {self.gripper!r} is unknown: one of {', '.join(map(repr, GRIPPERS))}")
        if self.start < 0 or self.width < 1:
            raise DataError(f"columns {self.start}:{self.stop} of {self.key!r} are none: count from 0, stop excluded")

    @property
    def width(self) -> int:
        return 1 if self.stop is None else self.stop - self.start

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
        return values if self.gripper is None else tf.clip_by_value(GRIPPERS[self.gripper](values), 0.0, 1.0)


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

    def standard(trajectory: Trajectory) -> Trajectory:
        trajectory = transform(trajectory) if transform else trajectory
        views = {**cameras, **{f"depth_{view}": key for view, key in (depth or {}).items()}}
        observation = {f"{view}_frames": _find(trajectory, f"observation/{key}") for view, key in views.items()}
        if state:
            observation["state"] = tf.concat([columns.read(trajectory) for columns in state], axis=1)
        full = tf.concat([columns.read(trajectory) for columns in action], axis=1)
        if fixed_instruction is None:
            text = _find(trajectory, instruction)
        else:
            text = tf.fill(tf.shape(full)[:1], fixed_instruction)
        kept = {key: trajectory[key] for key in ("_frame_index",) if key in trajectory}
        return {"observation": observation, "action": full, "language_instruction": text, **kept}

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
            _per_dimension(action, lambda columns: columns.absolute or columns.gripper is not None),
            _per_dimension(action, lambda columns: columns.normalize and columns.gripper is None),
        ),
    )


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
        reason = str(error).splitlines()[0] if str(error) else ""
        raise DataError(f"data.module {module!r} cannot be loaded ({type(error).__name__}: {reason})") from error
