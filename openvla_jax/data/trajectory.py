"""What happens to one trajectory between its standardisation and its frames.

A trajectory is a dict of tensors with a leading time axis T:
  observation  image_<view> string [T] (encoded), depth_<view> likewise, proprio float32 [T, P], timestep int32 [T]
  task         language_instruction string [T]
  action       float32 [T, A]
  dataset_name string [T], absolute_action_mask bool [T, A]
  episode      string [T] "<record file>#<number in it>", step int32 [T]: where a frame was read, for error messages
"""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from openvla_jax.config import nearest
from openvla_jax.data import BadImageError, DataError, StatisticsError
from openvla_jax.data.oxe.datasets import DatasetConfig
from openvla_jax.errors import InputError

Trajectory = dict

_BOUNDS = {"bounds": ("min", "max"), "bounds_q99": ("q01", "q99")}
NORMALIZATIONS = ("normal", *_BOUNDS)


def restructure(
    config: DatasetConfig,
    raw: Trajectory,
    episode: tf.Tensor | str = "",
    *,
    views: Sequence[str] = ("primary",),
    load_depth: bool = False,
    load_proprio: bool = True,
    load_language: bool = True,
) -> Trajectory:
    """Standardises a raw RLDS trajectory and gathers it under the names above; all its other fields are dropped.

    A view that the dataset lacks becomes an empty string per step, a None among the state keys one column of zeros.
    episode: its id. Runs eagerly and in graphs. Raises DataError (ValueError) naming the dataset and the keys that are
    there where one is missing; BadImageError where a camera is not stored encoded.
    Reference: openvla `make_dataset_from_rlds`.
    """
    standard = config.standardize(raw)
    observation = _member(config, standard, "observation", dict)
    action = tf.cast(_member(config, standard, "action"), tf.float32)
    width = len(config.absolute_action_mask)
    if action.shape.rank != 2 or action.shape[1] not in (None, width):
        raise DataError(
            f"dataset {config.name!r}: actions have shape {action.shape.as_list()}, but its action encoding "
            f"{config.encoding_name} has {width} dimensions: fix the transform or the encoding"
        )
    action = tf.ensure_shape(action, [None, width])
    length = tf.shape(action)[0]

    result = {"observation": {}, "task": {}, "action": action}
    kinds = {"image": config.image_keys, "depth": config.depth_keys if load_depth else {}}
    for kind, keys in kinds.items():
        for view in views if keys else ():
            if view not in keys:
                raise DataError(f"dataset {config.name!r} has no view {view!r}: it has {', '.join(keys)}")
            key = keys[view]
            frames = tf.fill([length], "") if key is None else _member(config, observation, key)
            if kind == "image" and frames.dtype != tf.string:
                raise BadImageError(
                    f"dataset {config.name!r}: image {key!r} is stored as {frames.dtype.name} "
                    f"{frames.shape.as_list()[1:]}, not as an encoded image: write it as tfds.features.Image"
                )
            result["observation"][f"{kind}_{view}"] = frames
    if load_proprio:
        columns = [
            tf.zeros([length, 1]) if key is None else tf.cast(_member(config, observation, key), tf.float32)
            for key in config.state_keys
        ]
        for key, column in zip(config.state_keys, columns, strict=True):
            if column.shape.rank != 2:
                raise DataError(
                    f"dataset {config.name!r}: state {key!r} has shape {column.shape.as_list()}, not [steps, columns]"
                )
        result["observation"]["proprio"] = tf.concat(columns, axis=1)
    result["observation"]["timestep"] = tf.range(length)
    if load_language:
        language = _member(config, standard, config.language_key)
        if language.dtype != tf.string:
            raise DataError(
                f"dataset {config.name!r}: {config.language_key!r} is {language.dtype.name}, not text: fix its entry"
            )
        language = tf.convert_to_tensor(language)
        if language.shape.rank == 2 and language.shape[1] == 1:  # a text as an array of one
            language = language[:, 0]
        if language.shape.rank != 1:
            raise DataError(
                f"dataset {config.name!r}: {config.language_key!r} has shape {language.shape.as_list()}, not one text "
                f"per step: fix its entry or transform"
            )
        result["task"]["language_instruction"] = language
    result["dataset_name"] = tf.fill([length], config.name)
    result["absolute_action_mask"] = tf.tile([config.absolute_action_mask], [length, 1])
    result["episode"] = tf.fill([length], episode)
    result["step"] = tf.cast(standard.get("_frame_index", tf.range(length)), tf.int32)
    return result


def select_state(trajectory: Trajectory, config: DatasetConfig, names: Sequence[str]) -> Trajectory:
    """Reduces observation/proprio to the named columns, in the given order: float32 [T, len(names)].

    Raises DataError if the state has no column of a name, or a width that its configuration does not name.
    """
    check_state(config, names)
    known, state = config.state_names, trajectory["observation"]["proprio"]
    if state.shape[1] not in (None, len(known)):
        raise DataError(
            f"dataset {config.name!r}: its state has {state.shape[1]} columns, its configuration names {len(known)} "
            f"({', '.join(known)}): fix state_columns"
        )
    columns = tf.gather(state, [known.index(name) for name in names], axis=1)
    return trajectory | {"observation": trajectory["observation"] | {"proprio": columns}}


def check_state(config: DatasetConfig, names: Sequence[str]) -> None:
    """Raises DataError for a name that no column of the dataset's state has."""
    for name in names:
        if name not in config.state_names:
            raise DataError(
                f"dataset {config.name!r} has no state column {name!r}; {nearest(name, config.state_names)}"
            )


def cut(trajectory: Trajectory, length: tf.Tensor | int) -> Trajectory:
    """Keeps the first `length` steps."""
    return tf.nest.map_structure(lambda x: x[:length], trajectory)


def _member(config: DatasetConfig, tree: Mapping, key: str, kind: type | None = None):
    if not isinstance(tree.get(key), kind or (tf.Tensor, np.ndarray)):
        raise DataError(
            f"dataset {config.name!r}: a standardised trajectory has no {key!r} there, only {', '.join(sorted(tree))}: "
            f"fix its configuration or transform"
        )
    return tree[key]


def normalize(trajectory: Trajectory, statistics: Mapping, kind: str = "bounds_q99") -> Trajectory:
    """Normalises action and, if it is there, proprio; statistics: {"action": {...}, "proprio": {...}} of lists.

    "normal": (x - mean) / (std + 1e-8). "bounds", "bounds_q99": [min, max] or [q01, q99] onto [-1, 1], clipped; a
    dimension with min == max becomes 0 whatever its mask. Dimensions where the mask is False pass unchanged otherwise,
    and so do NaN and infinity everywhere: the reference clips them away, here they must stay to be found.
    Reference: openvla `normalize_action_and_proprio`, in float32. Raises ValueError for an unknown kind and
    StatisticsError for statistics of another width.
    """
    if kind not in NORMALIZATIONS:
        raise InputError(f"normalization {kind!r} is unknown: use one of {', '.join(NORMALIZATIONS)}")
    observation = dict(trajectory["observation"])
    if "proprio" in observation:
        observation["proprio"] = _normalized(observation["proprio"], statistics["proprio"], kind)
    return trajectory | {
        "action": _normalized(trajectory["action"], statistics["action"], kind),
        "observation": observation,
    }


def _normalized(x: tf.Tensor, statistics: Mapping, kind: str) -> tf.Tensor:
    stats = {name: np.asarray(value, np.float64) for name, value in statistics.items() if name not in ("mask", "names")}
    if x.shape[-1] not in (None, len(stats["mean"])):
        raise StatisticsError(f"statistics of {len(stats['mean'])} dimensions do not fit values of shape {x.shape}")
    mask = np.asarray(statistics.get("mask", np.ones_like(stats["mean"])), bool)
    if kind == "normal":
        return tf.where(mask, (x - stats["mean"]) / (stats["std"] + 1e-8), x)
    low, high = (stats[name] for name in _BOUNDS[kind])
    scaled = tf.where(mask, tf.clip_by_value(2 * (x - low) / (high - low + 1e-8) - 1, -1, 1), x)
    scaled = tf.where(stats["min"] == stats["max"], tf.zeros_like(x), scaled)
    return tf.where(tf.math.is_finite(x), scaled, x)


# ---------------------------------------------------------------------------------------------------------------------
# Filters: trajectory -> scalar bool, False drops it
# ---------------------------------------------------------------------------------------------------------------------


def is_labeled(trajectory: Trajectory) -> tf.Tensor:
    """True if any step has an instruction (the reference's `skip_unlabeled`)."""
    return tf.reduce_any(trajectory["task"]["language_instruction"] != "")


def within(trajectory: Trajectory, max_action: float | None = None, max_proprio: float | None = None) -> tf.Tensor:
    """True if no |value| of the action or proprio exceeds its limit; None is no limit."""
    fits = tf.constant(True)
    if max_action is not None:
        fits &= tf.reduce_all(tf.abs(trajectory["action"]) <= max_action)
    if max_proprio is not None:
        fits &= tf.reduce_all(tf.abs(trajectory["observation"]["proprio"]) <= max_proprio)
    return fits


# ---------------------------------------------------------------------------------------------------------------------
# Windows and frames
# ---------------------------------------------------------------------------------------------------------------------


def add_pad_masks(trajectory: Trajectory) -> Trajectory:
    """Adds observation/pad_mask_dict and task/pad_mask_dict: bool [T] per entry, False where a string is empty."""

    def masks(entries: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        return {
            key: tf.strings.length(value) != 0 if value.dtype == tf.string else tf.ones(tf.shape(value)[:1], tf.bool)
            for key, value in entries.items()
        }

    return trajectory | {
        part: trajectory[part] | {"pad_mask_dict": masks(trajectory[part])} for part in ("observation", "task")
    }


def relabel_goal(trajectory: Trajectory, seed: int | tf.Tensor) -> Trajectory:
    """Adds to the task, per step, the observation of a later step: drawn uniformly, the last step's own at the end.

    The draw depends on seed and episode. Reference: openvla `goal_relabeling.uniform`.
    """
    length = tf.shape(trajectory["action"])[0]
    steps = tf.range(length)
    unit = tf.random.stateless_uniform([length], _seeds(trajectory, seed))
    later = steps + 1 + tf.cast(tf.floor(unit * tf.cast(length - steps - 1, tf.float32)), tf.int32)
    goal = tf.nest.map_structure(lambda x: tf.gather(x, tf.minimum(later, length - 1)), trajectory["observation"])
    return trajectory | {"task": trajectory["task"] | goal}


def drop_conditioning(trajectory: Trajectory, keep_image: float, seed: int | tf.Tensor) -> Trajectory:
    """Keeps, per step, either the goal's images (with probability keep_image) or the instruction; "" is in its place.

    Steps without an instruction keep their images; where images go, the goal's timestep becomes the episode's last.
    Reference: openvla `task_augmentation.delete_task_conditioning`.
    """
    task = dict(trajectory["task"])
    length = tf.shape(trajectory["action"])[0]
    unit = tf.random.stateless_uniform([length], _seeds(trajectory, seed) + 1)
    images = (unit < keep_image) | (task["language_instruction"] == "")
    for key, value in task.items():
        if key.startswith(("image_", "depth_")):
            task[key] = tf.where(images, value, "")
    task["language_instruction"] = tf.where(images, "", task["language_instruction"])
    if "timestep" in task:
        task["timestep"] = tf.where(images, task["timestep"], length - 1)
    return trajectory | {"task": task}


def _seeds(trajectory: Trajectory, seed: int | tf.Tensor) -> tf.Tensor:
    episode = tf.strings.to_hash_bucket_fast(tf.strings.reduce_join(trajectory["episode"][:1]), 2**31 - 1)
    return tf.stack([tf.cast(seed, tf.int64), episode])


def chunk(trajectory: Trajectory, window: int = 1, future: int = 0, truncate: bool = False) -> Trajectory:
    """Gives observations a window axis and actions a chunk axis, in place of each step's own.

    Observations become [T, window, ...], the steps t-window+1 .. t; observation/pad_mask bool [T, window] is False
    where that is before the start, which repeats the first step. Actions become [T, window + future, A], the steps
    t-window+1 .. t+future; past the end, relative dimensions are 0 and absolute ones repeat the last action. As
    actions are normalised by then, that 0 is the middle of the range. Reference: openvla `chunk_act_obs`, without its
    cut of the actions at a relabelled goal. truncate: steps whose actions would reach past the end are left out
    instead, as in OpenVLA-OFT; a shorter episode has no steps then.
    """
    length = tf.shape(trajectory["action"])[0]
    steps = tf.range(length)[:, None] + tf.range(1 - window, future + 1)[None]  # [T, window + future]
    observed = steps[:, :window]
    observation = tf.nest.map_structure(lambda x: tf.gather(x, tf.maximum(observed, 0)), trajectory["observation"])
    action = tf.gather(trajectory["action"], tf.clip_by_value(steps, 0, tf.maximum(length - 1, 0)))
    repeats = (steps < length)[..., None] | trajectory["absolute_action_mask"][:, None]
    chunked = trajectory | {
        "observation": observation | {"pad_mask": observed >= 0},
        "action": tf.where(repeats, action, tf.zeros_like(action)),
    }
    if not truncate:
        return chunked
    return cut(chunked, tf.maximum(length - future, 0))
