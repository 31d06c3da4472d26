"""Several datasets as one endless stream of frames: opened together, weighed against each other, interleaved."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath

from openvla_jax.config import nearest
from openvla_jax.data import DataError, DatasetNotFoundError, SplitNotFoundError, pipeline
from openvla_jax.data import trajectory as traj
from openvla_jax.data.custom import catalogue
from openvla_jax.data.episodes import Traced, read_episodes
from openvla_jax.data.faults import NO_FRAMES, SHORT_EPISODE
from openvla_jax.data.oxe.datasets import DATASETS, DatasetConfig
from openvla_jax.data.oxe.mixtures import resolve_mixture
from openvla_jax.data.rlds import dataset_statistics
from openvla_jax.data.source import EpisodeRange, Source, episode_ranges, open_source
from openvla_jax.data.statistics import Grippers
from openvla_jax.types import ActionSpec, ObservationSpec

DEFAULT_OBSERVATION, DEFAULT_ACTION = ObservationSpec(), ActionSpec()  # one camera, no state, one action


def open_sources(
    datasets: Sequence[str], data_dir: epath.PathLike, configs: Mapping[str, DatasetConfig] = DATASETS
) -> list[Source]:
    """Opens datasets, whose names are in configs.

    Datasets that no policy can be trained on (joint actions) are left out with a warning, as in the reference, unless
    nothing else remains. Raises one DatasetNotFoundError that lists all missing datasets, before anything is read.
    """
    usable = [name for name in datasets if configs[name].supported]
    if not usable:
        raise DataError(f"nothing to train on: {configs[datasets[0]].unsupported_reason}")
    for name in datasets:
        if not configs[name].supported:
            logging.warning("%s; it is left out", configs[name].unsupported_reason)
    sources, missing = [], []
    for name in usable:
        try:
            sources.append(open_source(configs[name], data_dir))
        except DatasetNotFoundError as error:
            missing.append(error)
    if len(missing) == 1:
        raise missing[0]
    if missing:
        listed = "; ".join(map(str, missing))
        raise DatasetNotFoundError(f"{len(missing)} of {len(usable)} datasets are missing: {listed}")
    return sources


def check_cameras(sources: Sequence[Source], cameras: Sequence[str]) -> None:
    """Raises DataError for a camera that no dataset knows, and for a dataset that has none of the cameras."""
    known = {view for source in sources for view in source.config.image_keys}
    for camera in cameras:
        if camera not in known:
            raise DataError(f"observation.cameras has {camera!r}, which no dataset knows; {nearest(camera, known)}")
    what = f"no {cameras[0]} camera" if len(cameras) == 1 else f"none of the cameras {', '.join(cameras)}"
    for source in sources:
        present = [view for view, key in source.config.image_keys.items() if key]
        if not set(present) & set(cameras):
            raise DataError(f"dataset {source.name!r} has {what} (only: {', '.join(present) or 'none'}): leave it out")


def probabilities(weights: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns the chance of each dataset per frame, float64 [datasets]: weight x number of steps, normalised.

    Reference: `balance_weights=True`.
    """
    balanced = np.asarray(weights, np.float64) * sizes
    return balanced / balanced.sum()


def nominal_length(weights: np.ndarray, sizes: np.ndarray) -> int:
    """Returns the frames of an epoch: as many as it takes to draw every dataset of weight 1.0 once, in expectation.

    weights, sizes: raw weight and number of steps of each dataset, [datasets]. Reference: openvla
    `make_interleaved_dataset`, which fails if no weight is 1.0; here the largest weight counts then.
    """
    weights = np.asarray(weights, np.float64)
    primary = weights == 1.0 if (weights == 1.0).any() else weights == weights.max()
    return int((np.asarray(sizes)[primary] / probabilities(weights, sizes)[primary]).max())


@dataclass(frozen=True, eq=False)
class Mixture:
    """Opened datasets with their raw weights and their statistics (see `rlds.dataset_statistics`).

    A dataset of weight 0 is known, and not drawn from. observation, action: which cameras and state columns a frame
    carries, how many actions, and how both are normalised. max_action, max_proprio: episodes with a larger |value| of
    the normalised action or state are dropped (the reference's filters); the latter needs statistics of the state.
    """

    sources: Sequence[Source]
    weights: np.ndarray
    statistics: Mapping[str, Mapping]
    observation: ObservationSpec = DEFAULT_OBSERVATION
    action: ActionSpec = DEFAULT_ACTION
    max_action: float | None = None
    max_proprio: float | None = None
    _traces: dict[int, Traced] = field(default_factory=dict, repr=False)  # by dataset, the same for all weights

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)

    @property
    def action_dims(self) -> np.ndarray:
        return np.array([len(source.config.action_normalization_mask) for source in self.sources])

    @property
    def grippers(self) -> list[Grippers]:
        """Of each dataset's actions (see `statistics.check_grippers`)."""
        return [source.config.grippers.get("action", {}) for source in self.sources]

    @property
    def camera_mask(self) -> np.ndarray:
        """bool [datasets, cameras], False for a camera that a dataset does not have."""
        keys = [source.config.image_keys for source in self.sources]
        return np.array([[bool(views.get(camera)) for camera in self.observation.cameras] for views in keys])

    @property
    def sizes(self) -> np.ndarray:
        """Steps of each dataset: those of all splits, before any filter or cut, as the reference counts them."""
        return np.array([self.statistics[source.name]["num_transitions"] for source in self.sources])

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of cameras as the datasets declare them: at most four, those drawn most often, as each takes
        about a second at the start of a stream."""
        drawn: dict[tuple[int, int], float] = {}
        for index in np.flatnonzero(self.weights).tolist():
            for size in self.sources[index].image_sizes:
                drawn[size] = drawn.get(size, 0.0) + self.probabilities[index]
        return sorted(drawn, key=lambda size: (-drawn[size], size))[:4]

    @property
    def probabilities(self) -> np.ndarray:
        return probabilities(self.weights, self.sizes)

    def stream(
        self,
        split: str,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        readers: int = 4,
        skip_unlabeled: bool = True,
    ) -> tf.data.Dataset:
        """Returns the endless frames of this process, a dataset drawn for each; see `pipeline.to_frames`.

        Args:
          split: "train", "val", "all", or one that every dataset has; those without episodes in it are left out.
          seed: decides the order; the same arguments give the same stream.
          process_index, process_count: which share of the episodes is read.
          readers: record files read at once from each dataset.
          skip_unlabeled: drops frames without an instruction.

        Raises:
          SplitNotFoundError: see `datasets_with_split`.
        """
        seeds = np.random.SeedSequence([seed, process_index]).generate_state(len(self.sources) + 1).tolist()
        indices = self.datasets_with_split(split)
        streams = []
        for index in indices:
            files = episode_ranges(self.sources[index], split, process_index, process_count)
            streams.append(self._frames(index, files, seeds[index], readers, skip_unlabeled))
        if len(streams) == 1:
            return streams[0]
        chances = self.probabilities[indices].tolist()
        return tf.data.Dataset.sample_from_datasets(streams, chances, seed=seeds[-1], stop_on_empty_dataset=True)

    def datasets_with_split(self, split: str) -> list[int]:
        """Returns the indices of the datasets in use that have episodes in this split.

        Raises SplitNotFoundError if one has no "train", or if none has any other split.
        """
        indices, errors = [], []
        for index in np.flatnonzero(self.weights).tolist():
            source = self.sources[index]
            try:
                episode_ranges(source, split)
                indices.append(index)
            except SplitNotFoundError as error:
                errors.append(error)
        if errors and (split == "train" or not indices):
            raise errors[0]
        return indices

    def _frames(
        self, index: int, files: Sequence[EpisodeRange], seed: int, readers: int, skip_unlabeled: bool
    ) -> tf.data.Dataset:
        """The endless frames of one dataset, filtered; marked NO_FRAMES if the filters leave none (see `faults`)."""
        source, horizon = self.sources[index], self.action.horizon

        @tf.autograph.experimental.do_not_convert
        def keep(frame: dict) -> tf.Tensor:
            kept = tf.constant(True)
            if skip_unlabeled:
                kept &= tf.strings.length(tf.strings.strip(frame["language"])) > 0
            if source.config.frame_filter is not None:
                action = tf.reshape(frame["action"], [horizon, -1])[:, : self.action_dims[index]]
                kept &= source.config.frame_filter({"action": action})
            return kept if horizon == 1 else kept | (frame["step"] == SHORT_EPISODE)

        trajectories = read_episodes(self.traced(index), files, seed=seed, readers=readers)
        frames = trajectories.interleave(tf.data.Dataset.from_tensor_slices, cycle_length=readers)
        frames = frames.filter(keep).repeat()
        nothing = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), frames.element_spec)
        nothing |= {"dataset": tf.constant(index), "step": tf.constant(NO_FRAMES)}
        return frames.concatenate(tf.data.Dataset.from_tensors(nothing).repeat())

    def traced(self, index: int) -> Traced:
        """Returns the function of one dataset: raw trajectory -> the columns of its frames."""
        if index in self._traces:
            return self._traces[index]
        source, observation, width = self.sources[index], self.observation, int(self.action_dims.max())

        def frames(full: traj.Trajectory, _: tf.Tensor) -> dict:
            if self.max_action is not None or self.max_proprio is not None:
                fits = traj.within(full, self.max_action, self.max_proprio)
                full = traj.cut(full, tf.where(fits, tf.shape(full["step"])[0], 0))
            cameras, with_state = observation.cameras, bool(observation.state)
            return pipeline.to_frames(full, cameras, self.action.horizon, width, index, with_state)

        self._traces[index] = pipeline.compose(
            source,
            views=[camera for camera in observation.cameras if camera in source.config.image_keys],
            load_proprio=bool(observation.state) or self.max_proprio is not None,
            state=observation.state,
            statistics=self.statistics[source.name],
            normalization=self.action.normalization,
            then=frames,
        )
        return self._traces[index]

    def expected_frames(self, split: str) -> int:
        """Returns about how many frames a split has, all datasets together: per episode as many as on average."""
        total = 0.0
        for index in self.datasets_with_split(split):
            source = self.sources[index]
            part, whole = (sum(run.take for run in episode_ranges(source, name)) for name in (split, "all"))
            frames = self.sizes[index] - (self.action.horizon - 1) * whole
            total += max(frames, 0) * part / whole
        return round(total)


@dataclass(frozen=True)
class Phase:
    """A mixture and the last training step that draws from it (infinity: no end)."""

    mixture: Mixture
    last_step: float


def open_phases(
    data: Any,
    observation: ObservationSpec = DEFAULT_OBSERVATION,
    action: ActionSpec = DEFAULT_ACTION,
    statistics: Mapping[str, Mapping] | None = None,
) -> list[Phase]:
    """Opens the mixtures that a data configuration names, in the order in which training draws from them.

    All phases know all datasets, in one order, and differ in their weights.

    Args:
      data: dataset, data_dir, and if needed module, schedule (pairs (mixture, last step) that come before `dataset`),
        max_action, max_proprio, statistics (a JSON), statistics_dir (where computed ones are kept).
      observation: cameras and state columns of a frame.
      action: horizon and normalisation of a frame's actions; its `dim` is not read, the datasets decide.
      statistics: by dataset; None takes them from where `data` says.

    Raises:
      DataError: a dataset, camera or state column is unknown or missing, or a schedule makes no sense.
      StatisticsError: statistics are missing or do not fit.
    """
    if not data["data_dir"]:
        raise DataError("data.data_dir is not set: name the folder that holds the datasets")
    configs, mixtures = catalogue(data.get("module"))
    schedule = [*_schedule(data.get("schedule") or ()), (data["dataset"], math.inf)]
    weights = [dict(resolve_mixture(mixture, configs, mixtures)) for mixture, _ in schedule]
    union = {name: None for mixed in reversed(weights) for name in mixed}  # the last phase's datasets come first
    sources = open_sources(tuple(union), data["data_dir"], configs)
    check_cameras(sources, observation.cameras)
    limits = {key: data.get(key) for key in ("max_action", "max_proprio")}
    if statistics is None:
        path, cache_dir = data.get("statistics"), data.get("statistics_dir")
        with_proprio = bool(observation.state) or limits["max_proprio"] is not None
        options = {"path": path, "cache_dir": cache_dir, "load_proprio": with_proprio, "state": observation.state}
        statistics = {source.name: dataset_statistics(source, **options) for source in sources}
    mixture = Mixture(sources, np.zeros(len(sources)), statistics, observation, action, **limits)
    phases = []
    for (name, last_step), mixed in zip(schedule, weights, strict=True):
        own = np.array([mixed.get(source.name, 0.0) for source in sources])
        if not own.any():
            raise DataError(f"mixture {name!r} has no dataset that can be trained on")
        phases.append(Phase(replace(mixture, weights=own), last_step))
    return phases


def _schedule(schedule: Sequence) -> list[tuple[Any, int]]:
    example = "data.schedule = (('oxe_magic_soup_plus', 200_000),)"
    pairs = [tuple(pair) if isinstance(pair, tuple | list) else (pair,) for pair in schedule]
    steps = [pair[1] for pair in pairs if len(pair) == 2]
    if len(steps) != len(pairs) or not all(isinstance(step, int) and step > 0 for step in steps):
        raise DataError(f"data.schedule is {schedule!r}: give (mixture, last step) pairs, as in {example}")
    if steps != sorted(set(steps)):
        raise DataError(f"data.schedule ends its mixtures at steps {steps}: they must rise")
    return pairs


def table(phases: Sequence[Phase]) -> str:
    """A line per dataset, to be printed: its share of the frames in each phase, its size, the range of its actions."""
    known = phases[-1].mixture
    ends = [f"to {phase.last_step:,}" for phase in phases[:-1]] + ["then" if len(phases) > 1 else "share"]
    heads = " ".join(f"{end:>10}" for end in ends)
    lines = [f"{'dataset':<36} {heads} {'frames':>11} {'episodes':>9}  actions, 1st to 99th percentile"]
    for index, source in enumerate(known.sources):
        stats = known.statistics[source.name]
        action = stats["action"]
        ranges = []
        for i, low in enumerate(action["q01"]):
            constant = action["min"][i] == action["max"][i]
            ranges.append(f"{low:.3g} constant" if constant else f"{low:.2g}..{action['q99'][i]:.2g}")
        shares = " ".join(f"{phase.mixture.probabilities[index]:10.2%}" for phase in phases)
        name = source.name.removesuffix("_converted_externally_to_rlds")
        sizes = f"{stats['num_transitions']:11,} {stats['num_trajectories']:9,}"
        lines.append(f"{name:<36} {shares} {sizes}  {', '.join(ranges)}")
    return "\n".join(lines)
