"""Small synthetic datasets with the schemas of Open X-Embodiment, to rehearse a mixture before it is downloaded."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from openvla_jax.data import DataError
from openvla_jax.data.ingest.writer import encode, write_dataset
from openvla_jax.data.oxe.schemas import SCHEMAS

VERSION = "0.1.0"
_TYPES = {"f": np.float32, "d": np.float64, "i": np.int32, "u": np.int64, "b": np.bool_}


def write_stand_in(name: str, data_dir: Path, *, episodes: int = 8, steps: int = 12, image_size: int = 64) -> Path:
    """Writes data_dir/<name>/0.1.0: random episodes with the raw features of that dataset of Open X-Embodiment.

    Images are noise on a colour, instructions name the dataset, numbers lie within 0.5 of 0, so that any four of them
    will do for a quaternion. Raises DataError for a dataset without a schema and FileExistsError where there is
    something already.
    """
    if name not in SCHEMAS:
        raise DataError(f"dataset {name!r} has no schema to make a stand-in of")
    schema = SCHEMAS[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))

    def generate(count: int) -> Iterator[dict]:
        for _ in range(count):
            colour = rng.integers(0, 200, 3)
            text = f"{rng.choice(['lift', 'push', 'open'])} the {name.split('_')[0]} thing {rng.integers(4)}"
            values = []
            for t in range(steps):
                step = {path: _value(kind, rng, colour, text, image_size) for path, kind in schema.items()}
                values.append(step | {"is_first": t == 0, "is_last": t == steps - 1, "is_terminal": t == steps - 1})
            yield {"steps": list(map(_nested, values)), "episode_metadata": {"file_path": f"stand-in of {name}"}}

    features = {
        "steps": tfds.features.Dataset(_nested({path: _feature(kind) for path, kind in schema.items()})),
        "episode_metadata": {"file_path": tfds.features.Text()},
    }
    return write_dataset(
        data_dir / name / VERSION,
        features,
        {"train": generate(episodes)},
        description=f"Random episodes with the schema of {name}.",
        episodes_per_file=-(-episodes // 4),
    )


def _shape(kind: str) -> tuple[int, ...]:
    return tuple(int(size) for size in kind[1:].split("x") if size)


def _feature(kind: str) -> Any:
    match kind[0]:
        case "j":
            return tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        case "s":
            return tfds.features.Text()
        case "p":
            return tfds.features.Tensor(shape=(), dtype=np.object_)
        case "c":
            return tfds.features.Tensor(shape=_shape(kind), dtype=np.int32)
        case letter:
            return tfds.features.Tensor(shape=_shape(kind), dtype=_TYPES[letter])


def _value(kind: str, rng: np.random.Generator, colour: np.ndarray, text: str, image_size: int) -> Any:
    match kind[0]:
        case "j":
            noise = rng.integers(0, 56, (image_size, image_size, 3))
            return encode((colour + noise).astype(np.uint8), "JPEG")
        case "s":
            return text
        case "p":
            return rng.uniform(-0.5, 0.5, _shape(kind)).astype(np.float32).tobytes()
        case "c":
            codes = np.zeros(_shape(kind), np.int32)
            codes[: len(text)] = list(map(ord, text))
            return codes
        case "b" | "i" | "u" as letter:
            return rng.integers(0, 2, _shape(kind)).astype(_TYPES[letter])
        case letter:
            return rng.uniform(-0.5, 0.5, _shape(kind)).astype(_TYPES[letter])


def _nested(flat: dict[str, Any]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *folders, key = path.split(" / ")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[key] = value
    return tree
