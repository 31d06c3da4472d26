"""RLDS directories: finding, opening, splitting among processes, reading, and what is said when they are broken."""

import json
import subprocess
import sys

import fake_rlds
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from conftest import ROOT, golden

from openvla_jax.data import (
    BadImageError,
    CorruptRecordError,
    DataError,
    DatasetNotFoundError,
    SplitNotFoundError,
    trajectory,
)
from openvla_jax.data import __main__ as commands
from openvla_jax.data.episodes import explain_errors, read_episodes, trace
from openvla_jax.data.rlds import dataset_statistics, make_dataset
from openvla_jax.data.source import EpisodeRange, _part, episode_ranges, find, open_source
from openvla_jax.data.trajectory import restructure


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """data_dir of dataset "fake": 7 train episodes in 3 files, 2 val episodes."""
    data_dir = tmp_path_factory.mktemp("data")
    train = [[fake_rlds.episode(i) for i in numbers] for numbers in ([0, 1, 2], [3], [4, 5, 6])]
    fake_rlds.write(data_dir, {"train": train, "val": [[fake_rlds.episode(7), fake_rlds.episode(8)]]})
    return data_dir


@pytest.fixture(scope="module")
def statistics(fake):
    return dataset_statistics(open_source(fake_rlds.config(), str(fake)), load_proprio=True)


def names(dataset):
    return [element["episode"].numpy()[0].decode() for element in dataset]


def actions(number, **kwargs):
    return np.stack([step["action"] for step in fake_rlds.episode(number, **kwargs)["steps"]])


# ---------------------------------------------------------------------------------------------------------------------
# Finding and opening
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bridge_orig", "bridge_dataset"])
@pytest.mark.parametrize("place", [".", "bridge_dataset", "bridge_dataset/1.0.0"])
def test_bridge_opens_under_both_names_from_every_level(shared, name, place):
    source = open_source(name, str(shared / "data" / place))
    assert (source.directory.name, source.splits) == ("1.0.0", {"train": 25, "val": 25})
    assert source.name == name


def test_a_renamed_folder_opens(fake, tmp_path):
    (tmp_path / "bridge_orig").symlink_to(fake / "fake")  # calls itself "fake"
    assert open_source("bridge_orig", str(tmp_path)).info.name == "fake"
    assert open_source("bridge_dataset", str(tmp_path)).directory == open_source("bridge_orig", str(tmp_path)).directory


def test_the_highest_version_counts_as_numbers(tmp_path):
    for version in ("1.9.0", "1.10.0", "0.20.0"):
        fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(0)]]}, version=version)
    assert find("fake", str(tmp_path)).name == "1.10.0"


def test_a_single_tfds_config_is_looked_through_and_several_are_not(tmp_path):
    fake_rlds.write(tmp_path / "fake", {"train": [[fake_rlds.episode(0)]]}, name="one")
    assert find("fake", str(tmp_path)) == tmp_path / "fake" / "one" / "1.0.0"
    fake_rlds.write(tmp_path / "fake", {"train": [[fake_rlds.episode(0)]]}, name="two")
    with pytest.raises(DatasetNotFoundError, match=r"several builds \(one, two\)"):
        find("fake", str(tmp_path))
    assert find("one", str(tmp_path / "fake" / "one")).parent.name == "one"


def test_missing_datasets_are_told_with_what_is_there(fake, tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"'fakes' is not in .*; did you mean 'fake'\? known: fake$"):
        find("fakes", str(fake))
    with pytest.raises(DatasetNotFoundError, match=r"is not a folder: set data.data_dir to the folder that holds fake"):
        find("fake", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetNotFoundError, match=r"holds dataset 'fake', not 'kuka'"):
        find("kuka", str(fake / "fake" / "1.0.0"))
    (tmp_path / "kuka" / "1.0.0").mkdir(parents=True)
    with pytest.raises(DatasetNotFoundError, match=r"no <version>/dataset_info.json .* it holds 1.0.0$"):
        find("kuka", str(tmp_path))
    with pytest.raises(DataError, match=r"'bridge_org' has no configuration: .*did you mean 'bridge_orig'\?"):
        open_source("bridge_org", str(fake))


def test_what_is_no_rlds_dataset_is_refused(tmp_path):
    folder = fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(0)]]})
    tfds.features.FeaturesDict({"steps": tfds.features.Tensor(shape=(7,), dtype=np.float32)}).save_config(str(folder))
    with pytest.raises(DataError, match="no dataset of 'steps' per example: it is not RLDS"):
        open_source(fake_rlds.config(), str(tmp_path))
    (folder / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"fake/1.0.0: .*features.json complete\?") as caught:
        open_source(fake_rlds.config(), str(tmp_path))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Splits and shares
# ---------------------------------------------------------------------------------------------------------------------


@hypothesis.given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12))
def test_processes_share_episodes_disjointly_equally_and_without_gaps(lengths, processes):
    runs = [
        EpisodeRange(f"file{i}", skip, take) for i, (skip, take) in enumerate(zip(lengths[::-1], lengths, strict=True))
    ]
    episodes = [(run.path, run.skip + i) for run in runs for i in range(run.take)]
    read = [
        [(share.path, share.skip + i) for share in _part(runs, process, processes) for i in range(share.take)]
        for process in range(processes)
    ]
    if processes <= len(episodes):
        assert [episode for part in read for episode in part] == episodes
        assert max(map(len, read)) - min(map(len, read)) <= 1
    else:
        assert [part for part in read] == [[episodes[process % len(episodes)]] for process in range(processes)]


def test_processes_read_their_shares(fake, statistics):
    kwargs = {"statistics": statistics, "seed": 3}
    parts = [
        names(make_dataset(fake_rlds.config(), str(fake), process_index=i, process_count=3, **kwargs)) for i in range(3)
    ]
    assert sorted(name for part in parts for name in part) == sorted(
        names(make_dataset(fake_rlds.config(), str(fake), **kwargs))
    )
    assert sorted(map(len, parts)) == [2, 2, 3]


def test_without_val_the_last_twentieth_of_train_is_held_out(tmp_path):
    fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(i, steps=1) for i in range(40)]]})
    source = open_source(fake_rlds.config(), str(tmp_path))
    assert [(s.skip, s.take) for s in episode_ranges(source, "train")] == [(0, 38)]
    assert [(s.skip, s.take) for s in episode_ranges(source, "val")] == [(38, 2)]
    assert [(s.skip, s.take) for s in episode_ranges(source, "train[3:5]")] == [(3, 2)]
    with pytest.raises(SplitNotFoundError, match=r"has no split 'test'; it has train"):
        episode_ranges(source, "test")


def test_an_empty_split_is_told(tmp_path):
    fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(0)]]}, name="one")
    with pytest.raises(SplitNotFoundError, match=r"split 'train\[95%:\]' has no episodes"):
        episode_ranges(open_source(fake_rlds.config("one"), str(tmp_path)), "val")
    fake_rlds.write(tmp_path, {"train": [[]]}, name="none")
    with pytest.raises(SplitNotFoundError, match="has no episodes"):
        episode_ranges(open_source(fake_rlds.config("none"), str(tmp_path)), "all")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def test_raw_bridge_episodes_are_those_of_the_reference(shared):
    with np.load(golden("pipeline/bridge.npz")) as file:
        expected = dict(file)
    source = open_source("bridge_orig", str(shared / "data"))
    raw = lambda episode, _: {
        "action": episode["action"],
        "observation/state": episode["observation"]["state"],
        "language_instruction": episode["language_instruction"],
        "image": episode["observation"]["image_0"],
        "file": episode["traj_metadata"]["episode_metadata"]["file_path"],
    }
    dataset = read_episodes(trace(source, raw), episode_ranges(source, "train"))
    for number, episode in enumerate(dataset.take(5).as_numpy_iterator()):
        for key in ("action", "observation/state", "language_instruction"):
            np.testing.assert_array_equal(episode[key], expected[f"traj{number}/raw/{key}"])
        assert expected[f"traj{number}/image/jpeg"].tobytes() in episode["image"]
        assert len(set(episode["file"])) == 1
        assert len(episode["file"]) == len(episode["action"])


@pytest.mark.parametrize("kind", ["normal", "bounds", "bounds_q99"])
def test_bridge_is_normalised_as_in_the_reference(shared, kind):
    with np.load(golden("pipeline/bridge.npz")) as file:
        expected = dict(file)
    statistics = str(golden("pipeline/dataset_statistics_proprio.json"))
    dataset = make_dataset("bridge_orig", str(shared / "data"), statistics=statistics, normalization=kind)
    for number, full in enumerate(dataset.take(5).as_numpy_iterator()):
        reference = {key: expected[f"traj{number}/norm_{kind}/{key}"] for key in ("action", "proprio")}
        np.testing.assert_allclose(full["action"], reference["action"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(full["observation"]["proprio"], reference["proprio"], rtol=0, atol=1e-6)
        assert set(full["dataset_name"]) == {b"bridge_orig"}


def test_only_needed_features_are_parsed(fake):
    source = open_source(fake_rlds.config(), str(fake))

    def keys(**kwargs):
        function = lambda raw, episode: trajectory.restructure(source.config, raw, episode, **kwargs)
        features = trace(source, function).features
        assert list(features) == ["steps"]
        return set(features["steps"].feature), set(dict(features["steps"].feature).get("observation", ()))

    assert keys(views=(), load_proprio=False, load_language=False) == ({"action"}, set())
    assert keys(load_proprio=False) == ({"action", "observation", "language_instruction"}, {"image"})
    assert keys(views=()) == ({"action", "observation", "language_instruction"}, {"state"})


def test_transforms_may_touch_features_that_are_not_needed(fake, statistics):
    def rename_and_cut(raw):
        raw["observation"]["other"] = tf.where(raw["is_first"], raw["observation"]["unused"].pop("camera"), "")
        return tf.nest.map_structure(lambda x: x[1:], raw)

    changed = fake_rlds.config(transform=rename_and_cut)
    full = next(iter(make_dataset(changed, str(fake), statistics=statistics, normalization="bounds")))
    assert full["step"].numpy().tolist() == [1, 2, 3, 4]  # steps of the file, for error messages
    low, high = (np.array(statistics["action"][key]) for key in ("min", "max"))
    expected = np.clip(2 * (actions(0)[1:] - low) / (high - low) - 1, -1, 1)
    np.testing.assert_allclose(full["action"][:, :6], expected[:, :6], atol=1e-6)
    np.testing.assert_array_equal(full["action"][:, 6], actions(0)[1:, 6])


def test_order_depends_on_the_seed_alone(fake, statistics):
    def order(seed, repeats=1, readers=2):
        dataset = make_dataset(
            fake_rlds.config(), str(fake), statistics=statistics, seed=seed, num_parallel_reads=readers
        )
        return names(dataset.repeat(repeats))

    in_order = order(None)
    assert in_order == sorted(in_order)
    assert len(in_order) == 7
    assert order(5) == order(5)
    assert len({tuple(order(seed)) for seed in range(6)}) > 1
    epochs = order(5, repeats=4)
    assert all(sorted(epochs[7 * i : 7 * i + 7]) == in_order for i in range(4))
    assert len({tuple(epochs[7 * i : 7 * i + 7]) for i in range(4)}) > 1  # each epoch has its own


def test_filters_drop_trajectories(tmp_path, statistics):
    words = [fake_rlds.episode(0), fake_rlds.episode(1, instruction=""), fake_rlds.episode(2)]
    words[2]["steps"][0]["language_instruction"] = ""
    words[2]["steps"][0]["action"][6] = 50.0
    fake_rlds.write(tmp_path, {"train": [words], "val": [words[:1]]})
    load = lambda **kwargs: names(make_dataset(fake_rlds.config(), str(tmp_path), statistics=statistics, **kwargs))
    assert [name[-1] for name in load()] == ["0", "1", "2"]
    assert [name[-1] for name in load(skip_unlabeled=True)] == ["0", "2"]  # one labelled step is enough
    assert [name[-1] for name in load(max_action=2.0)] == ["0", "1"]
    assert load(max_proprio=1e-3) == []


def test_keys_of_transforms_follow_what_they_compute(fake):
    source = open_source(fake_rlds.config(), str(fake))

    def key(scale, unused=1.0):
        def result(raw, episode):
            _ = raw["observation"]["state"] * unused
            return {"action": tf.cond(episode == "", lambda: raw["action"], lambda: raw["action"] * scale)}

        return trace(source, result).key

    assert key(2.0) == key(2.0)
    assert key(2.0) == key(2.0, unused=3.0)  # nothing depends on it
    assert key(2.0) != key(3.0)  # inside a branch, that is in another function of the graph


def test_random_and_failing_transforms_are_refused(fake):
    def coin(raw):
        return {**raw, "action": raw["action"] * tf.cond(tf.random.uniform([]) < 0.5, lambda: 1.0, lambda: -1.0)}

    with pytest.raises(DataError, match=r"dataset 'fake': its transform draws random numbers \(RandomUniform\)"):
        make_dataset(fake_rlds.config(transform=coin), str(fake))

    def wrong(raw):
        return {**raw, "action": tf.concat([raw["action"], raw["observation"]["state"][:, 0]], axis=1)}

    with pytest.raises(DataError, match=r"dataset 'fake': its transform fails on the schema") as caught:
        make_dataset(fake_rlds.config(transform=wrong), str(fake))
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Broken data
# ---------------------------------------------------------------------------------------------------------------------


def _broken(tmp_path, change, file=1):
    """Two good files and one that `change` (bytes -> bytes or None) has been at."""
    folder = fake_rlds.write(
        tmp_path, {"train": [[fake_rlds.episode(i)] for i in range(3)], "val": [[fake_rlds.episode(9)]]}
    )
    path = folder / f"fake-train.tfrecord-0000{file}-of-00003"
    content = change(path.read_bytes())
    path.write_bytes(content) if content is not None else path.unlink()
    return path


@pytest.mark.parametrize("change", [lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:], lambda b: b[:-9]])
def test_a_damaged_record_file_is_named(tmp_path, statistics, change):
    path = _broken(tmp_path, change)
    source = open_source(fake_rlds.config(), str(tmp_path))
    message = (
        rf"^dataset 'fake': record file {path} is damaged \((corrupted|truncated) record at \d+.*\): fetch it again$"
    )
    with pytest.raises(CorruptRecordError, match=message), explain_errors([source]):
        list(make_dataset(source.config, str(tmp_path), statistics=statistics, seed=0))
    with pytest.raises(CorruptRecordError, match=message):
        dataset_statistics(source)
    assert not list(tmp_path.rglob("statistics*"))


def test_missing_files_and_missing_episodes_are_told(tmp_path, statistics):
    path = _broken(tmp_path / "a", lambda content: None)
    source = open_source(fake_rlds.config(), str(tmp_path / "a"))
    with pytest.raises(DatasetNotFoundError, match=rf"a record file has gone: .*{path}.*"), explain_errors([source]):
        list(make_dataset(source.config, str(tmp_path / "a"), statistics=statistics))
    _broken(tmp_path / "b", lambda content: b"")
    with pytest.raises(CorruptRecordError, match=r"dataset 'fake' .* 1 episodes fewer than dataset_info.json says"):
        dataset_statistics(open_source(fake_rlds.config(), str(tmp_path / "b")))


def test_records_that_do_not_fit_the_schema_are_told(tmp_path, statistics):
    short = fake_rlds.episode(0, action_dim=6)
    folder = fake_rlds.write(tmp_path, {"train": [[short]]}, schema=fake_rlds.features(action_dim=6))
    description = json.loads((folder / "features.json").read_text().replace('"6"', '"7"', 1))
    (folder / "features.json").write_text(json.dumps(description))
    source = open_source(fake_rlds.config(), str(tmp_path))
    with pytest.raises(
        CorruptRecordError, match=r"dataset 'fake' \(.*\): an episode does not fit features.json: "
    ) as caught:
        dataset_statistics(source)
    assert "\n" not in str(caught.value)


def test_a_camera_that_is_not_encoded_is_refused(tmp_path, statistics):
    schema = fake_rlds.features(image=tfds.features.Tensor(shape=(24, 24, 3), dtype=np.uint8))
    fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(0)]]}, schema=schema)
    with pytest.raises(
        BadImageError, match=r"dataset 'fake': image 'image' is stored as uint8 \[24, 24, 3\], not as an"
    ):
        make_dataset(fake_rlds.config(), str(tmp_path), "all", statistics=statistics)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_line_inspects_and_writes_statistics(shared, tmp_path, capsys):
    arguments = ["--statistics_dir", str(tmp_path), "--data_dir"]
    command = [sys.executable, "-m", "openvla_jax.data", "inspect", "bridge_orig", *arguments, str(shared / "data")]
    command += ["--output", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "episodes {'train': 25, 'val': 25}; used {'train': 25, 'val': 25}" in done.stdout
    assert "bridge_orig: 400 steps in 50 episodes" in done.stdout
    assert "'image_0': Image(shape=(64, 64, 3), dtype=uint8" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["bridge_orig"]["num_transitions"] == 400
    with pytest.raises(SystemExit) as ended:
        commands.main(["stats", "bridge_orig", *arguments, str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("error: dataset 'bridge_orig' is not in")


def test_episode_ranges_refuses_a_split_that_is_no_slice(fake):
    source = open_source(fake_rlds.config(), str(fake))
    with pytest.raises(DataError, match=r"fake/1.0.0, split 'train\[a:b\]': .*; name a split or a part") as caught:
        episode_ranges(source, "train[a:b]")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new"),
    [("{SHARD_X_OF_Y}", "{SHARD}"), ('"train"', "3"), ("1.0.0", "one"), ('"splits": [', '"splits": [[')],
)
def test_open_source_names_a_damaged_description(tmp_path, old, new):
    path = fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(0)]]}) / "dataset_info.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(
        DataError, match=r"fake/1.0.0: .*; are dataset_info.json and features.json complete\?"
    ) as caught:
        open_source(fake_rlds.config(), str(tmp_path))
    assert "\n" not in str(caught.value)


def test_restructure_takes_text_as_an_array_of_one_and_refuses_other_shapes():
    raw = {"action": tf.zeros([3, 7]), "observation": {"image": tf.fill([3], ""), "state": tf.zeros([3, 6])}}
    texts = tf.constant([["a"], ["b"], ["c"]])
    full = restructure(fake_rlds.config(), raw | {"language_instruction": texts})
    assert full["task"]["language_instruction"].numpy().tolist() == [b"a", b"b", b"c"]
    with pytest.raises(DataError, match=r"'language_instruction' has shape \[3, 2\], not one text per step"):
        restructure(fake_rlds.config(), raw | {"language_instruction": tf.tile(texts, [1, 2])})
