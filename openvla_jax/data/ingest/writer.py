"""Writes episodes as a TFDS/RLDS directory, as robot datasets are published and as `rlds` reads them."""

import contextlib
import io
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from openvla_jax.data import DataError
from openvla_jax.errors import reason

tf.config.set_visible_devices([], "GPU")  # TensorFlow only writes files; it must not take the accelerator's memory

kinds = tfds.features  # what features may be, for those who describe a dataset without importing TensorFlow
# TFDS rewrites its description after every call, so episodes are handed over together: so many, or so many bytes.
_AT_ONCE, HELD_BYTES = 100, 256 * 2**20
# An episode is one record, a protobuf, and these hold less than 2 GiB. The rest is for the names of its fields.
MAX_EPISODE_BYTES = 2 * 10**9
_LEAF = 16  # bytes around a value in a record, at most
# Flags of RLDS: the last step of an episode is terminal where the task ended there and not just the recording.
FLAGS = {
    "reward": tfds.features.Scalar(np.float32),
    "discount": tfds.features.Scalar(np.float32),
    "is_first": tfds.features.Scalar(np.bool_),
    "is_last": tfds.features.Scalar(np.bool_),
    "is_terminal": tfds.features.Scalar(np.bool_),
}


def flags(step: int, length: int) -> dict:
    """The values of FLAGS for step `step` of a demonstration: 1 is paid at its end."""
    last = step == length - 1
    return {"reward": float(last), "discount": 1.0, "is_first": step == 0, "is_last": last, "is_terminal": last}


def encode(image: np.ndarray, format: str = "PNG") -> io.BytesIO:
    """uint8 [H, W, 3] -> an encoded image that TFDS stores as it is: its own encoder takes several times as long.

    JPEG has quality 95, as TFDS's own.
    """
    stream = io.BytesIO()
    Image.fromarray(image).save(
        stream, format=format, **({"PNG": {"compress_level": 1}, "JPEG": {"quality": 95}}[format])
    )
    return io.BytesIO(stream.getvalue())  # of its exact size: TFDS then reads it without a copy


def write_dataset(
    directory: Path,
    features: Mapping[str, Any],
    splits: Mapping[str, Iterable[dict]],
    *,
    description: str,
    episodes_per_file: int = 100,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda episodes: None,
) -> Path:
    """Writes directory, DATA_DIR/<name>/<version>, from episodes ({"steps": [step, ...], ...}) and returns it.

    Args:
        directory: appears when it is complete; after an error nothing is left of it.
        features: of an example, as for tfds.features.FeaturesDict.
        splits: name -> episodes, drawn one after the other.
        description: what the dataset is.
        episodes_per_file: at most.
        metadata: kept in metadata.json.
        progress: told the number of episodes now and then.

    Raises:
        FileExistsError: something is there already.
        DataError: a split without episodes; an episode that does not fit the features or is longer than
            MAX_EPISODE_BYTES; a disk that is full or cannot be written.
    """
    pairs = ((split, episode) for split, episodes in splits.items() for episode in episodes)
    return write_interleaved(
        directory,
        features,
        list(splits),
        pairs,
        description=description,
        episodes_per_file=episodes_per_file,
        metadata=metadata,
        progress=progress,
    )


def write_interleaved(
    directory: Path,
    features: Mapping[str, Any],
    splits: Sequence[str],
    episodes: Iterable[tuple[str, dict]],
    *,
    description: str,
    episodes_per_file: int = 100,
    metadata: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda episodes: None,
) -> Path:
    """As `write_dataset`, from pairs (split, episode) in any order.

    Memory: at most HELD_BYTES and six times the longest episode, encoded. Episodes of HELD_BYTES wait to be written,
    and one more; while TFDS writes an episode it holds several copies.
    """
    name, version = directory.parent.name, directory.name
    with all_or_nothing(directory):
        with writing(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(prefix=f"{version}.incomplete.", dir=directory.parent)
        with temporary as folder:
            incomplete = Path(folder) / version
            incomplete.mkdir()
            identity = tfds.core.DatasetIdentity(
                name=name, version=version, data_dir=str(incomplete), module_name="openvla_jax.data.ingest.writer"
            )
            info = tfds.core.DatasetInfo(
                builder=identity,
                description=description,
                features=tfds.features.FeaturesDict(dict(features)),
                metadata=tfds.core.MetadataDict(metadata or {}),
            )
            writer = tfds.core.SequentialWriter(info, max_examples_per_shard=episodes_per_file)
            with writing(directory):
                writer.initialize_splits(list(splits))
            counts: Counter[str] = Counter()
            for group in _groups(episodes, f"dataset {name!r}"):
                with writing(directory):
                    _add(writer, info.features, group, f"dataset {name!r}", counts)
                progress(counts.total())
            for split in splits:
                if not counts[split]:
                    raise DataError(f"dataset {name!r}: split {split!r} has no episodes")
            with writing(directory):
                writer.close_all()
                incomplete.rename(directory)
    return directory


def _groups(episodes: Iterable[tuple[str, dict]], dataset: str) -> Iterator[list[tuple[str, dict]]]:
    group: list[tuple[str, dict]] = []
    held = 0
    for number, (split, episode) in enumerate(episodes):
        size = _size(episode)
        if size > MAX_EPISODE_BYTES:
            raise DataError(too_long(f"{dataset}, split {split!r}, episode {number}", len(episode["steps"]), size))
        group.append((split, episode))
        held += size
        if len(group) == _AT_ONCE or held >= HELD_BYTES:
            yield group
            group, held = [], 0
    if group:
        yield group


def _add(
    writer: tfds.core.SequentialWriter,
    features: tfds.features.FeaturesDict,
    group: list[tuple[str, dict]],
    dataset: str,
    counts: Counter[str],
) -> None:
    by_split: dict[str, list[dict]] = {}
    for split, episode in group:
        by_split.setdefault(split, []).append(episode)
    try:
        writer.add_examples(by_split)
    except (OSError, tf.errors.OpError):  # the disk
        raise
    except Exception as error:
        for split, some in by_split.items():
            for number, episode in enumerate(some, counts[split]):
                if misfit := _misfit(features, episode):
                    where = f"{dataset}, split {split!r}, episode {number}"
                    raise DataError(f"{where} does not fit the features: {misfit}") from error
        raise DataError(f"{dataset}: an episode cannot be stored ({reason(error)})") from error
    counts.update({split: len(some) for split, some in by_split.items()})
    group.clear()


def _misfit(feature: Any, value: Any, path: str = "") -> str:
    """Names the first part of an example that its feature cannot encode, what was expected and what came."""
    if isinstance(feature, tfds.features.FeaturesDict) and isinstance(value, Mapping):
        if missing := sorted(feature.keys() - value.keys()):
            return f"{path or 'the example'} has no {missing[0]!r}"
        if unknown := sorted(value.keys() - feature.keys()):
            return f"{path or 'the example'} has {unknown[0]!r}, which the features lack"
        parts = ((inner, value[key], f"{path}/{key}".lstrip("/")) for key, inner in feature.items())
        return next(filter(None, (_misfit(*part) for part in parts)), "")
    if isinstance(feature, tfds.features.Dataset) and isinstance(value, list | tuple):
        return next(filter(None, (_misfit(feature.feature, v, f"{path}/{i}") for i, v in enumerate(value))), "")
    try:
        feature.encode_example(value)
    except Exception:  # whatever TFDS raises
        came = f"{value.dtype} of shape {value.shape}" if isinstance(value, np.ndarray) else repr(value)[:80]
        return f"{path} is {type(value).__name__} {came}, expected {' '.join(repr(feature).split())}"
    return ""


def _size(value: Any) -> int:
    """About how many bytes a part of an example takes in a record, rather more than less."""
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    if isinstance(value, io.BytesIO):
        return value.getbuffer().nbytes + _LEAF
    if isinstance(value, np.ndarray):
        return value.nbytes + _LEAF
    return (len(value) if isinstance(value, str | bytes) else 0) + _LEAF


def too_long(where: str, steps: int, size: float) -> str:
    """Says that an episode of so many steps, `size` bytes, does not fit a record, and how many steps would."""
    fit = int(0.95 * steps * MAX_EPISODE_BYTES / size)  # numbers and names of fields may not be counted yet
    return (
        f"{where} takes {size / 1e9:.3g} GB in {steps:,} steps, more than the {MAX_EPISODE_BYTES / 1e9:.3g} GB of a "
        f"record: split it into episodes of at most {fit:,} steps, or shrink its frames"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def all_or_nothing(path: Path) -> Iterator[None]:
    """Removes `path`, which the block makes, and folders that were made for it, if the block fails.

    Raises FileExistsError if there is something at `path` already.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already: remove it, or choose another place")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        for folder in missing:
            with contextlib.suppress(OSError):  # not empty: another process uses it
                folder.rmdir()
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of the disk inside the block into one line that names `path`.

    Raises DataError for what the file system, or TensorFlow on its behalf, raises.
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        cause = error.message.rpartition("; ")[2] if isinstance(error, tf.errors.OpError) else error.strerror
        fix = "free space, check the permissions, or choose another folder"
        raise DataError.of(path, f"cannot be written: {cause or reason(error)}", fix) from error
