"""Several datasets as one endless stream of frames: opened together, weighed against each other, interleaved."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath

from openvla_jax.data import DataError, DatasetNotFoundError, SplitNotFoundError
from openvla_jax.data import trajectory as traj
from openvla_jax.data.custom import catalogue
from openvla_jax.data.episodes import READ_BYTES, Traced, clear_errors, read_episodes, trace
from openvla_jax.data.oxe.datasets import DATASETS, DatasetConfig
from openvla_jax.data.oxe.mixtures import resolve_mixture
from openvla_jax.data.rlds import dataset_statistics
from openvla_jax.data.source import Share, Source, open_source, shares

_FRAME_OVERHEAD = 900  # bytes that a frame takes in the shuffle buffer beside its strings, measured


def open_sources(
    mixture: str | Sequence, data_dir: epath.PathLike, configs: Mapping[str, DatasetConfig] = DATASETS, **names: Any
) -> tuple[list[Source], np.ndarray]:
    """Opens every dataset of a mixture; returns them with their raw weights, float64 [datasets].

    mixture, names: as in `resolve_mixture`. Datasets that no policy can be trained on
    (joint actions) are left out with a warning, as in the reference, unless nothing else remains. Raises one
    DatasetNotFoundError that lists all missing datasets, before anything is read, and DataError for a dataset without
    a primary camera.
    """
    pairs = resolve_mixture(mixture, configs, **names)
    usable = [(name, weight) for name, weight in pairs if configs[name].supported]
    if not usable:
        raise DataError(f"nothing to train on: {configs[pairs[0][0]].unsupported_reason}")
    for name, _ in pairs:
        if not configs[name].supported:
            logging.warning("%s; it is left out", configs[name].unsupported_reason)
    sources, missing = [], []
    for name, _ in usable:
        try:
            sources.append(open_source(configs[name], data_dir))
        except DatasetNotFoundError as error:
            missing.append(error)
    if len(missing) == 1:
        raise missing[0]
    if missing:
        listed = "; ".join(map(str, missing))
        raise DatasetNotFoundError(f"{len(missing)} of {len(usable)} datasets are missing: {listed}")
    for source in sources:
        if source.config.image_keys.get("primary") is None:
            others = ", ".join(view for view, key in source.config.image_keys.items() if key)
            raise DataError(f"dataset {source.name!r} has no primary camera (only: {others or 'none'}): leave it out")
    return sources, np.array([weight for _, weight in usable])


def probabilities(weights: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Chance of each dataset per frame: weight x number of steps, normalised. Reference: `balance_weights=True`."""
    balanced = np.asarray(weights, np.float64) * sizes
    return balanced / balanced.sum()


def nominal_length(weights: np.ndarray, sizes: np.ndarray) -> int:
    """Frames in one epoch: as many as it takes to draw every dataset of weight 1.0 once, in expectation.

    Reference: openvla `make_interleaved_dataset`, which fails where no weight is 1.0; the largest weight counts then.
    """
    weights = np.asarray(weights, np.float64)
    primary = weights == 1.0 if (weights == 1.0).any() else weights == weights.max()
    return int((np.asarray(sizes)[primary] / probabilities(weights, sizes)[primary]).max())


@dataclass(frozen=True, eq=False)
class Mixture:
    """Opened datasets with their raw weights and their statistics (see `rlds.dataset_statistics`).

    A dataset of weight 0 is known, and not drawn from. max_action, max_proprio: episodes with a larger |value| of the
    normalised action or state are dropped (the reference's filters); they need statistics of the state.
    """

    sources: Sequence[Source]
    weights: np.ndarray
    statistics: Mapping[str, Mapping]
    max_action: float | None = None
    max_proprio: float | None = None
    # By dataset; weights do not matter to them.
    _traces: dict[int, Traced] = field(default_factory=dict, repr=False)
    _samples: dict[int, tuple[float, float]] = field(default_factory=dict, repr=False)

    @property
    def action_dims(self) -> np.ndarray:
        return np.array([len(source.config.action_normalization_mask) for source in self.sources])

    @property
    def sizes(self) -> np.ndarray:
        """Steps of each dataset: those of all splits, before any filter, as the reference counts them."""
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
        """The endless frames of this process, a dataset drawn for each; the same arguments give the same stream.

        Datasets without episodes in the split are left out (see `having`).
        """
        seeds = np.random.SeedSequence([seed, process_index]).generate_state(len(self.sources) + 1).tolist()
        indices = self.having(split)
        streams = []
        for index in indices:
            files = shares(self.sources[index], split, process_index, process_count)
            streams.append(self._frames(index, files, seeds[index], readers, skip_unlabeled))
        if len(streams) == 1:
            return streams[0]
        chances = self.probabilities[indices].tolist()
        return tf.data.Dataset.sample_from_datasets(streams, chances, seed=seeds[-1], stop_on_empty_dataset=True)

    def having(self, split: str) -> list[int]:
        """The datasets in use that have episodes in this split; all must have "train", and one any other split."""
        indices, errors = [], []
        for index in np.flatnonzero(self.weights).tolist():
            source = self.sources[index]
            try:
                shares(source, split)
                indices.append(index)
            except SplitNotFoundError as error:
                errors.append(error)
        if errors and (split == "train" or not indices):
            raise errors[0]
        return indices

    def _frames(
        self, index: int, files: Sequence[Share], seed: int, readers: int, skip_unlabeled: bool
    ) -> tf.data.Dataset:
        """The endless frames of one dataset: image (encoded), action float32 [largest action dimension] (normalised,
        zeros behind its own), language, dataset (its index), episode, step.

        skip_unlabeled drops frames without an instruction. Where no frame is left, frames of step -1 come for ever, so
        that somebody notices; the reference would search for ever.
        """
        source = self.sources[index]

        @tf.autograph.experimental.do_not_convert
        def keep(frame: dict) -> tf.Tensor:
            kept = tf.constant(True)
            if skip_unlabeled:
                kept &= tf.strings.length(tf.strings.strip(frame["language"])) > 0
            if source.config.frame_filter is not None:
                kept &= source.config.frame_filter({"action": frame["action"][None, : self.action_dims[index]]})
            return kept

        trajectories = read_episodes(self._traced(index), files, seed=seed, readers=readers)
        frames = trajectories.interleave(tf.data.Dataset.from_tensor_slices, cycle_length=readers)
        frames = frames.filter(keep).repeat()
        nothing = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), frames.element_spec)
        nothing |= {"dataset": tf.constant(index), "step": tf.constant(-1)}
        return frames.concatenate(tf.data.Dataset.from_tensors(nothing).repeat())

    def _traced(self, index: int) -> Traced:
        """Of one dataset: raw trajectory -> the columns of its frames."""
        if index in self._traces:
            return self._traces[index]
        source = self.sources[index]
        width = max(self.action_dims)

        def columns(raw: dict, episode: tf.Tensor) -> dict:
            full = traj.restructure(source.config, raw, episode, load_proprio=self.max_proprio is not None)
            full = traj.normalize(full, self.statistics[source.name])
            frames = {
                "image": full["observation"]["image_primary"],
                "action": tf.pad(full["action"], [[0, 0], [0, width - self.action_dims[index]]]),
                "language": full["task"]["language_instruction"],
                "dataset": tf.fill(tf.shape(full["step"]), index),
                "episode": full["episode"],
                "step": full["step"],
            }
            if self.max_action is None and self.max_proprio is None:
                return frames
            kept = tf.where(traj.within(full, self.max_action, self.max_proprio), tf.shape(full["step"])[0], 0)
            return {key: column[:kept] for key, column in frames.items()}

        self._traces[index] = trace(source, columns)
        return self._traces[index]

    def expected_frames(self, split: str) -> int:
        """About how many frames a split has, all datasets together: as many per episode as on average."""
        total = 0.0
        for index in self.having(split):
            source = self.sources[index]
            part, whole = (sum(share.take for share in shares(source, name)) for name in (split, "all"))
            total += self.sizes[index] * part / whole
        return round(total)

    def memory(self, readers: int) -> "Memory":
        """What the stream of one process keeps in memory, estimated from the first episodes of each dataset."""
        frame_bytes = np.zeros(len(self.sources))
        reader_bytes = 0.0
        for index in np.flatnonzero(self.weights).tolist():
            source = self.sources[index]
            frame_bytes[index], episode = self._sample(index)
            # Each open file has a buffer, a record and a result in work; then `readers` episodes are taken apart.
            record = sum(split.num_bytes for split in source.info.splits.values()) / sum(source.splits.values())
            files = min(readers, len(shares(source, "train")))
            reader_bytes += files * (READ_BYTES + 2 * record) + readers * episode
        return Memory(float(np.dot(self.probabilities, frame_bytes)) + _FRAME_OVERHEAD, reader_bytes)

    def _sample(self, index: int) -> tuple[float, float]:
        """Bytes of a frame's texts and of an episode's, in the first episodes of a dataset."""
        if index not in self._samples:
            source = self.sources[index]
            with clear_errors([source]):
                episodes = read_episodes(self._traced(index), shares(source, "train"))
                first = list(episodes.take(4).as_numpy_iterator())
            total = sum(len(text) for full in first for key in ("image", "language", "episode") for text in full[key])
            frames = sum(len(full["step"]) for full in first)
            self._samples[index] = total / max(frames, 1), total / len(first)
        return self._samples[index]


@dataclass(frozen=True)
class Memory:
    """Estimated bytes: frame_bytes for a frame in the shuffle buffer, reader_bytes for the episodes being read."""

    frame_bytes: float
    reader_bytes: float


@dataclass(frozen=True)
class Phase:
    """A mixture and the last training step that draws from it (infinity: no end)."""

    mixture: Mixture
    until: float


def open_phases(data: Any, statistics: Mapping[str, Mapping] | None = None) -> list[Phase]:
    """The mixtures that a data configuration names, in the order in which training draws from them.

    data: dataset, data_dir, module, schedule (pairs (mixture, last step) that come before `dataset`), max_action,
    max_proprio. statistics: as given, or as the configuration says (statistics: a JSON; statistics_dir: where computed
    ones are kept). All phases know all datasets, in one order, and differ in their weights.
    """
    if not data["data_dir"]:
        raise DataError("data.data_dir is not set: name the folder that holds the datasets")
    configs, mixtures = catalogue(data.get("module"))
    schedule = [*_schedule(data.get("schedule") or ()), (data["dataset"], math.inf)]
    weights = [dict(resolve_mixture(mixture, configs, mixtures)) for mixture, _ in schedule]
    union = {name: 1.0 for mixed in reversed(weights) for name in mixed}  # the last phase's datasets come first
    sources, _ = open_sources(tuple(union.items()), data["data_dir"], configs)
    limits = {key: data.get(key) for key in ("max_action", "max_proprio")}
    if statistics is None:
        path, cache_dir = data.get("statistics"), data.get("statistics_dir")
        options = {"path": path, "cache_dir": cache_dir, "load_proprio": limits["max_proprio"] is not None}
        statistics = {source.name: dataset_statistics(source, **options) for source in sources}
    mixture = Mixture(sources, np.zeros(len(sources)), statistics, **limits)
    phases = []
    for (name, until), mixed in zip(schedule, weights, strict=True):
        own = np.array([mixed.get(source.name, 0.0) for source in sources])
        if not own.any():
            raise DataError(f"mixture {name!r} has no dataset that can be trained on")
        phases.append(Phase(replace(mixture, weights=own), until))
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
    untils = [f"to {phase.until:,}" for phase in phases[:-1]] + ["then" if len(phases) > 1 else "share"]
    heads = " ".join(f"{until:>10}" for until in untils)
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
