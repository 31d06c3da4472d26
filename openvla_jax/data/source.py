"""TFDS/RLDS directories: finding and opening them, their splits, and each process's share of the episodes."""

import re
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from openvla_jax.config import nearest
from openvla_jax.data import DataError, DatasetNotFoundError, SplitNotFoundError
from openvla_jax.data.oxe.datasets import DATASETS, DatasetConfig
from openvla_jax.errors import reading

tf.config.set_visible_devices([], "GPU")  # TensorFlow only feeds; it must not take the accelerator's memory

# Names under which people have the same data on disk. OpenVLA's documented download renames bridge_dataset.
_FIX = "are dataset_info.json and features.json complete?"
ALIASES = {"bridge_orig": ("bridge_dataset",), "bridge_dataset": ("bridge_orig",), "bridge_oxe": ("bridge",)}

# ---------------------------------------------------------------------------------------------------------------------
# Finding and opening
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """An opened dataset: its configuration, its version folder and TFDS's description of it."""

    config: DatasetConfig
    directory: epath.Path
    info: tfds.core.DatasetInfo

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def splits(self) -> dict[str, int]:
        """Episodes per split, as the dataset declares them."""
        return {name: split.num_examples for name, split in self.info.splits.items()}

    @property
    def image_sizes(self) -> set[tuple[int, int]]:
        """(height, width) of cameras, as far as the dataset declares them."""
        columns = tf.nest.flatten(self.info.features["steps"].feature.get_tensor_info())
        shapes = {tuple(column.shape) for column in columns if column.np_dtype == np.uint8}
        return {shape[:2] for shape in shapes if len(shape) == 3 and shape[2] == 3 and None not in shape}


def find(name: str, data_dir: epath.PathLike) -> epath.Path:
    """The version folder of a dataset, local or remote: the highest version under data_dir/<name>.

    The folder may have one of the dataset's other names (ALIASES), and data_dir may itself be the folder of the dataset
    or of one version; what the dataset calls itself does not matter in the first case. Raises DatasetNotFoundError,
    which lists what is there and the nearest name.
    """
    root = epath.Path(data_dir).expanduser()
    names = (name, *ALIASES.get(name, ()))
    if not root.is_dir():
        raise DatasetNotFoundError(
            f"data_dir {str(root)!r} is not a folder: set data.data_dir to the folder that holds {name}/<version>"
        )
    if (root / "dataset_info.json").exists():  # a version folder
        if root.parent.name in names or _own_name(root) in names:
            return root
        raise DatasetNotFoundError(f"data_dir {str(root)!r} holds dataset {_own_name(root)!r}, not {name!r}")
    for folder in (root / other for other in names):
        if folder.is_dir():
            versions = _versions(folder)
            if versions:
                return versions[-1]
            raise DatasetNotFoundError(
                f"dataset {name!r}: {folder} has no <version>/dataset_info.json (is the download complete?); it holds "
                f"{_listing(folder)}"
            )
    versions = _versions(root) if root.name in names else _direct_versions(root)
    if versions and (root.name in names or _own_name(versions[-1]) in names):
        return versions[-1]
    present = [child.name for child in root.iterdir()]
    raise DatasetNotFoundError(f"dataset {name!r} is not in {str(root)!r}; {nearest(name, present)}")


def _versions(folder: epath.Path) -> list[epath.Path]:
    """Version folders, lowest first; directly inside, or one level down where the dataset has a single TFDS config."""
    found = _direct_versions(folder)
    if not found:
        nested = [versions for versions in map(_direct_versions, _folders(folder)) if versions]
        if len(nested) > 1:
            names = ", ".join(sorted(versions[0].parent.name for versions in nested))
            raise DatasetNotFoundError(f"{folder} holds several builds ({names}): point data.data_dir at one of them")
        found = nested[0] if nested else []
    return found


def _direct_versions(folder: epath.Path) -> list[epath.Path]:
    found = [child for child in _folders(folder) if re.fullmatch(r"\d+\.\d+\.\d+", child.name)]
    found = [child for child in found if (child / "dataset_info.json").exists()]
    return sorted(found, key=lambda child: tuple(map(int, child.name.split("."))))


def _folders(folder: epath.Path) -> list[epath.Path]:
    return [child for child in folder.iterdir() if child.is_dir()]


def _own_name(version: epath.Path) -> str:
    with reading(version / "dataset_info.json", _FIX, DataError):
        return tfds.core.dataset_info.read_proto_from_builder_dir(version).name


def _listing(folder: epath.Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    return (", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")) or "nothing"


def open_source(dataset: str | DatasetConfig, data_dir: epath.PathLike) -> Source:
    """Opens a dataset by name (of DATASETS) or configuration; nothing is read yet but its description.

    Raises DataError for an unknown name (with the nearest known), for a folder that TFDS cannot open, and for data
    that are not RLDS; DatasetNotFoundError where there is no such folder.
    """
    if isinstance(dataset, str):
        if dataset not in DATASETS:
            raise DataError(
                f"dataset {dataset!r} has no configuration: pass a DatasetConfig, or fix the name; "
                f"{nearest(dataset, DATASETS)}"
            )
        dataset = DATASETS[dataset]
    directory = find(dataset.name, data_dir)
    with reading(directory, _FIX, DataError):
        info = tfds.builder_from_directory(directory).info
        features, file_format = info.features, info.file_format
        for name, split in info.splits.items():
            _ = split.file_instructions  # raises if the names of its files make no sense
            if min(split.shard_lengths or [0]) < 0:
                raise DataError.of(directory, f"split {name!r} declares fewer than 0 episodes", _FIX)
    steps = dict(features).get("steps") if isinstance(features, tfds.features.FeaturesDict) else None
    if not isinstance(steps, tfds.features.Dataset) or not isinstance(steps.feature, tfds.features.FeaturesDict):
        raise DataError(f"dataset {dataset.name!r}: {directory} has no dataset of 'steps' per example: it is not RLDS")
    if file_format != tfds.core.FileFormat.TFRECORD:
        raise DataError(f"dataset {dataset.name!r}: {directory} is stored as {file_format.value}, not as tfrecord")
    return Source(dataset, directory, info)


# ---------------------------------------------------------------------------------------------------------------------
# Splits and shares
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EpisodeRange:
    """The part of a record file that one process reads: episodes skip .. skip + take."""

    path: str
    skip: int
    take: int


def split_spec(source: Source, split: str) -> str:
    """TFDS's name for a split: "train" and "val" are those of the dataset, or the first 95 % and last 5 % of its
    "train" where it has no "val", as in the reference; "all" and slices such as "train[:10]" pass through."""
    if split in ("train", "val") and "val" not in source.splits:
        return {"train": "train[:95%]", "val": "train[95%:]"}[split]
    return split


def episode_ranges(source: Source, split: str, process_index: int = 0, process_count: int = 1) -> list[EpisodeRange]:
    """What this process reads of a split: contiguous runs of episodes, equal to within one, disjoint and covering.

    Where there are fewer episodes than processes, process p reads episode p modulo their number.
    Raises SplitNotFoundError for a split that is not there or has no episodes.
    """
    spec = split_spec(source, split)
    split_name = spec.split("[")[0]
    if split_name != "all" and split_name not in source.splits:
        raise SplitNotFoundError(
            f"dataset {source.name!r} ({source.directory}) has no split {split_name!r}; it has "
            f"{', '.join(source.splits) or 'none'}"
        )
    with reading(f"{source.directory}, split {spec!r}", "name a split or a part, as in train[:10]", DataError):
        files = source.info.splits[spec].file_instructions if sum(source.splits.values()) else []
    runs = [EpisodeRange(str(file.filename), file.skip, file.take) for file in files]
    if not sum(run.take for run in runs):
        raise SplitNotFoundError(
            f"dataset {source.name!r} ({source.directory}): split {spec!r} has no episodes{_advice(source, split)}"
        )
    return _part(runs, process_index, process_count)


def _advice(source: Source, split: str) -> str:
    """How to go on if there are too few episodes to hold any out."""
    if split != "val" or "val" in source.splits:
        return ""
    return (
        f": 5% of {source.splits.get('train', 0)} episodes are none; set train.eval_every=0 to train without "
        f"validation, or hold some out in a split 'val' (--val_share of from-npz and from-lerobot)"
    )


def _part(runs: list[EpisodeRange], index: int, count: int) -> list[EpisodeRange]:
    total = sum(run.take for run in runs)
    start, stop = index * total // count, (index + 1) * total // count
    if total < count:
        start, stop = index % total, index % total + 1
    result, position = [], 0
    for run in runs:
        first, last = max(start, position), min(stop, position + run.take)
        if first < last:
            result.append(EpisodeRange(run.path, run.skip + first - position, last - first))
        position += run.take
    return result
