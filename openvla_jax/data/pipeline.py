"""From a raw episode to frames: the stages of `trajectory.py`, composed once.

Training, statistics, inspection, the benchmark and `rlds.make_dataset` all read through `compose`; each takes the
stages that it needs. What their outputs do not depend on is not even parsed (see `episodes.trace`).
"""

from collections.abc import Callable, Mapping, Sequence

import tensorflow as tf

from openvla_jax.data import trajectory as traj
from openvla_jax.data.episodes import Traced, trace
from openvla_jax.data.faults import SHORT_EPISODE
from openvla_jax.data.source import Source
from openvla_jax.data.trajectory import Trajectory


def compose(
    source: Source,
    *,
    views: Sequence[str] = ("primary",),
    load_depth: bool = False,
    load_proprio: bool = False,
    state: Sequence[str] = (),
    load_language: bool = True,
    statistics: Mapping | None = None,
    normalization: str = "bounds_q99",
    then: Callable[[Trajectory, tf.Tensor], dict] = lambda trajectory, episode: trajectory,
) -> Traced:
    """Standardises the episodes of a dataset, then normalises them if there are statistics, then applies `then`.

    Args:
      source: the opened dataset.
      views: cameras to load, empty strings for those without a key in the configuration; () loads none.
      load_depth: also loads the depth images of these views.
      load_proprio: loads the state.
      state: names of the state's columns to keep, in this order; () keeps all.
      load_language: loads the instruction.
      statistics: of this dataset, {"action": ..., "proprio": ... if the state is loaded}; None leaves raw units.
      normalization: how statistics scale, one of `trajectory.NORMALIZATIONS`.
      then: (trajectory as in `trajectory.py`, episode id) -> what the caller wants of it, in TensorFlow operations.

    Returns:
      The traced function (raw trajectory, episode id) -> result of `then`, for `episodes.read_episodes`.

    Raises:
      DataError: the transform fails on the dataset's schema, or draws random numbers; there is no such view or column.
      StatisticsError: the statistics have another width.
      ValueError: an unknown normalisation.
    """

    def run(raw: dict, episode: tf.Tensor) -> dict:
        full = traj.restructure(
            source.config, raw, episode, views=views, load_depth=load_depth, load_proprio=load_proprio,
            load_language=load_language,
        )  # fmt: skip
        if state:
            full = traj.select_state(full, source.config, state)
        if statistics is not None:
            full = traj.normalize(full, statistics, normalization)
        return then(full, episode)

    return trace(source, run)


def to_frames(full: Trajectory, cameras: Sequence[str], horizon: int, width: int, index: int, with_state: bool) -> dict:
    """Cuts a normalised trajectory into chunks; returns the columns of its frames.

    Args:
      full: as `trajectory.py` describes it, with a time axis of T steps and actions of A dimensions.
      cameras: views, each of which becomes a column of encoded images; empty strings if it was not loaded.
      horizon: K, the actions of a frame; the last K - 1 steps of an episode become no frames.
      width: the largest action dimension of the mixture; zeros fill the dimensions behind A.
      index: of the dataset in the mixture.
      with_state: adds a column for the state.

    Returns:
      Columns [T - K + 1, ...]: image_<camera> string, action float32 [K * width], language, dataset, episode, step,
      and state float32 [S]. An episode of fewer than K steps becomes one frame whose step is `SHORT_EPISODE`.
    """
    length, chunked = tf.shape(full["action"])[0], traj.chunk(full, window=1, future=horizon - 1, truncate=True)
    observation, action = chunked["observation"], chunked["action"]
    missing = tf.fill(tf.shape(chunked["step"]), "")
    action = tf.pad(action, [[0, 0], [0, 0], [0, width - action.shape[2]]])
    frames = {
        **{f"image_{view}": observation[f"image_{view}"][:, 0] for view in cameras if f"image_{view}" in observation},
        **{f"image_{view}": missing for view in cameras if f"image_{view}" not in observation},
        "action": tf.reshape(action, [-1, horizon * width]),
        "language": chunked["task"]["language_instruction"],
        "dataset": tf.fill(tf.shape(chunked["step"]), index),
        "episode": chunked["episode"],
        "step": chunked["step"],
    }
    if with_state:
        frames["state"] = observation["proprio"][:, 0]
    if horizon == 1:
        return frames
    marks = tf.cast((length > 0) & (length < horizon), tf.int32)  # how many frames mark a short episode: 0 or 1
    mark = {key: tf.zeros([marks, *column.shape[1:]], column.dtype) for key, column in frames.items()}
    mark |= {"dataset": tf.fill([marks], index), "step": tf.fill([marks], SHORT_EPISODE)}
    mark["episode"] = full["episode"][:marks]
    return {key: tf.concat([column, mark[key]], axis=0) for key, column in frames.items()}
