"""Writes episodes as a TFDS/RLDS directory, as robot datasets are published and as `rlds` reads them."""

import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from openvla_jax.data import DataError

tf.config.set_visible_devices([], "GPU")  # TensorFlow only writes files; it must not take the accelerator's memory

kinds = tfds.features  # what features may be, for those who describe a dataset without importing TensorFlow
_AT_ONCE = 100  # episodes; TFDS rewrites its description after every call
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
    stream.seek(0)
    return stream


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

    features: of an example, as for tfds.features.FeaturesDict. splits: name -> episodes, drawn one after the other.
    metadata: kept in metadata.json. progress: told the number of episodes after each. The dataset appears when it is
    complete. Raises FileExistsError where something is there already, DataError for a split without episodes and for
    an episode that does not fit the features.
    """
    name, version = directory.parent.name, directory.name
    if directory.exists():
        raise FileExistsError(f"{directory} exists already: remove it, or choose another place")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{version}.incomplete.", dir=directory.parent) as folder:
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
        writer.initialize_splits(list(splits))
        total = 0
        for split, episodes in splits.items():
            before, source = total, iter(episodes)
            while some := list(itertools.islice(source, _AT_ONCE)):
                try:
                    writer.add_examples({split: some})
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    reason = str(error).splitlines()[0]
                    raise DataError(
                        f"dataset {name!r}, split {split!r}: one of episodes {total - before} to "
                        f"{total - before + len(some) - 1} does not fit the features ({reason})"
                    ) from error
                total += len(some)
                progress(total)
            if total == before:
                raise DataError(f"dataset {name!r}: split {split!r} has no episodes")
        writer.close_all()
        incomplete.rename(directory)
    return directory
