"""Several datasets as one endless stream of frames: opened together, weighed against each other, interleaved."""

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from etils import epath

from openvla_jax.data import DataError, DatasetNotFoundError, SplitNotFoundError
from openvla_jax.data import trajectory as traj
from openvla_jax.data.directory import Share, Source, open_source, shares
from openvla_jax.data.episodes import Traced, clear_errors, read_episodes, trace
from openvla_jax.data.oxe.datasets import DATASETS, DatasetConfig
from openvla_jax.data.oxe.mixtures import resolve_mixture
from openvla_jax.data.rlds import dataset_statistics

_FRAME_OVERHEAD = 900  # bytes that a frame takes in the shuffle buffer beside its strings, measured


def open_sources(
    mixture: str | Sequence, data_dir: epath.PathLike, configs: Mapping[str, DatasetConfig] = DATASETS
) -> tuple[list[Source], np.ndarray]:
    """Opens every dataset of a mixture; returns them with their raw weights, float64 [datasets].

    mixture: a name of MIXTURES, of one dataset, or (dataset, weight) pairs. Datasets that no policy can be trained on
    (joint actions) are left out with a warning, as in the reference, unless nothing else remains. Raises one
    DatasetNotFoundError that lists all missing datasets, before anything is read, and DataError for a dataset without
    a primary camera.
    """
    pairs = resolve_mixture(mixture, configs)
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
    return int((np.asarray(sizes) / probabilities(weights, sizes))[primary].max())


@dataclass(frozen=True)
class Mixture:
    """Opened datasets with their raw weights and their statistics (see `rlds.dataset_statistics`)."""

    sources: Sequence[Source]
    weights: np.ndarray
    statistics: Mapping[str, Mapping]

    @property
    def action_dims(self) -> np.ndarray:
        return np.array([len(source.config.action_normalization_mask) for source in self.sources])

    @property
    def sizes(self) -> np.ndarray:
        """Steps of each dataset: those of all splits, before any filter, as the reference counts them."""
        return np.array([self.statistics[source.name]["num_transitions"] for source in self.sources])

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
        """The datasets that have episodes in this split; "train" is a must for each, another split for at least one."""
        indices, errors = [], []
        for index, source in enumerate(self.sources):
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

        trajectories = read_episodes(self._traced[index], files, seed=seed, readers=readers)
        frames = trajectories.interleave(tf.data.Dataset.from_tensor_slices, cycle_length=readers)
        frames = frames.filter(keep).repeat()
        nothing = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), frames.element_spec)
        nothing |= {"dataset": tf.constant(index), "step": tf.constant(-1)}
        return frames.concatenate(tf.data.Dataset.from_tensors(nothing).repeat())

    @functools.cached_property
    def _traced(self) -> list[Traced]:
        """For each dataset: raw trajectory -> the columns of its frames."""
        width = max(self.action_dims)

        def columns(raw: dict, episode: tf.Tensor, index: int) -> dict:
            source = self.sources[index]
            full = traj.restructure(source.config, raw, episode, load_proprio=False)
            full = traj.normalize(full, self.statistics[source.name])
            return {
                "image": full["observation"]["image_primary"],
                "action": tf.pad(full["action"], [[0, 0], [0, width - self.action_dims[index]]]),
                "language": full["task"]["language_instruction"],
                "dataset": tf.fill(tf.shape(full["step"]), index),
                "episode": full["episode"],
                "step": full["step"],
            }

        return [trace(source, functools.partial(columns, index=i)) for i, source in enumerate(self.sources)]

    def expected_frames(self, split: str) -> int:
        """About how many frames a split has, all datasets together: as many per episode as on average."""
        total = 0.0
        for index in self.having(split):
            source = self.sources[index]
            part, whole = (sum(share.take for share in shares(source, name)) for name in (split, "all"))
            total += self.sizes[index] * part / whole
        return round(total)

    def mean_frame_bytes(self) -> float:
        """What a frame takes in memory while it is encoded, estimated from the first episodes of each dataset."""
        means = []
        for source, traced in zip(self.sources, self._traced, strict=True):
            with clear_errors([source]):
                first = list(read_episodes(traced, shares(source, "train")).take(4).as_numpy_iterator())
            strings = [text for full in first for key in ("image", "language", "episode") for text in full[key]]
            means.append(sum(map(len, strings)) / max(sum(len(full["step"]) for full in first), 1))
        return float(np.dot(self.probabilities, means)) + _FRAME_OVERHEAD


def open_mixture(data: Any, statistics: Mapping[str, Mapping] | None = None) -> Mixture:
    """The mixture that a data configuration names (dataset, data_dir), with statistics as given or as the
    configuration says (statistics: a JSON; statistics_dir: where computed ones are kept)."""
    if not data["data_dir"]:
        raise DataError("data.data_dir is not set: name the folder that holds the datasets")
    sources, weights = open_sources(data["dataset"], data["data_dir"])
    if statistics is None:
        path, cache_dir = data.get("statistics"), data.get("statistics_dir")
        statistics = {s.name: dataset_statistics(s, path=path, cache_dir=cache_dir) for s in sources}
    return Mixture(sources, weights, statistics)
