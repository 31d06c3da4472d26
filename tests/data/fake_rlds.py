"""Writes tiny genuine TFDS/RLDS datasets, well-formed or broken on purpose."""

import io
from pathlib import Path

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from openvla_jax.data.oxe.datasets import ActionEncoding, DatasetConfig, StateEncoding


def config(name: str = "fake", transform=lambda trajectory: trajectory, **changes) -> DatasetConfig:
    """The configuration of what `write` writes; the episodes are in standard form already."""
    fields = {
        "image_keys": {"primary": "image", "secondary": None, "wrist": None},
        "depth_keys": {"primary": None, "secondary": None, "wrist": None},
        "state_keys": ("state", None),
        "state_encoding": StateEncoding.POS_EULER,
        "action_encoding": ActionEncoding.EEF_POS,
    }
    return DatasetConfig(name=name, transform=transform, **(fields | changes))


def episode(
    number: int, steps: int = 5, action_dim: int = 7, instruction: str = "pick up the cup", size: int = 24
) -> dict:
    """Random, and another one for each number; the image of step t is gray of level (7 * number + t) % 256."""
    rng = np.random.default_rng(number)
    return {
        "steps": [
            {
                "observation": {
                    "image": np.full((size, size, 3), (7 * number + t) % 256, np.uint8),
                    "state": rng.standard_normal(6).astype(np.float32),
                },
                "action": rng.uniform(-1, 1, action_dim).astype(np.float32),
                "language_instruction": instruction,
                "is_first": t == 0,
            }
            for t in range(steps)
        ],
        "episode_metadata": {"file_path": f"episode {number}"},
    }


def features(action_dim: int = 7, image=None) -> tfds.features.FeaturesDict:
    """The schema of `episode`. image: another feature for the camera."""
    step = {
        "observation": {
            "image": image or tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "state": tfds.features.Tensor(shape=(6,), dtype=np.float32),
            "unused": {"camera": tfds.features.Image(shape=(None, None, 3))},
        },
        "action": tfds.features.Tensor(shape=(action_dim,), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        "is_first": np.bool_,
    }
    return tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(step), "episode_metadata": {"file_path": tfds.features.Text()}}
    )


def two_cameras(number: int, steps: int = 5) -> dict:
    """An episode whose wrist camera shows the negative of the primary one."""
    made = episode(number, steps=steps, instruction=f"pick up cube {number}")
    for step in made["steps"]:
        step["observation"]["wrist"] = 255 - step["observation"]["image"]
    return made


def two_camera_features() -> tfds.features.FeaturesDict:
    """The schema of `two_cameras`."""
    step = dict(features()["steps"].feature.items())
    wrist = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    step["observation"] = {**dict(step["observation"].items()), "wrist": wrist}
    metadata = {"file_path": tfds.features.Text()}
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(step), "episode_metadata": metadata})


def write(
    data_dir: Path, splits: dict[str, list[list[dict]]], name: str = "fake", version: str = "1.0.0", schema=None
) -> Path:
    """Writes data_dir/name/version and returns it. splits: split -> record files -> episodes.

    A step's image may be bytes, which are stored as they are.
    """
    schema = schema or features()
    folder = Path(data_dir) / name / version
    folder.mkdir(parents=True)
    infos = []
    for split, files in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="tfrecord"
        )
        sizes = 0
        for number, episodes in enumerate(files):
            path = template.sharded_filepath(shard_index=number, num_shards=len(files))
            with tf.io.TFRecordWriter(str(path)) as writer:
                for entry in episodes:
                    record = schema.serialize_example(schema.encode_example(_storable(entry)))
                    sizes += len(record)
                    writer.write(record)
        lengths = [len(episodes) for episodes in files]
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=sizes, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=schema, split_infos=infos, version=version, check_data=False
    )
    return folder


def _storable(entry: dict) -> dict:
    blank = np.zeros((1, 1, 3), np.uint8)
    steps = []
    for step in entry["steps"]:
        observation = {"unused": {"camera": blank}} | step["observation"]
        if isinstance(observation["image"], bytes):
            observation["image"] = io.BytesIO(observation["image"])
        steps.append(step | {"observation": observation})
    return entry | {"steps": steps}
