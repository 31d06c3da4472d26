"""Statistics: against the reference's files and numpy, in the cache, and when they do not fit."""

import json
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import fake_rlds
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import golden
from hypothesis.extra.numpy import arrays

from openvla_jax.data import BadActionError, DataError, StatisticsError, statistics
from openvla_jax.data.rlds import dataset_statistics
from openvla_jax.data.source import open_source

MASK = (True,) * 6 + (False,)


def _trajectory(action, number=0, **more):
    action = np.asarray(action, np.float32)
    return {"action": action, "episode": f"file#{number}".encode(), "step": np.arange(len(action)), **more}


def _close(actual, expected, atol):
    for part in ("action", "proprio"):
        for field, values in expected[part].items():
            np.testing.assert_allclose(actual[part][field], values, rtol=0, atol=atol, err_msg=f"{part}/{field}")
    assert actual["num_transitions"] == expected["num_transitions"]
    assert actual["num_trajectories"] == expected["num_trajectories"]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def test_bridge_has_the_statistics_of_the_reference(shared, tmp_path):
    source = open_source("bridge_orig", str(shared / "data"))
    computed = dataset_statistics(source, cache_dir=str(tmp_path))
    _close(computed, json.loads(golden("pipeline/dataset_statistics.json").read_text()), atol=1e-6)
    saved = json.loads(golden("pipeline/run_dir/dataset_statistics.json").read_text())["bridge_orig"]
    assert computed["action"].keys() == saved["action"].keys()
    assert computed["action"]["mask"] == saved["action"]["mask"]


def test_bridge_state_has_the_statistics_of_the_reference(shared, tmp_path):
    source = open_source("bridge_orig", str(shared / "data"))
    computed = dataset_statistics(source, cache_dir=str(tmp_path), load_proprio=True)
    expected = json.loads(golden("pipeline/dataset_statistics_proprio.json").read_text())
    # The reference sums in float32: its mean of 400 gripper values of about 0.94 is 1.08e-6 off. Ours are float64.
    _close(computed, expected, atol=1.1e-6)


@hypothesis.given(
    st.integers(1, 30).flatmap(lambda n: arrays(np.float32, (n, 3), elements=st.floats(-1e3, 1e3, width=32)))
)
@hypothesis.settings(max_examples=50)
def test_statistics_equal_numpy_in_float64(action):
    cut = len(action) // 2
    result = statistics.summarize([_trajectory(action[:cut]), _trajectory(action[cut:], 1)], "fake")
    exact = action.astype(np.float64)
    expected = {
        "mean": exact.mean(0),
        "std": exact.std(0),
        "max": exact.max(0),
        "min": exact.min(0),
        "q01": np.quantile(exact, 0.01, axis=0),
        "q99": np.quantile(exact, 0.99, axis=0),
    }
    for field, value in expected.items():
        np.testing.assert_allclose(result["action"][field], value, rtol=1e-12, atol=1e-12)
    assert result["proprio"]["mean"] == [0.0] * 3
    assert (result["num_transitions"], result["num_trajectories"]) == (len(action), 2)


def test_small_changes_on_a_large_offset_are_kept():
    action = (1e4 + np.random.default_rng(0).uniform(-0.01, 0.01, (100_000, 1))).astype(np.float32)
    result = statistics.summarize([_trajectory(part, i) for i, part in enumerate(np.split(action, 10))], "fake")
    np.testing.assert_allclose(result["action"]["std"], action.astype(np.float64).std(0), rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_action_that_is_not_finite_is_located(tmp_path, value):
    episodes = [fake_rlds.episode(i) for i in range(4)]
    episodes[2]["steps"][3]["action"][5] = value
    fake_rlds.write(tmp_path, {"train": [episodes[:1], episodes[1:]]})
    message = rf"^dataset 'fake', episode fake-train.tfrecord-00001-of-00002#1, step 3: action dimension 5 is {value}:"
    with pytest.raises(BadActionError, match=message):
        dataset_statistics(open_source(fake_rlds.config(), str(tmp_path)))
    assert not list(tmp_path.rglob("statistics*"))


def test_empty_data_and_empty_episodes_are_told(tmp_path, caplog):
    with pytest.raises(DataError, match=r"dataset 'fake' has no steps at all in 2 episodes"):
        statistics.summarize([_trajectory(np.zeros((0, 7))), _trajectory(np.zeros((0, 7)))], "fake")
    fake_rlds.write(tmp_path, {"train": [[fake_rlds.episode(0), fake_rlds.episode(1, steps=0)]]})
    result = dataset_statistics(open_source(fake_rlds.config(), str(tmp_path)))
    assert (result["num_transitions"], result["num_trajectories"]) == (5, 2)
    assert "dataset 'fake': 1 of 2 episodes have no steps: fake-train.tfrecord-00000-of-00001#1" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    fake_rlds.write(tmp_path / "data", {"train": [[fake_rlds.episode(i) for i in range(3)]]})
    return open_source(fake_rlds.config(), str(tmp_path / "data"))


def test_the_cache_is_used_until_something_changes(source, tmp_path, monkeypatch):
    first = dataset_statistics(source)
    (cached,) = source.directory.glob("statistics_fake_1.0.0_*.json")
    content = json.loads(cached.read_text())
    content["num_transitions"] = 77
    cached.write_text(json.dumps(content))
    assert dataset_statistics(source)["num_transitions"] == 77

    def doubled(raw):
        return {**raw, "action": 2 * raw["action"]}

    other = open_source(fake_rlds.config(transform=doubled), str(tmp_path / "data"))
    np.testing.assert_allclose(dataset_statistics(other)["action"]["max"], 2 * np.array(first["action"]["max"]))
    assert dataset_statistics(source, load_proprio=True)["proprio"]["max"][0] != 0
    assert len(list(source.directory.glob("statistics_*.json"))) == 3
    cached.write_text('{"action": ')
    assert dataset_statistics(source) == first  # what was no JSON is written anew
    assert json.loads(cached.read_text())["num_transitions"] == 15


def test_rewritten_data_are_noticed(source, tmp_path):
    dataset_statistics(source, cache_dir=str(tmp_path / "cache"))
    fake_rlds.write(tmp_path / "other", {"train": [[fake_rlds.episode(i, steps=6) for i in range(3)]]})
    rewritten = open_source(fake_rlds.config(), str(tmp_path / "other"))
    assert dataset_statistics(rewritten, cache_dir=str(tmp_path / "cache"))["num_transitions"] == 18


def test_a_folder_that_takes_no_file_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_FALLBACK", str(tmp_path / "home"))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be")
    assert statistics.cached("s.json", [str(blocked)], lambda: {"a": 1}, dict) == {"a": 1}
    assert json.loads((tmp_path / "home" / "s.json").read_text()) == {"a": 1}
    assert statistics.cached("s.json", [str(blocked)], lambda: {"a": 2}, dict) == {"a": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_data_keep_their_statistics_elsewhere(source, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_FALLBACK", str(tmp_path / "home"))
    os.chmod(source.directory, stat.S_IRUSR | stat.S_IXUSR)
    dataset_statistics(source)
    assert len(list((tmp_path / "home").iterdir())) == 1


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path):
    value = {"numbers": list(range(20_000))}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: statistics.cached("s.json", [str(tmp_path)], lambda: value, dict), range(32)))
    assert all(result == value for result in results)
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_files_of_the_reference_are_read(source, tmp_path):
    for name in ("pipeline/dataset_statistics.json", "pipeline/run_dir/dataset_statistics.json"):
        loaded = statistics.prepare(statistics.load(str(golden(name)), "bridge_orig"), "bridge_orig", MASK)
        assert loaded["action"]["mask"] == list(MASK)
        assert loaded["num_transitions"] == 400
    with pytest.raises(
        StatisticsError, match=r"no dataset 'bridge_org'; did you mean 'bridge_orig'\? known: bridge_orig;"
    ):
        statistics.load(str(golden("pipeline/run_dir/dataset_statistics.json")), "bridge_org")
    with pytest.raises(StatisticsError, match=r"statistics file .*nowhere.json: cannot be read"):
        dataset_statistics(source, path=str(tmp_path / "nowhere.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(StatisticsError, match="holds a list, not an object"):
        statistics.load(str(tmp_path / "list.json"), "fake")


# ---------------------------------------------------------------------------------------------------------------------
# Before use
# ---------------------------------------------------------------------------------------------------------------------


def _good(width=7):
    action = np.random.default_rng(0).standard_normal((50, width))
    return statistics.summarize([_trajectory(action)], "fake")


def test_statistics_that_do_not_fit_are_refused():
    with pytest.raises(StatisticsError, match=r"'fake': action/mean has 6 dimensions, the actions have 7"):
        statistics.prepare(_good(6), "fake", MASK)
    with pytest.raises(StatisticsError, match=r"'fake': action/q99 is None, not a list of numbers"):
        statistics.prepare(_good() | {"action": {**_good()["action"], "q99": None}}, "fake", MASK)
    with pytest.raises(StatisticsError, match=r"'fake': action/std is \[nan"):
        statistics.prepare(_good() | {"action": {**_good()["action"], "std": [np.nan] * 7}}, "fake", MASK)
    with pytest.raises(StatisticsError, match=r"their mask \[True.* is not the dataset's"):
        statistics.prepare(_good() | {"action": {**_good()["action"], "mask": [True] * 7}}, "fake", MASK)
    with pytest.raises(StatisticsError, match=r"num_transitions is 0"):
        statistics.prepare(_good() | {"num_transitions": 0}, "fake", MASK)
    without = {key: value for key, value in _good().items() if key != "proprio"}
    assert statistics.prepare(without, "fake", MASK)["num_transitions"] == 50
    with pytest.raises(StatisticsError, match=r"proprio/mean is None"):
        statistics.prepare(without, "fake", MASK, with_proprio=True)


def test_dimensions_that_do_not_change_are_reported(caplog):
    action = np.random.default_rng(0).standard_normal((300, 7))
    action[:, 2] = 0.5
    action[:, 6] = 1.0
    action[:, 4] = 0.0
    action[7, 4] = 1.0  # min and max differ, the quantiles do not
    with caplog.at_level(logging.WARNING):
        statistics.prepare(statistics.summarize([_trajectory(action)], "fake"), "fake", MASK)
    assert "dataset 'fake': action dimensions [2, 6] never change; they are trained as 0" in caplog.text
    assert "dataset 'fake': action dimensions [4] have q01 == q99; they are trained as -1 or 1" in caplog.text


def test_the_table_names_every_number():
    prepared = statistics.prepare(_good(), "fake", MASK)
    text = statistics.table({"fake": prepared})
    assert "fake: 50 steps in 1 episodes" in text
    assert f"{prepared['action']['q99'][3]:.4f}" in text
    assert text.splitlines()[-1].endswith("no")
