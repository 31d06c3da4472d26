"""One RLDS dataset: its statistics, and its trajectories in one form."""

import hashlib
import logging
from collections.abc import Mapping, Sequence

import tensorflow as tf
from etils import epath

from openvla_jax.data import CorruptRecordError, pipeline
from openvla_jax.data import statistics as stats
from openvla_jax.data import trajectory as traj
from openvla_jax.data.episodes import explain_errors, read_episodes
from openvla_jax.data.oxe.datasets import DatasetConfig
from openvla_jax.data.source import Source, episode_ranges, open_source


def dataset_statistics(
    source: Source,
    *,
    path: str | Mapping | None = None,
    cache_dir: str | None = None,
    load_proprio: bool = False,
    state: Sequence[str] = (),
) -> dict:
    """Returns the statistics of a dataset, checked, with the normalisation mask (see `statistics.prepare`).

    Args:
      source: the opened dataset.
      path: a JSON file of this dataset or of several, or what it holds. None uses the cache, which is filled by a pass
        over all splits if it is empty. Its key covers name, version, size and computation.
      cache_dir: the folder of the cache; None is the dataset's own.
      load_proprio: also the statistics of the state; without it they are zeros, as in the reference.
      state: names of the state's columns that are wanted, in order; () takes all, as the dataset has them.

    Raises:
      StatisticsError: the file is missing or malformed, or does not fit the dataset's actions or state.
      CorruptRecordError: records are damaged or missing.
      BadActionError: an action or state is NaN or infinite, or a gripper outside its declared range.
      DataError: the dataset has no steps or no such state column, or its transform fails.
    """
    config = source.config
    traj.check_state(config, state)

    def prepared(statistics: Mapping) -> dict:
        result = stats.prepare(statistics, source.name, config.action_normalization_mask, load_proprio)
        return stats.select_state(result, source.name, config.state_names, state) if state else result

    if path is not None:
        return prepared(stats.load(path, source.name))

    def numbers(full: traj.Trajectory, episode: tf.Tensor) -> dict:
        result = {"action": full["action"], "step": full["step"], "episode": episode}
        return result | {key: full["observation"][key] for key in ("proprio",) if load_proprio}

    traced = pipeline.compose(source, views=(), load_proprio=load_proprio, load_language=False, then=numbers)
    splits = [(name, split.num_examples, split.num_bytes) for name, split in source.info.splits.items()]
    key = hashlib.sha256(repr((source.name, str(source.info.version), sorted(splits), traced.key)).encode()).hexdigest()
    file_name = f"statistics_{source.name}_{source.info.version}_{key[:16]}.json"

    def compute() -> dict:
        logging.info("computing the statistics of dataset %r, one pass over its actions", source.name)
        files = episode_ranges(source, "all")
        with explain_errors([source]):
            passed = read_episodes(traced, files, seed=0, readers=8).prefetch(tf.data.AUTOTUNE)
            result = stats.summarize(passed.as_numpy_iterator(), source.name, config.grippers)
        missing = sum(run.take for run in files) - result["num_trajectories"]
        if missing:
            raise CorruptRecordError(
                f"dataset {source.name!r} ({source.directory}): {missing} episodes fewer than dataset_info.json says: "
                f"is the download complete?"
            )
        return result

    return stats.cached(file_name, [cache_dir or str(source.directory)], compute, prepared)


def make_dataset(
    dataset: str | DatasetConfig,
    data_dir: epath.PathLike,
    split: str = "train",
    *,
    statistics: Mapping | str | None = None,
    statistics_dir: str | None = None,
    normalization: str = "bounds_q99",
    views: Sequence[str] = ("primary",),
    load_depth: bool = False,
    load_proprio: bool = True,
    state: Sequence[str] = (),
    load_language: bool = True,
    skip_unlabeled: bool = False,
    max_action: float | None = None,
    max_proprio: float | None = None,
    seed: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_parallel_reads: int = 4,
) -> tf.data.Dataset:
    """Returns one pass over one dataset as standardised, normalised trajectories; images stay encoded.

    Elements are as `trajectory.py` describes them. Wrap the iteration in `episodes.explain_errors` to have errors while
    reading in one line.

    Args:
      dataset: a name of DATASETS, or a configuration.
      data_dir: the folder that holds the dataset, the dataset's own folder, or that of one version; local or remote.
      split: "train", "val" (see `source.split_spec`), "all", or one of the dataset's own.
      statistics: of this dataset, or the path of a JSON, or None to compute them or find them in the cache.
      statistics_dir: the folder of the cache; None is the dataset's own.
      normalization: "bounds_q99", "bounds" or "normal" (see `trajectory.normalize`).
      views: cameras to load; () loads none. Those without a key in the configuration are empty strings.
      load_depth: also loads the depth images of these views.
      load_proprio: loads the state as observation/proprio.
      state: names of the state's columns to keep, in this order; () keeps all.
      load_language: loads the instruction.
      skip_unlabeled: leaves out trajectories without any instruction.
      max_action, max_proprio: leave out trajectories with a larger |value| of the normalised action or state.
      seed: shuffles the files; None keeps their order.
      process_index, process_count: which share of the episodes is read.
      num_parallel_reads: record files read at once.

    Raises:
      DatasetNotFoundError, SplitNotFoundError: there is no such dataset or split.
      DataError: an unknown name, view or state column; data that are not RLDS; a transform that fails or is random.
      StatisticsError: statistics are missing or do not fit.
      CorruptRecordError, BadActionError: while statistics are computed (see `dataset_statistics`).
      ValueError: an unknown normalisation.
    """
    source = open_source(dataset, data_dir)
    files = episode_ranges(source, split, process_index, process_count)
    statistics = dataset_statistics(
        source,
        path=statistics,
        cache_dir=statistics_dir,
        load_proprio=load_proprio,
        state=state if load_proprio else (),
    )
    traced = pipeline.compose(
        source,
        views=views,
        load_depth=load_depth,
        load_proprio=load_proprio,
        state=state,
        load_language=load_language,
        statistics=statistics,
        normalization=normalization,
    )

    def keep(full: dict) -> tf.Tensor:
        fits = traj.within(full, max_action, max_proprio)
        return traj.is_labeled(full) & fits if skip_unlabeled else fits

    filtered = skip_unlabeled or max_action is not None or max_proprio is not None
    return read_episodes(traced, files, seed=seed, keep=keep if filtered else None, readers=num_parallel_reads)
