"""Mixtures: opening, weights and the stream of frames."""

import dataclasses
from collections import Counter

import fake_rlds
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from openvla_jax.data import DataError, DatasetNotFoundError, SplitNotFoundError
from openvla_jax.data.memory import estimate
from openvla_jax.data.mixture import Mixture, check_cameras, nominal_length, open_phases, open_sources, probabilities
from openvla_jax.data.oxe import DATASETS, ActionEncoding
from openvla_jax.data.source import Source, open_source


def _configs(**changes):
    return {name: fake_rlds.config(name, **changes.get(name, {})) for name in ("a", "b", "c")}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Datasets of 12 and 30 frames; "b" has actions of width 14 and no held-out episodes."""
    data_dir = tmp_path_factory.mktemp("data")
    train = [[fake_rlds.episode(i, steps=4)] for i in range(2)]
    fake_rlds.write(data_dir, {"train": train, "val": [[fake_rlds.episode(2, steps=4)]]}, name="a")
    train = [[fake_rlds.episode(10 + i, steps=6, action_dim=14)] for i in range(5)]
    fake_rlds.write(data_dir, {"train": train}, name="b", schema=fake_rlds.features(action_dim=14))
    return str(data_dir)


@pytest.fixture(scope="module")
def mixture(data_dir):
    configs = _configs(b={"action_encoding": ActionEncoding.JOINT_POS_BIMANUAL})
    sources, weights = open_sources(("a", "b"), data_dir, configs), np.array([1.0, 0.5])
    statistics = {}
    for source, size in zip(sources, (12, 30), strict=True):
        width = len(source.config.action_normalization_mask)
        bounds = {"min": [-1.0], "q01": [-1.0], "max": [1.0], "q99": [1.0], "mean": [0.0], "std": [1.0]}
        action = {key: value * width for key, value in bounds.items()}
        statistics[source.name] = {"action": action, "num_transitions": size, "num_trajectories": 3}
    return Mixture(sources, weights, statistics)


# ---------------------------------------------------------------------------------------------------------------------
# Opening and weights
# ---------------------------------------------------------------------------------------------------------------------


def test_all_missing_datasets_are_listed_at_once(data_dir):
    configs = _configs() | {"d": fake_rlds.config("d")}
    message = r"2 of 3 datasets are missing: dataset 'c' .*; dataset 'd' .*"
    with pytest.raises(DatasetNotFoundError, match=message) as caught:
        open_sources(("c", "a", "d"), data_dir, configs)
    assert "\n" not in str(caught.value)
    with pytest.raises(DatasetNotFoundError, match=r"^dataset 'kuka' is not in"):
        open_sources(("kuka",), data_dir)
    with pytest.raises(ValueError, match="oxe_magic_soup"):
        open_phases({"dataset": "oxe_magic_soop", "data_dir": data_dir})


def test_open_sources_leaves_out_or_refuses_what_cannot_be_trained_on(data_dir, caplog):
    configs = _configs(b={"action_encoding": ActionEncoding.JOINT_POS})
    assert [source.name for source in open_sources(("a", "b"), data_dir, configs)] == ["a"]
    assert "dataset 'b' has JOINT_POS actions" in caplog.text
    with pytest.raises(DataError, match="nothing to train on: dataset 'b' has JOINT_POS actions"):
        open_sources(("b",), data_dir, configs)


def test_check_cameras_refuses_unknown_cameras_and_datasets_without_any(data_dir):
    wrist = {"image_keys": {"primary": None, "secondary": None, "wrist": "image"}}
    sources = open_sources(("a", "b"), data_dir, _configs(a=wrist))
    with pytest.raises(DataError, match=r"dataset 'a' has no primary camera \(only: wrist\): leave it out"):
        check_cameras(sources, ("primary",))
    with pytest.raises(DataError, match=r"dataset 'b' has none of the cameras wrist, secondary \(only: primary\)"):
        check_cameras(sources, ("wrist", "secondary"))
    check_cameras(sources, ("primary", "wrist"))  # each has one of them
    with pytest.raises(
        DataError, match=r"observation.cameras has 'wrst', which no dataset knows; did you mean 'wrist'"
    ):
        check_cameras(sources, ("primary", "wrst"))


@pytest.mark.parametrize("name", ["bridge_orig", "bridge", (("bridge_orig", 1.0),)])
def test_open_phases_takes_a_dataset_a_mixture_or_pairs(shared, tmp_path, name):
    data = {"dataset": name, "data_dir": str(shared / "data"), "statistics_dir": str(tmp_path)}
    (phase,) = open_phases(data, statistics={"bridge_orig": {}})
    assert [source.config for source in phase.mixture.sources] == [DATASETS["bridge_orig"]]
    assert phase.mixture.weights.tolist() == [1.0]


def test_weights_count_relative_to_size():
    chances = probabilities(np.array([1.0, 0.5, 2.0]), np.array([100, 400, 50]))
    np.testing.assert_allclose(chances, [0.25, 0.5, 0.25])
    # 100 frames at 1/4 are 400 draws; the dataset of weight 2.0 and 50 frames would be through after 200
    assert nominal_length(np.array([1.0, 0.5, 2.0]), np.array([100, 400, 50])) == 400
    assert nominal_length(np.array([1.0]), np.array([123])) == 123
    assert nominal_length(np.array([0.5, 0.25]), np.array([100, 100])) == 150  # no weight of 1: the largest


# ---------------------------------------------------------------------------------------------------------------------
# The stream
# ---------------------------------------------------------------------------------------------------------------------


def _take(stream, count):
    return list(stream.take(count).as_numpy_iterator())


def test_frames_are_drawn_by_weight_and_hold_what_was_written(mixture):
    drawn = _take(mixture.stream("train", seed=0), 900)
    share = np.mean([frame["dataset"] for frame in drawn])
    expected = 0.5 * 30 / (12 + 0.5 * 30)
    assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 900)
    for frame in drawn[:40]:
        first, width = ((0, 7), (10, 14))[frame["dataset"]]
        file, number = frame["episode"].decode().split("#")
        episode = first + int(file.split("-")[2]) + int(number)
        step = fake_rlds.episode(episode, steps=(4, 6)[frame["dataset"]], action_dim=width)["steps"][frame["step"]]
        np.testing.assert_allclose(frame["action"], np.pad(step["action"], (0, 14 - width)), atol=1e-6)
        assert (tf.io.decode_image(frame["image_primary"]).numpy() == step["observation"]["image"]).all()
        assert frame["language"] == b"pick up the cup"


def test_image_sizes_are_those_drawn_most_often(tmp_path, mixture, monkeypatch):
    assert mixture.image_sizes == []  # declared as of any size
    schema = fake_rlds.features(image=tfds.features.Image(shape=(24, 24, 3), encoding_format="png"))
    fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(0, size=24)]]}, name="a", schema=schema)
    assert open_source(fake_rlds.config("a"), str(tmp_path)).image_sizes == {(24, 24)}
    sizes = {"a": {(1, 1), (2, 2)}, "b": {(2, 2), (3, 3), (4, 4), (5, 5)}}
    monkeypatch.setattr(Source, "image_sizes", property(lambda self: sizes[self.name]))
    several, second = (dataclasses.replace(mixture, weights=np.array(weights)) for weights in ([1.0, 0.1], [0.0, 1.0]))
    assert several.image_sizes == [(2, 2), (1, 1), (3, 3), (4, 4)]
    assert second.image_sizes == sorted(sizes["b"])


def test_every_frame_comes_once_per_pass(mixture):
    (indices, sizes) = ([0, 1], [8, 30])
    for index, size in zip(indices, sizes, strict=True):
        alone = Mixture([mixture.sources[index]], np.ones(1), mixture.statistics)
        passes = _take(alone.stream("train" if index == 0 else "all", seed=4), 3 * size)
        for start in range(0, 3 * size, size):
            counts = Counter((frame["episode"], frame["step"]) for frame in passes[start : start + size])
            assert set(counts.values()) == {1}
            assert len(counts) == size


def test_the_stream_is_seeded_and_processes_read_apart(mixture):
    def ids(count=60, **kwargs):
        stream = mixture.stream("train", **{"seed": 1, **kwargs})
        return [(frame["dataset"], frame["episode"], frame["step"]) for frame in _take(stream, count)]

    whole = ids()
    assert whole == ids()
    assert whole != ids(seed=2)
    first, second = ids(process_index=0, process_count=2), ids(process_index=1, process_count=2)
    assert not set(first) & set(second)
    assert {frame[:2] for frame in first + second} == {frame[:2] for frame in whole}


def test_datasets_without_held_out_episodes_are_left_out(mixture):
    assert mixture.datasets_with_split("val") == [0]
    assert (mixture.expected_frames("val"), mixture.expected_frames("train")) == (4, 38)
    assert {frame["dataset"] for frame in _take(mixture.stream("val", seed=0), 20)} == {0}
    alone = Mixture([mixture.sources[1]], np.ones(1), mixture.statistics)
    with pytest.raises(SplitNotFoundError, match=r"dataset 'b' .* split 'train\[95%:\]' has no episodes"):
        alone.stream("val", seed=0)
    with pytest.raises(SplitNotFoundError, match="has no split 'test'"):
        mixture.stream("test", seed=0)


def test_frames_without_instruction_or_against_the_filter_are_dropped(tmp_path, mixture):
    episodes = [fake_rlds.episode(0, steps=4), fake_rlds.episode(1, steps=4, instruction=" ")]
    episodes[0]["steps"][2]["language_instruction"] = ""
    fake_rlds.write(tmp_path, {"train": [episodes], "val": [episodes]}, name="a")
    threshold = np.median([step["action"][0] for step in episodes[0]["steps"]])
    frame_filter = lambda frame: frame["action"][0, 0] > threshold

    def steps(count, skip_unlabeled=True, **changes):
        source = open_source(fake_rlds.config("a", **changes), str(tmp_path))
        stream = Mixture([source], np.ones(1), mixture.statistics).stream(
            "train", seed=0, skip_unlabeled=skip_unlabeled
        )
        return [(frame["episode"].decode()[-1:], int(frame["step"])) for frame in _take(stream, count)]

    assert set(steps(9)) == {("0", 0), ("0", 1), ("0", 3)}
    assert len(set(steps(8, skip_unlabeled=False))) == 8
    kept = {t for t, step in enumerate(episodes[0]["steps"]) if step["action"][0] > threshold}
    assert {t for name, t in steps(20, skip_unlabeled=False, frame_filter=frame_filter) if name == "0"} == kept
    nothing = steps(3, frame_filter=lambda frame: tf.constant(False))
    assert nothing == [("", -1)] * 3  # no search without end


def test_episodes_with_large_actions_are_dropped(tmp_path, mixture):
    episodes = [fake_rlds.episode(0, steps=3), fake_rlds.episode(1, steps=3)]
    for episode in episodes:
        for step in episode["steps"]:
            step["action"][:] = 0.3
    episodes[1]["steps"][1]["action"][2] = 0.7  # its neighbours go with it
    fake_rlds.write(tmp_path, {"train": [episodes], "val": [episodes]}, name="a")
    source = open_source(fake_rlds.config("a"), str(tmp_path))
    for limit, names in ((0.5, {"0"}), (0.8, {"0", "1"})):
        limited = Mixture([source], np.ones(1), mixture.statistics, max_action=limit)
        frames = _take(limited.stream("train", seed=0), 12)
        assert {(frame["episode"].decode()[-1:], frame["step"]) for frame in frames} == {
            (name, step) for name in names for step in range(3)
        }


def test_memory_is_that_of_encoded_frames_and_of_the_records_being_read(mixture):
    stream = _take(Mixture([mixture.sources[0]], np.ones(1), mixture.statistics).stream("train", seed=0), 8)
    exact = np.mean([len(f["image_primary"]) + len(f["language"]) + len(f["episode"]) for f in stream])
    memory = estimate([Mixture([mixture.sources[0]], np.ones(1), mixture.statistics)], readers=8)
    assert memory.frame_bytes - 900 == pytest.approx(exact)
    sizes = [path.stat().length for path in mixture.sources[0].directory.glob("a-*tfrecord*")]
    record = sum(sizes) / 3 - 16  # 16 bytes frame it
    episode = 4 * exact
    assert memory.reader_bytes == pytest.approx(2 * (2**20 + 2 * record) + 8 * episode)


def test_statistics_come_from_where_the_configuration_says(shared, tmp_path):
    data = {"dataset": "bridge_orig", "data_dir": str(shared / "data"), "statistics_dir": str(tmp_path)}
    (computed,) = (phase.mixture for phase in open_phases(data))
    assert computed.sizes.tolist() == [400]
    assert len(list(tmp_path.glob("statistics_bridge_orig_1.0.0_*.json"))) == 1
    (phase,) = open_phases(data, statistics={"bridge_orig": {"num_transitions": 3}})
    assert phase.mixture.sizes.tolist() == [3]
