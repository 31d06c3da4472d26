"""Parsers of `openvla_jax.data`: npz episodes, records, the metadata of datasets, statistics."""

import atexit
import functools
import io
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from openvla_jax.data import statistics
from tests.fuzz.harness import Target

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # fake_rlds

MASK = (True,) * 6 + (False,)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# npz
# ---------------------------------------------------------------------------------------------------------------------


def _npz_seeds() -> Sequence[bytes]:
    import openvla_jax.data.ingest.npz  # noqa: F401  (takes longer than an input may)

    rng = np.random.default_rng(0)
    arrays = {
        "action": rng.normal(size=(4, 7)).astype(np.float32),
        "image": rng.integers(0, 255, (4, 8, 8, 3), dtype=np.uint8),
        "state": rng.normal(size=(4, 2)),
    }
    seeds = []
    for save, text in ((np.savez, np.array("pick up the cup")), (np.savez_compressed, np.array([b"lift it"] * 4))):
        file = io.BytesIO()
        save(file, **arrays, language_instruction=text)
        seeds.append(file.getvalue())
    return seeds


def _npz(data: bytes) -> None:
    from openvla_jax.data.ingest.npz import read_episode

    path = _folder() / "episode.npz"
    path.write_bytes(data)
    episode = read_episode(path, "pick up the cup")
    for frames in episode.cameras.values():
        for _ in frames:
            pass


def _npz_declared(data: bytes) -> int:
    from openvla_jax.data.ingest.npz import MAX_BYTES

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return min(sum(member.file_size for member in archive.infolist()), MAX_BYTES)
    except Exception:  # no archive declares nothing
        return 0


# ---------------------------------------------------------------------------------------------------------------------
# RLDS
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _dataset() -> Path:
    """The version folder of a small dataset of two episodes."""
    import fake_rlds

    return fake_rlds.write(_folder(), {"train": [[fake_rlds.episode(i, steps=3, size=8) for i in range(2)]]})


@functools.cache
def _reads_record() -> Callable[[bytes], None]:
    import fake_rlds
    import tensorflow as tf

    from openvla_jax.data import episodes, pipeline
    from openvla_jax.data.source import open_source

    source = open_source(fake_rlds.config(), str(_dataset().parents[1]))
    traced = pipeline.compose(source, load_proprio=True)

    @tf.function(input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    def parse(record):
        raw = episodes._raw(episodes._parse(traced.features, record))
        return traced.function(episodes._with_stand_ins(raw, traced.raw_spec), tf.constant("file#0"))

    def read(data: bytes) -> None:
        with episodes.explain_errors([source]):
            parse(tf.constant(data))

    return read


def _record_seeds() -> Sequence[bytes]:
    import tensorflow as tf

    (path,) = _dataset().glob("*.tfrecord*")
    seeds = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    _reads_record()(seeds[0])  # traces it
    return seeds


def _metadata(name: str, data: bytes) -> None:
    """Opens a dataset one of whose JSON files has other content."""
    import fake_rlds

    from openvla_jax.data.source import episode_ranges, open_source

    whole = _dataset()
    folder = _folder() / f"with_{name}" / whole.parent.name / whole.name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("dataset_info.json", "features.json"):
        (folder / file).write_bytes(data if file == name else (whole / file).read_bytes())
    source = open_source(fake_rlds.config(), str(folder.parents[1]))
    _ = source.image_sizes, source.splits
    episode_ranges(source, "train")


def _metadata_target(name: str, tokens: Sequence[bytes]) -> Target:
    return Target(
        name=f"data_{name.removesuffix('.json')}",
        seeds=lambda: [(_dataset() / name).read_bytes()],
        parse=functools.partial(_metadata, name),
        tokens=(*_JSON, *tokens),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------

_JSON = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"NaN", b"-Infinity", b"1e999", b"true", b"-1", b"[" * 200)


def _statistics_seeds() -> Sequence[bytes]:
    fields = {"mean": [0.0], "std": [1.0], "max": [1.0], "min": [-1.0], "q01": [-0.9], "q99": [0.9]}
    action = {field: value * 7 for field, value in fields.items()}
    proprio = {field: value * 2 for field, value in fields.items()} | {"names": ["state_0", "state_1"]}
    one = {"action": action, "proprio": proprio, "num_transitions": 50, "num_trajectories": 3}
    several = {"other": one, "mine": one | {"action": action | {"mask": list(MASK)}}}
    return [json.dumps(one).encode(), json.dumps(several).encode()]


def _statistics(data: bytes) -> None:
    path = _folder() / "statistics.json"
    path.write_bytes(data)
    prepared = statistics.prepare(statistics.load(str(path), "mine"), "mine", MASK, with_proprio=True)
    selected = statistics.select_state(prepared, "mine", ("state_0", "state_1"), ("state_1",))
    statistics.table({"mine": selected})


TARGETS = {
    target.name: target
    for target in (
        Target(
            "data_npz", _npz_seeds, _npz, _npz_declared, (b"PK\x03\x04", b"\x93NUMPY", b"'shape': (", b"'|O'", b"<U4")
        ),
        Target("data_record", _record_seeds, lambda data: _reads_record()(data)),
        _metadata_target("dataset_info.json", (b'"splits"', b'"shardLengths"', b'"filepathTemplate"', b'"fileFormat"')),
        _metadata_target("features.json", (b'"pythonClassName"', b'"dimensions"', b'"dtype"', b'"sequence"')),
        Target("data_statistics", _statistics_seeds, _statistics, tokens=(*_JSON, b'"action"', b'"q01"', b"9" * 400)),
    )
}
