"""One RLDS dataset: its statistics, and its trajectories in one form."""

import hashlib
import logging
from collections.abc import Mapping, Sequence

import tensorflow as tf
from etils import epath

from openvla_jax.data import CorruptRecordError
from openvla_jax.data import statistics as stats
from openvla_jax.data import trajectory as traj
from openvla_jax.data.episodes import clear_errors, read_episodes, trace
from openvla_jax.data.oxe.datasets import DatasetConfig
from openvla_jax.data.source import Source, open_source, shares


def dataset_statistics(
    source: Source, *, path: str | Mapping | None = None, cache_dir: str | None = None, load_proprio: bool = False
) -> dict:
    """The statistics of a dataset, with the normalisation mask, checked.

    path: an existing JSON, of this dataset or of several, or what it holds. Otherwise the cache beside the data, or in
    cache_dir, is used, and filled by a pass over all splits where it is empty. Its key covers name, version, size
    and computation.
    Without load_proprio the statistics of the state are zeros, as in the reference.
    """
    mask = source.config.action_normalization_mask
    if path is not None:
        return stats.prepare(stats.load(path, source.name), source.name, mask, load_proprio)

    def numbers(raw: dict, episode: tf.Tensor) -> dict:
        full = traj.restructure(source.config, raw, views=(), load_proprio=load_proprio, load_language=False)
        result = {"action": full["action"], "step": full["step"], "episode": episode}
        return result | {key: full["observation"][key] for key in ("proprio",) if load_proprio}

    traced = trace(source, numbers)
    splits = [(name, split.num_examples, split.num_bytes) for name, split in source.info.splits.items()]
    key = hashlib.sha256(repr((source.name, str(source.info.version), sorted(splits), traced.key)).encode()).hexdigest()
    file_name = f"statistics_{source.name}_{source.info.version}_{key[:16]}.json"

    def compute() -> dict:
        logging.info("computing the statistics of dataset %r, one pass over its actions", source.name)
        files = shares(source, "all")
        with clear_errors([source]):
            passed = read_episodes(traced, files, seed=0, readers=8).prefetch(tf.data.AUTOTUNE)
            result = stats.summarize(passed.as_numpy_iterator(), source.name)
        missing = sum(share.take for share in files) - result["num_trajectories"]
        if missing:
            raise CorruptRecordError(
                f"dataset {source.name!r} ({source.directory}): {missing} episodes fewer than dataset_info.json says: "
                f"is the download complete?"
            )
        return result

    computed = stats.cached(file_name, [cache_dir or str(source.directory)], compute)
    return stats.prepare(computed, source.name, mask, load_proprio)


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
    load_language: bool = True,
    skip_unlabeled: bool = False,
    max_action: float | None = None,
    max_proprio: float | None = None,
    seed: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_parallel_reads: int = 4,
) -> tf.data.Dataset:
    """One pass over one dataset as standardised, normalised trajectories; images stay encoded.

    Elements are as `trajectory.py` describes them. dataset: a name of DATASETS or a configuration. split: "train",
    "val" (see `split_spec`), "all", or one of the dataset's own. statistics: those of this dataset, the path of a JSON,
    or None to compute or find them in the cache. seed: shuffles files; None keeps their order. Process
    process_index of process_count reads its own share of the episodes.
    Errors on opening: see `open_source`, `shares`, `restructure`, `dataset_statistics`; wrap the iteration in
    `clear_errors` to have those of reading told in one line.
    """
    source = open_source(dataset, data_dir)
    files = shares(source, split, process_index, process_count)
    if isinstance(statistics, Mapping):
        statistics = stats.prepare(statistics, source.name, source.config.action_normalization_mask, load_proprio)
    else:
        statistics = dataset_statistics(source, path=statistics, cache_dir=statistics_dir, load_proprio=load_proprio)

    def whole(raw: dict, episode: tf.Tensor) -> dict:
        full = traj.restructure(
            source.config,
            raw,
            episode,
            views=views,
            load_depth=load_depth,
            load_proprio=load_proprio,
            load_language=load_language,
        )
        return traj.normalize(full, statistics, normalization)

    def keep(full: dict) -> tf.Tensor:
        fits = traj.within(full, max_action, max_proprio)
        return traj.is_labeled(full) & fits if skip_unlabeled else fits

    filtered = skip_unlabeled or max_action is not None or max_proprio is not None
    return read_episodes(
        trace(source, whole), files, seed=seed, keep=keep if filtered else None, readers=num_parallel_reads
    )
