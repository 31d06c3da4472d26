"""Trajectories: one form, normalisation, windows; against outputs of the reference and against plain numpy."""

import json

import fake_rlds
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from conftest import golden, goldens_dir

from openvla_jax.data import DataError, StatisticsError, trajectory
from openvla_jax.data.oxe import DATASETS, ActionEncoding

_MANIFEST = goldens_dir() / "oxe_restructured" / "manifest.json"
_RESTRUCTURED = json.loads(_MANIFEST.read_text()) if _MANIFEST.exists() else {}


def _tree(arrays, entries, prefix):
    """Arrays by golden name -> nested dict of tensors, following the paths of the manifest."""
    tree: dict = {}
    for key, entry in entries.items():
        if key.startswith(prefix):
            *folders, leaf = entry["path"]
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = tf.constant(arrays[key])
    return tree


def _raw(action_dim=7, steps=4):
    episode = fake_rlds.episode(3, steps=steps, action_dim=action_dim)["steps"]
    return {
        "action": tf.constant(np.stack([step["action"] for step in episode])),
        "observation": {
            "image": tf.constant([f"image {t}".encode() for t in range(steps)]),
            "state": tf.constant(np.stack([step["observation"]["state"] for step in episode])),
        },
        "language_instruction": tf.constant(["go"] * steps),
    }


# ---------------------------------------------------------------------------------------------------------------------
# One form
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(_RESTRUCTURED) or ["(goldens are absent)"])
def test_restructured_as_in_the_reference(name):
    with np.load(golden(f"oxe/{name}.npz")) as file:
        inputs = dict(file)
    with np.load(golden(f"oxe_restructured/{name}.npz")) as file:
        expected = dict(file)
    entries = json.loads(golden("oxe/manifest.json").read_text())[name]["input"]
    result = trajectory.restructure(
        DATASETS[name], _tree(inputs, entries, "in/"), views=("primary", "secondary", "wrist"), load_depth=True
    )
    swapped = (
        name == "droid" and result["observation"]["image_primary"][0] != expected["pipe/observation/image_primary"][0]
    )
    for key, entry in _RESTRUCTURED[name]["output"].items():
        if swapped and key.replace("pipe/", "pipe_swapped/") in expected:  # one of two allowed outcomes
            key = key.replace("pipe/", "pipe_swapped/")
        value = result
        for part in entry["path"]:
            value = value[part]
        value = value.numpy()
        if value.dtype == object:
            np.testing.assert_array_equal(value, expected[key].astype(object), err_msg=key)
        else:
            assert value.dtype == expected[key].dtype
            np.testing.assert_allclose(value, expected[key], rtol=0, atol=1e-5 if "furniture" in name else 1e-6)


def test_ids_and_absent_cameras():
    result = trajectory.restructure(fake_rlds.config(), _raw(), "file#3", views=("primary", "wrist"), load_depth=True)
    assert set(result["observation"]) == {
        "image_primary", "image_wrist", "depth_primary", "depth_wrist", "proprio", "timestep"
    }  # fmt: skip
    assert result["observation"]["image_wrist"].numpy().tolist() == [b""] * 4
    assert result["episode"].numpy().tolist() == [b"file#3"] * 4
    assert result["step"].numpy().tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(result["observation"]["proprio"][:, 6], np.zeros(4))  # a None among the state keys
    assert result["task"]["language_instruction"].numpy().tolist() == [b"go"] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["observation"].pop("image"), r"no 'image' there, only state: fix"),
        (lambda raw: raw["observation"].pop("state"), r"no 'state' there, only image: fix"),
        (lambda raw: raw.update(observation=raw["action"]), r"no 'observation' there, only action, language_instr"),
        (lambda raw: raw.update(action=raw["action"][:, :6]), r"actions have shape \[4, 6\], .* EEF_POS has 7 dim"),
        (lambda raw: raw.update(action=raw["action"][0]), r"actions have shape \[7\]"),
        (lambda raw: raw["observation"].update(state=raw["action"][:, 0]), r"state 'state' has shape \[4\], not"),
        (lambda raw: raw.update(language_instruction=tf.zeros(4)), r"'language_instruction' is float32, not text"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    raw = _raw()
    change(raw)
    with pytest.raises(DataError, match=f"^dataset 'fake': .*{message}"):
        trajectory.restructure(fake_rlds.config(), raw)


def test_missing_keys_and_views_are_told():
    raw = _raw()
    del raw["language_instruction"]
    with pytest.raises(ValueError, match=r"'fake': trajectory has no 'language_instruction'; it has action, observ"):
        trajectory.restructure(fake_rlds.config(), raw)
    with pytest.raises(DataError, match=r"'fake' has no view 'left': it has primary, secondary, wrist"):
        trajectory.restructure(fake_rlds.config(), _raw(), views=("left",))


def test_other_action_widths():
    config = fake_rlds.config(action_encoding=ActionEncoding.JOINT_POS_BIMANUAL)
    result = trajectory.restructure(config, _raw(action_dim=14))
    assert result["action"].shape == (4, 14)
    assert result["absolute_action_mask"].numpy().all()


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["no_mask", "mask_last_false", "mask_last_false_and_constant", "tiny_range"])
@pytest.mark.parametrize("kind", trajectory.NORMALIZATIONS)
def test_normalised_as_in_the_reference(case, kind):
    with np.load(golden("pipeline/normalization.npz")) as file:
        arrays = dict(file)
    statistics = {
        part: {key.split("/")[-1]: arrays[key].tolist() for key in arrays if key.startswith(f"{case}/meta/{part}/")}
        for part in ("action", "proprio")
    }
    full = {"action": arrays[f"{case}/in/action"], "observation": {"proprio": arrays[f"{case}/in/proprio"]}}
    result = trajectory.normalize(tf.nest.map_structure(tf.constant, full), statistics, kind)
    for part, value in (("action", result["action"]), ("proprio", result["observation"]["proprio"])):
        np.testing.assert_allclose(value, arrays[f"{case}/out/{kind}/{part}"], rtol=1e-6, atol=1e-6)


def test_normalisation_keeps_what_is_not_finite_and_refuses_unknown_kinds():
    values = [[np.nan, np.inf, -np.inf, 0.5]]
    statistics = {
        "action": {key: [0.0] * 4 for key in ("mean", "min", "q01")} | dict.fromkeys(("std", "max", "q99"), [1.0] * 4)
    }
    for kind in trajectory.NORMALIZATIONS:
        result = trajectory.normalize({"action": tf.constant(values), "observation": {}}, statistics, kind)
        np.testing.assert_array_equal(result["action"][0, :3], values[0][:3])
    with pytest.raises(StatisticsError, match=r"statistics of 4 dimensions do not fit values of shape \(1, 3\)"):
        trajectory.normalize({"action": tf.zeros((1, 3)), "observation": {}}, statistics)
    with pytest.raises(ValueError, match=r"normalization 'q99' is unknown: use one of normal, bounds, bounds_q99"):
        trajectory.normalize({"action": tf.constant(values), "observation": {}}, statistics, "q99")


# ---------------------------------------------------------------------------------------------------------------------
# Windows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "future"), [(1, 0), (2, 3)])
def test_chunks_of_the_reference(window, future):
    with np.load(golden("pipeline/bridge.npz")) as file:
        arrays = dict(file)
    entries = json.loads(golden("pipeline/bridge_manifest.json").read_text())
    for number in range(5):
        standard = f"traj{number}/norm_bounds_q99"
        prefix = f"traj{number}/w{window}f{future}/"
        images = np.array([b"jpeg"] * len(arrays[f"{standard}/action"]))
        full = {
            "action": arrays[f"{standard}/action"],
            "observation": {
                "proprio": arrays[f"{standard}/proprio"],
                "image_primary": images,
                "timestep": np.arange(len(images), dtype=np.int32),
            },
            "task": {"language_instruction": arrays[f"{prefix}task/language_instruction"]},
            "absolute_action_mask": arrays[f"{prefix}absolute_action_mask"],
            "dataset_name": arrays[f"{prefix}dataset_name"],
        }
        result = trajectory.chunk(trajectory.add_pad_masks(tf.nest.map_structure(tf.constant, full)), window, future)
        compared = [key for key in entries if key.startswith(prefix)]
        assert len(compared) == 11
        for key in compared:
            value = result
            for part in key.removeprefix(prefix).split("/"):
                value = value[part]
            value = value.numpy()
            value = value.astype(arrays[key].dtype) if value.dtype == object else value
            np.testing.assert_array_equal(value, arrays[key], err_msg=key)


@hypothesis.given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 7), st.integers(0, 10**6))
@hypothesis.settings(max_examples=50)
def test_chunks_equal_plain_loops(length, window, future, seed):
    rng = np.random.default_rng(seed)
    action = rng.uniform(-1, 1, (length, 3)).astype(np.float32)
    absolute = np.array([False, True, False])
    state = rng.uniform(-1, 1, (length, 2)).astype(np.float32)
    result = trajectory.chunk(
        {
            "action": tf.constant(action),
            "observation": {"proprio": tf.constant(state)},
            "absolute_action_mask": tf.tile([absolute], [length, 1]),
        },
        window,
        future,
    )
    for t in range(length):
        for i, step in enumerate(range(t - window + 1, t + future + 1)):
            expected = action[min(max(step, 0), length - 1)]
            if step >= length:
                expected = np.where(absolute, expected, 0)
            np.testing.assert_array_equal(result["action"][t, i], expected)
            if i < window:
                np.testing.assert_array_equal(result["observation"]["proprio"][t, i], state[max(step, 0)])
                assert bool(result["observation"]["pad_mask"][t, i]) == (step >= 0)


def test_pad_masks_mark_empty_strings():
    full = trajectory.restructure(fake_rlds.config(), _raw(), views=("primary", "wrist"))
    full["task"]["language_instruction"] = tf.constant(["go", "", "go", ""])
    masked = trajectory.add_pad_masks(full)
    masks = masked["observation"]["pad_mask_dict"]
    assert masks["image_primary"].numpy().all()
    assert masks["proprio"].numpy().all()
    assert not masks["image_wrist"].numpy().any()
    assert masked["task"]["pad_mask_dict"]["language_instruction"].numpy().tolist() == [True, False, True, False]
    assert "pad_mask_dict" not in full["observation"]


def test_filters():
    full = {
        "task": {"language_instruction": tf.constant(["", "go"])},
        "action": tf.constant([[0.5, -2.0]]),
        "observation": {"proprio": tf.constant([[3.0]])},
    }
    assert trajectory.is_labeled(full)
    assert not trajectory.is_labeled({"task": {"language_instruction": tf.constant(["", ""])}})
    assert trajectory.within(full)
    assert trajectory.within(full, max_action=2.0, max_proprio=3.0)
    assert not trajectory.within(full, max_action=1.9)
    assert not trajectory.within(full, max_proprio=2.9)


@hypothesis.given(st.integers(1, 9), st.integers(0, 9))
@hypothesis.settings(max_examples=30)
def test_truncated_chunks_are_whole(length, future):
    action = np.arange(length, dtype=np.float32)[:, None]
    full = {
        "action": tf.constant(action),
        "observation": {"timestep": tf.range(length)},
        "absolute_action_mask": tf.zeros([length, 1], tf.bool),
    }
    result = trajectory.chunk(full, 1, future, truncate=True)
    whole = max(length - future, 0)
    expected = np.arange(whole)[:, None] + np.arange(future + 1)
    np.testing.assert_array_equal(result["action"][..., 0], expected)
    np.testing.assert_array_equal(result["observation"]["timestep"], np.arange(whole)[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Goals
# ---------------------------------------------------------------------------------------------------------------------


def _labelled(length, labels=None):
    return {
        "action": tf.zeros([length, 7]),
        "observation": {
            "image_primary": tf.strings.as_string(tf.range(length)),
            "timestep": tf.range(length),
        },
        "task": {"language_instruction": tf.constant(labels or ["go"] * length)},
        "episode": tf.fill([length], "file#3"),
    }


def test_goals_are_later_steps_of_the_same_episode():
    goals = np.stack([trajectory.relabel_goal(_labelled(6), seed)["task"]["timestep"].numpy() for seed in range(400)])
    for t in range(5):
        values, counts = np.unique(goals[:, t], return_counts=True)
        np.testing.assert_array_equal(values, np.arange(t + 1, 6))
        assert np.all(np.abs(counts / 400 - 1 / (5 - t)) < 0.1)  # uniform
    assert set(goals[:, 5]) == {5}
    task = trajectory.relabel_goal(_labelled(6), 1)["task"]
    np.testing.assert_array_equal(task["image_primary"].numpy().astype(int), task["timestep"])
    again = trajectory.relabel_goal(_labelled(6), 1)["task"]
    np.testing.assert_array_equal(task["timestep"], again["timestep"])


def test_a_step_is_told_its_goal_by_image_or_by_words():
    labels = ["go"] * 199 + [""]
    task = trajectory.drop_conditioning(trajectory.relabel_goal(_labelled(200, labels), 0), 0.25, 0)["task"]
    images = task["image_primary"].numpy() != b""
    np.testing.assert_array_equal(images, task["language_instruction"].numpy() == b"")
    assert images[-1]  # no words to go by
    assert 0.15 < images.mean() < 0.35
    assert np.all(task["timestep"].numpy()[~images] == 199)
