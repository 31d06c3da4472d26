"""Open X-Embodiment: the transforms against outputs of the reference and against the written facts."""

import json
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tensorflow as tf
from conftest import golden, goldens_dir
from hypothesis.extra.numpy import arrays
from oxe_schemas import SCHEMAS, raw_trajectory

from openvla_jax.data.oxe import DATASETS, MIXTURES, TRANSFORMS, ActionEncoding, resolve_mixture
from openvla_jax.data.oxe.transforms import (
    absolute_gripper_from_relative,
    binarize_gripper,
    droid_moves,
    euler_from_quaternion,
)

# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _manifest():
    path = goldens_dir() / "oxe" / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _nested(arrays_by_name, entries):
    tree: dict = {}
    for name, entry in entries.items():
        *folders, key = entry["path"]
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[key] = tf.constant(arrays_by_name[name])
    return tree


def _leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), np.asarray(value)


def _numpy(tree):
    return dict(_leaves(tree))


def _in_tf_data(config, raw):
    """standardize() as a pipeline runs it: traced in tf.data, with a trajectory length that is not known."""
    spec = tf.nest.map_structure(lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype), raw)
    dataset = tf.data.Dataset.from_generator(lambda: iter([raw]), output_signature=spec)
    return next(iter(dataset.map(config.standardize)))


def _assert_equal(actual, expected, tolerance=()):
    """Same paths, dtypes, shapes and bits; paths in `tolerance` within 1e-5."""
    actual, expected = _numpy(actual), _numpy(expected)
    assert actual.keys() == expected.keys()
    for path, want in expected.items():
        got = actual[path]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), path
        if path in tolerance:
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        elif want.dtype == object:
            assert (got == want).all(), path
        else:
            assert got.tobytes() == want.tobytes(), path


# ---------------------------------------------------------------------------------------------------------------------
# Against the reference
# ---------------------------------------------------------------------------------------------------------------------

MANIFEST = _manifest()


@pytest.mark.parametrize("name", MANIFEST or ["oxe"])
def test_standardize_equals_the_reference(name):
    """22 datasets: every output of the reference, bit for bit, eagerly and traced."""
    saved = np.load(golden("oxe") / f"{name}.npz", allow_pickle=False)
    entry = MANIFEST[name]
    raw, untouched = _nested(saved, entry["input"]), _nested(saved, entry["input"])
    expected = _nested(saved, entry["output"])
    tolerance = {("action",)} if name.startswith("furniture_bench") else ()

    for actual in (DATASETS[name].standardize(raw), _in_tf_data(DATASETS[name], raw)):
        if name == "droid":  # either order of the exterior cameras is right
            swapped = {key.replace("out/", "out_swapped/", 1): value for key, value in entry["output"].items()}
            swapped = _nested({key: saved[key] for key in swapped if key in saved} | _missing(saved, swapped), swapped)
            first = ("observation", "exterior_image_1_left")
            if (_numpy(actual)[first] == _numpy(swapped)[first]).all():
                expected = swapped
        _assert_equal(actual, expected, tolerance)
    _assert_equal(raw, untouched)


def _missing(saved, names):
    """Outputs that the swap does not touch are stored once."""
    return {name: saved[name.replace("out_swapped/", "out/", 1)] for name in names if name not in saved}


@pytest.mark.parametrize("name", MANIFEST or ["oxe"])
def test_config_equals_the_reference(name):
    golden("oxe")
    config, want = DATASETS[name], MANIFEST[name]["config"]
    assert config.image_keys == want["image_obs_keys"]
    assert config.depth_keys == want["depth_obs_keys"]
    assert list(config.state_keys) == want["state_obs_keys"]
    assert config.state_encoding.name == want["state_encoding"]
    assert config.action_encoding.name == want["action_encoding"]
    assert (config.frame_filter is not None) == bool(want["aux_kwargs"])
    restructured = json.loads((golden("oxe_restructured") / "manifest.json").read_text())[name]
    assert list(config.absolute_action_mask) == restructured["absolute_action_mask"]
    assert list(config.action_normalization_mask) == restructured["action_normalization_mask"]
    assert sorted(mixture for mixture in MIXTURES if name in dict(MIXTURES[mixture]) and mixture != OCTO) == sorted(
        [*MANIFEST[name]["in_mixtures"], *(["libero_4_task_suites_no_noops"] if name.startswith("libero") else [])]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Against the facts as they are written down: the datasets that have no golden
# ---------------------------------------------------------------------------------------------------------------------


def _columns(*parts):
    return np.concatenate([part if part.ndim == 2 else part[:, None] for part in parts], axis=-1)


def _zeros(raw, count):
    return np.zeros((len(raw["is_first"]), count), np.float32)


def _opened(closed):
    return 1 - np.clip(closed, 0, 1)


def _binary(gripper):
    """The rule step by step, from the end."""
    state, result = gripper[-1], []
    for value in gripper[::-1]:
        state = 1.0 if value > 0.95 else 0.0 if value < 0.05 else state
        result.append(state)
    return np.array(result[::-1], gripper.dtype)


def _held(command):
    """The rule step by step, from the start."""
    orders = [1.0 if value < -0.1 else 0.0 if value > 0.1 else None for value in command]
    state = next((1.0 - order for order in orders if order is not None), 1.0)
    result = []
    for order in orders:
        state = state if order is None else order
        result.append(state)
    return np.array(result, command.dtype)


def _euler(quaternions):
    x, y, z, w = quaternions.astype(np.float64).T
    roll = np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y))
    pitch = np.arcsin(2 * (w * y - z * x))
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return np.stack([roll, pitch, yaw], axis=-1).astype(np.float32)


# dataset -> its action, from (raw trajectory, its action, its observation)
ACTIONS = {
    "ppgm": lambda r, a, o: _columns(a[:, :6], _binary(a[:, 6])),
    "berkeley_cable_routing": lambda r, a, o: _columns(a["world_vector"], a["rotation_delta"], _zeros(r, 1)),
    "roboturk": lambda r, a, o: _columns(
        a["world_vector"], a["rotation_delta"], _opened(a["gripper_closedness_action"])
    ),
    "nyu_door_opening_surprising_effectiveness": lambda r, a, o: _columns(
        a["world_vector"], a["rotation_delta"], _held(a["gripper_closedness_action"][:, 0])
    ),
    "columbia_cairlab_pusht_real": lambda r, a, o: _columns(
        a["world_vector"], a["rotation_delta"], a["gripper_closedness_action"]
    ),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": lambda r, a, o: _columns(
        a[:, :3], _zeros(r, 3), a[:, 3]
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": lambda r, a, o: a,
    "austin_buds_dataset_converted_externally_to_rlds": lambda r, a, o: _columns(a[:, :6], _opened(a[:, 6])),
    "maniskill_dataset_converted_externally_to_rlds": lambda r, a, o: a,
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": lambda r, a, o: a[:, :7],
    "ucsd_kitchen_dataset_converted_externally_to_rlds": lambda r, a, o: a[:, :7],
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": lambda r, a, o: _columns(
        a[:, :3], _zeros(r, 3), a[:, 3]
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": lambda r, a, o: _columns(a[:, :6], _opened(a[:, 6])),
    "austin_sirius_dataset_converted_externally_to_rlds": lambda r, a, o: _columns(a[:, :6], _opened(a[:, 6])),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": lambda r, a, o: a[:, :7],
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": lambda r, a, o: a[:, :7],
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": lambda r, a, o: a,
    "utokyo_xarm_bimanual_converted_externally_to_rlds": lambda r, a, o: a[:, 7:],
    "berkeley_mvp_converted_externally_to_rlds": lambda r, a, o: a,
    "berkeley_rpt_converted_externally_to_rlds": lambda r, a, o: a,
    "kaist_nonprehensile_converted_externally_to_rlds": lambda r, a, o: _columns(a[:, :6], _zeros(r, 1)),
    "stanford_mask_vit_converted_externally_to_rlds": lambda r, a, o: _columns(a[:, :4], _zeros(r, 2), a[:, 4]),
    "tokyo_u_lsmo_converted_externally_to_rlds": lambda r, a, o: a,
    "dlr_sara_pour_converted_externally_to_rlds": lambda r, a, o: a,
    "dlr_sara_grid_clamp_converted_externally_to_rlds": lambda r, a, o: a,
    "dlr_edan_shared_control_converted_externally_to_rlds": lambda r, a, o: _columns(a[:, :6], 1 - a[:, 6]),
    "asu_table_top_converted_externally_to_rlds": lambda r, a, o: a,
    "stanford_robocook_converted_externally_to_rlds": lambda r, a, o: a,
    "imperialcollege_sawyer_wrist_cam": lambda r, a, o: a[:, :7],
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": lambda r, a, o: _columns(
        a[:, :3], _euler(a[:, 3:7]), a[:, 7]
    ),
    "uiuc_d3field": lambda r, a, o: _columns(a, _zeros(r, 4)),
    "utaustin_mutex": lambda r, a, o: _columns(a[:, :6], _opened(a[:, 6])),
    "cmu_playing_with_food": lambda r, a, o: _columns(a[:, :3], _euler(a[:, 3:7]), a[:, 8]),
    "cmu_stretch": lambda r, a, o: a[:, :7],
    "berkeley_gnm_cory_hall": lambda r, a, o: _columns(a, _zeros(r, 5)),
    "berkeley_gnm_sac_son": lambda r, a, o: _columns(a, _zeros(r, 5)),
    "dobbe": lambda r, a, o: a,
    "roboset": lambda r, a, o: _columns(a[:, :7], _opened(a[:, 7])),
    "rh20t": lambda r, a, o: _columns(a["tcp_base"], a["gripper"].astype(a["tcp_base"].dtype)),
    "droid_wipe": lambda r, a, o: _columns(
        r["action_dict"]["cartesian_velocity"], 1 - r["action_dict"]["gripper_position"]
    ),
    **dict.fromkeys((f"aloha1_{task}_demos" for task in ("fold_shorts_20", "fold_shirt_30")), lambda r, a, o: a),
    **dict.fromkeys(
        (f"aloha1_{task}_demos" for task in ("scoop_X_into_bowl_45", "put_X_into_pot_300")), lambda r, a, o: a
    ),
}
ACTIONS.update({name: ACTIONS["ppgm"] for name in SCHEMAS if name.startswith(("tdroid_", "ppgm_"))})
ACTIONS.update({name: ACTIONS["utaustin_mutex"] for name in SCHEMAS if name.startswith("libero_")})


def _split_state(o):
    return {"eef_state": o["state"][:, :6], "gripper_state": o["state"][:, -1:]}


# dataset -> the observations that its transform adds or replaces
STATES = {
    "ppgm": lambda r, o: {"EEF_state": o["cartesian_position"], "gripper_state": o["gripper_position"]},
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": lambda r, o: {
        "depth_image": o["depth_image"][..., 0]
    },
    "nyu_rot_dataset_converted_externally_to_rlds": lambda r, o: _split_state(o),
    "austin_buds_dataset_converted_externally_to_rlds": lambda r, o: {"state": o["state"][:, :8]},
    "maniskill_dataset_converted_externally_to_rlds": lambda r, o: {"gripper_state": o["state"][:, 7:8]},
    "ucsd_kitchen_dataset_converted_externally_to_rlds": lambda r, o: {"joint_state": o["state"][:, :7]},
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": lambda r, o: _split_state(o),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": lambda r, o: _split_state(o),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": lambda r, o: _split_state(o),
    "kaist_nonprehensile_converted_externally_to_rlds": lambda r, o: {"state": o["state"][:, -7:]},
    "stanford_mask_vit_converted_externally_to_rlds": lambda r, o: {
        "eef_state": _columns(o["end_effector_pose"][:, :4], _zeros(r, 2)),
        "gripper_state": o["end_effector_pose"][:, 4:],
    },
    "tokyo_u_lsmo_converted_externally_to_rlds": lambda r, o: _split_state(o),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": lambda r, o: {"state": o["state"][:, :6]},
    "asu_table_top_converted_externally_to_rlds": lambda r, o: {
        "eef_state": r["ground_truth_states"]["EE"],
        "gripper_state": o["state"][:, 6:],
    },
    "stanford_robocook_converted_externally_to_rlds": lambda r, o: _split_state(o),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": lambda r, o: {
        "joint_state": o["state"][:, :7],
        "gripper_state": o["state"][:, 7:8],
    },
    "utaustin_mutex": lambda r, o: {"state": o["state"][:, :8]},
    "cmu_stretch": lambda r, o: {
        "eef_state": _columns(o["state"][:, :3], _zeros(r, 3)),
        "gripper_state": o["state"][:, 3:],
    },
    "berkeley_gnm_cory_hall": lambda r, o: {"state": _columns(o["position"], np.zeros((8, 3)), o["yaw"])},
    "berkeley_gnm_sac_son": lambda r, o: {"state": _columns(o["position"], np.zeros((8, 3)), o["yaw"])},
    "dobbe": lambda r, o: {"proprio": o["state"]},
    "roboset": lambda r, o: {"proprio": o["state"]},
    "rh20t": lambda r, o: {"proprio": _columns(o["tcp_base"], o["gripper_width"])},
    "droid_wipe": lambda r, o: {"proprio": _columns(o["cartesian_position"], o["gripper_position"])},
}
STATES.update({name: STATES["ppgm"] for name in SCHEMAS if name.startswith(("tdroid_", "ppgm_"))})
STATES.update(
    {
        name: lambda r, o: {"EEF_state": o["state"][:, :6], "gripper_state": o["state"][:, 6:]}
        for name in SCHEMAS
        if name.startswith("libero_")
    }
)


def _stand_in(name):
    raw = raw_trajectory(SCHEMAS[name])
    if name in ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", "cmu_playing_with_food"):
        raw["action"][:, 3:7] /= np.linalg.norm(raw["action"][:, 3:7], axis=-1, keepdims=True)
    return raw


@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "bridge_dataset"])
def test_standardize_follows_the_written_facts(name):
    raw = _stand_in(name)
    observation = raw["observation"]
    expected = {
        **raw,
        "observation": {**observation, **STATES.get(name, lambda r, o: {})(raw, observation)},
        "action": ACTIONS[name](raw, raw["action"], observation),
        "language_instruction": raw.get("language_instruction", observation.get("natural_language_instruction")),
    }
    tensors = tf.nest.map_structure(tf.constant, raw)
    _assert_equal(DATASETS[name].standardize(tensors), expected, {("action",)})
    _assert_equal(_in_tf_data(DATASETS[name], tensors), expected, {("action",)})
    _assert_equal(tensors, raw)


def test_bridge_relabels_by_reached_states():
    """Written out step by step; `bridge_dataset` is `bridge_orig` under another name."""
    raw = raw_trajectory(SCHEMAS["bridge_dataset"], length=6)
    raw["action"][:, 6] = [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]
    result = _numpy(DATASETS["bridge_dataset"].standardize(tf.nest.map_structure(tf.constant, raw)))
    state = raw["observation"]["state"]
    # Steps 1 to 4 remain. Step 1 is on its way to the 1 of step 2, step 3 to the 0 of step 4.
    assert result[("action",)][:, 6].tolist() == [1, 1, 0, 0]
    for row, step in enumerate(range(1, 5)):
        np.testing.assert_array_equal(result[("action",)][row, :6], state[step + 1, :6] - state[step, :6])
        np.testing.assert_array_equal(result["observation", "EEF_state"][row], state[step, :6])
        assert result["observation", "image_0"][row] == raw["observation"]["image_0"][step]
    assert len(result["traj_metadata", "episode_metadata", "file_path"]) == 5  # as the reference leaves it


@pytest.mark.parametrize("name", ["ppgm", "nyu_door_opening_surprising_effectiveness", "rh20t"])
def test_float64_recordings_keep_their_type(name):
    """The reference fails on these."""
    doubled = {path: kind.replace("f", "d") for path, kind in SCHEMAS[name].items()}
    raw = raw_trajectory(doubled)
    result = DATASETS[name].standardize(tf.nest.map_structure(tf.constant, raw))
    assert result["action"].dtype == tf.float64
    np.testing.assert_array_equal(result["action"], ACTIONS[name](raw, raw["action"], raw["observation"]))


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("name", ["bridge_orig", "bridge_oxe"])
def test_short_bridge_trajectories_are_empty_not_errors(name, length):
    schema = dict(SCHEMAS["bridge_dataset"])
    if name == "bridge_oxe":
        del schema["action"]
        schema |= {"action / world_vector": "f3", "action / rotation_delta": "f3", "action / open_gripper": "b"}
        schema |= {"observation / image": "s", "observation / natural_language_instruction": "s"}
    raw = tf.nest.map_structure(tf.constant, raw_trajectory(schema, length=length))
    for result in (DATASETS[name].standardize(raw), _in_tf_data(DATASETS[name], raw)):
        assert result["action"].shape == (0, 7)
        assert result["observation"]["EEF_state"].shape == (0, 6)


# ---------------------------------------------------------------------------------------------------------------------
# Every entry
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MANIFEST, *SCHEMAS])
def test_configured_keys_exist_after_the_transform(name):
    """All cameras, depth images, states and the instruction that a configuration names, with one row per action."""
    if name in SCHEMAS:
        raw = tf.nest.map_structure(tf.constant, _stand_in(name))
    else:
        saved = np.load(golden("oxe") / f"{name}.npz", allow_pickle=False)
        raw = _nested(saved, MANIFEST[name]["input"])
    config = DATASETS[name]
    result = config.standardize(raw)
    keys = {*config.image_keys.values(), *config.depth_keys.values(), *config.state_keys} - {None}
    steps = result["action"].shape[0]
    for key in keys:
        assert result["observation"][key].shape[0] == steps
    assert result[config.language_key].shape == (steps,)
    assert result[config.language_key].dtype == tf.string
    if config.supported:
        assert result["action"].shape[1] == len(config.absolute_action_mask) == len(config.action_normalization_mask)


def test_every_transform_is_tested():
    golden("oxe")
    assert {*MANIFEST, *SCHEMAS} >= set(TRANSFORMS)


OCTO = "oxe_flex_act_soup"
OFT = {"libero_4_task_suites_no_noops"} | {name for name in DATASETS if name.startswith("aloha1_")}


def test_counts():
    assert len(TRANSFORMS) == 73
    configured = [name for name in TRANSFORMS if not name.startswith("ppgm")]
    assert len(configured) == 70
    assert set(configured) <= set(DATASETS)
    assert len(MIXTURES.keys() - OFT - {OCTO}) == 18
    assert len(OFT) == 5
    encodings = [DATASETS[name].state_encoding.name for name in configured]
    assert {name: encodings.count(name) for name in encodings} == {
        "POS_EULER": 43,
        "POS_QUAT": 11,
        "JOINT": 11,
        "NONE": 5,
    }
    actions = [DATASETS[name].action_encoding.name for name in configured]
    assert {name: actions.count(name) for name in actions} == {"EEF_POS": 67, "JOINT_POS": 3}


def test_joint_datasets_say_why_they_are_not_supported():
    rejected = {name for name, config in DATASETS.items() if config.action_encoding == ActionEncoding.JOINT_POS}
    assert rejected == {
        "berkeley_mvp_converted_externally_to_rlds",
        "berkeley_rpt_converted_externally_to_rlds",
        "roboset",
    }
    for name in rejected:
        assert not DATASETS[name].supported
        with pytest.raises(ValueError, match=f"'{name}' has JOINT_POS actions"):
            _ = DATASETS[name].absolute_action_mask
    assert not DATASETS["ppgm"].supported
    assert "no camera" in DATASETS["ppgm"].unsupported_reason


def test_bimanual_actions_are_absolute_and_normalised():
    config = DATASETS["aloha1_put_X_into_pot_300_demos"]
    assert config.absolute_action_mask == config.action_normalization_mask == (True,) * 14
    assert [view for view, key in config.image_keys.items() if key] == ["primary", "left_wrist", "right_wrist"]


def test_missing_key_names_dataset_key_and_what_there_is():
    raw = tf.nest.map_structure(tf.constant, raw_trajectory(SCHEMAS["roboturk"]))
    del raw["action"]["rotation_delta"]
    message = (
        r"'roboturk': trajectory has no 'action/rotation_delta'; it has action/world_vector, .*observation/front_rgb"
    )
    with pytest.raises(ValueError, match=message):
        DATASETS["roboturk"].standardize(raw)
    with pytest.raises(ValueError, match=message):
        _in_tf_data(DATASETS["roboturk"], raw)
    with pytest.raises(ValueError, match="'roboturk': trajectory has no 'action/world_vector'"):
        DATASETS["roboturk"].standardize({**raw, "action": tf.zeros([8, 7])})
    with pytest.raises(ValueError, match="'dobbe': trajectory has no 'action'"):
        DATASETS["dobbe"].standardize({"observation": {"state": tf.zeros([8, 7])}})
    with pytest.raises(ValueError, match="'dobbe': trajectory has no 'language_instruction'"):
        DATASETS["dobbe"].standardize({"observation": {"state": tf.zeros([8, 7])}, "action": tf.zeros([8, 7])})


# ---------------------------------------------------------------------------------------------------------------------
# Gripper, rotation, DROID
# ---------------------------------------------------------------------------------------------------------------------

_BINARY_VALUES = st.sampled_from([0.0, 0.04, 0.05, 0.2, 0.5, 0.95, 0.96, 1.0, -0.3, math.nan])
_COMMANDS = st.sampled_from([0.0, 0.1, -0.1, 0.11, -0.11, 1.0, -1.0, 0.05, math.nan])


@hypothesis.given(
    arrays(np.float32, st.integers(1, 12), elements=st.one_of(_BINARY_VALUES, st.floats(-1, 2, width=32)))
)
def test_binarize_gripper(gripper):
    np.testing.assert_array_equal(binarize_gripper(tf.constant(gripper)), _binary(gripper))


@hypothesis.given(arrays(np.float32, st.integers(1, 12), elements=st.one_of(_COMMANDS, st.floats(-1, 1, width=32))))
def test_absolute_gripper_from_relative(command):
    np.testing.assert_array_equal(absolute_gripper_from_relative(tf.constant(command)), _held(command))


def test_gripper_polarity():
    """Raw signal -> 1 = open, 0 = closed."""
    assert binarize_gripper(tf.constant([1.0, 0.5, 0.0])).numpy().tolist() == [1, 0, 0]
    assert absolute_gripper_from_relative(tf.constant([0.0, 1.0, 0.0, -1.0])).numpy().tolist() == [1, 0, 0, 1]
    assert absolute_gripper_from_relative(tf.constant([0.0, 0.0])).numpy().tolist() == [1, 1]
    for name, closed, opened in (
        ("libero_10_no_noops", 1.0, -1.0),
        ("austin_sailor_dataset_converted_externally_to_rlds", 1.0, -1.0),
        ("dlr_edan_shared_control_converted_externally_to_rlds", 1.0, 0.0),
        ("droid_wipe", 1.0, 0.0),
    ):
        raw = raw_trajectory(SCHEMAS[name], length=2)
        if name == "droid_wipe":
            raw["action_dict"]["gripper_position"][:, 0] = closed, opened
        else:
            raw["action"][:, -1] = closed, opened
        result = DATASETS[name].standardize(tf.nest.map_structure(tf.constant, raw))
        assert result["action"][:, -1].numpy().tolist() == [0, 1], name


def _rotation(roll, pitch, yaw):
    (cr, sr), (cp, sp), (cy, sy) = ((math.cos(a), math.sin(a)) for a in (roll, pitch, yaw))
    rx = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    ry = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    rz = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return rz @ ry @ rx


def _rotated(quaternion, vector):
    """Turns a vector by q v q*, the definition."""
    axis, w = quaternion[:3], quaternion[3]
    return vector + 2 * np.cross(axis, np.cross(axis, vector) + w * vector)


@hypothesis.given(arrays(np.float64, 4, elements=st.floats(-1, 1)))
@hypothesis.example(np.array([0, math.sqrt(0.5), 0, math.sqrt(0.5)]))
@hypothesis.example(np.array([0.5, 0.5, -0.5, 0.5]))
@hypothesis.example(np.array([0.5, -0.5, 0.5, 0.5]))
@hypothesis.example(np.array([0.0, -math.sqrt(0.5), 0, math.sqrt(0.5)]))
@hypothesis.example(np.array([1.0, 0.0, 0.0, 0.0]))
def test_euler_angles_turn_as_the_quaternion_does(quaternion):
    """At and off gimbal lock: Rz(yaw) Ry(pitch) Rx(roll) equals the quaternion's rotation."""
    norm = np.linalg.norm(quaternion)
    hypothesis.assume(norm > 1e-3)
    quaternion = quaternion / norm
    roll, pitch, yaw = euler_from_quaternion(tf.constant(quaternion[None])).numpy()[0]
    expected = np.stack([_rotated(quaternion, axis) for axis in np.eye(3)], axis=-1)
    # Within 1e-6 of the pole the pitch is taken as 90 degrees: its error there is up to sqrt(2e-6).
    np.testing.assert_allclose(_rotation(roll, pitch, yaw), expected, rtol=0, atol=2e-3)
    if abs(expected[2, 0]) < 1 - 1e-5:
        np.testing.assert_allclose(_rotation(roll, pitch, yaw), expected, rtol=0, atol=1e-9)
    else:
        assert abs(abs(pitch) - math.pi / 2) < 5e-3


def test_droid_swaps_half_of_the_trajectories_and_always_the_same():
    first, second = "exterior_image_1_left", "exterior_image_2_left"
    swaps = []
    for seed in range(200):
        raw = tf.nest.map_structure(tf.constant, raw_trajectory(SCHEMAS["droid_wipe"], seed, length=3))
        result = DATASETS["droid"].standardize(raw)["observation"]
        swapped = b"image_2" in result[first].numpy()[0]
        expected = (second, first) if swapped else (first, second)
        for key, source in zip((first, second), expected, strict=True):
            assert (result[key].numpy() == raw["observation"][source].numpy()).all()
        if seed < 5:
            again = _in_tf_data(DATASETS["droid"], raw)["observation"]
            assert (again[first].numpy() == result[first].numpy()).all()
        swaps.append(swapped)
    assert 70 < sum(swaps) < 130


def test_droid_filter_drops_only_standing_still():
    """The filter sees normalised actions, where zero is -2 q01 / (q99 - q01) - 1; the gripper does not count."""
    config = DATASETS["droid"]
    assert config.frame_filter is droid_moves
    q01 = np.array([-0.77762979, -0.58035141, -0.57950908, -0.6464048, -0.70411083, -0.88951044])
    q99 = np.array([0.75979321, 0.57262422, 0.73510006, 0.67056103, 0.64649482, 0.88975422])
    still = np.concatenate([-2 * q01 / (q99 - q01) - 1, [1.0]]).astype(np.float32)
    assert not config.frame_filter({"action": tf.constant(still[None])})
    assert not config.frame_filter({"action": tf.constant([still * 1, [*still[:6], 0]])})
    for axis in range(6):
        moving = still.copy()
        moving[axis] += 3e-5
        assert config.frame_filter({"action": tf.constant([still, moving])})
    assert config.frame_filter({"action": tf.zeros([1, 7])})
    assert [name for name in DATASETS if DATASETS[name].frame_filter] == ["droid"]


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures
# ---------------------------------------------------------------------------------------------------------------------


def test_mixtures_hold_known_datasets_once():
    sizes = {name: len(MIXTURES[name]) for name in MIXTURES if len(MIXTURES[name]) > 1}
    assert sizes == {
        "bridge_rt_1": 2,
        "rtx": 10,
        "rtx_franka": 24,
        "oxe_magic_soup": 23,
        "oxe_magic_soup_plus": 27,
        "oxe_magic_soup_plus_minus": 25,
        "libero_4_task_suites_no_noops": 4,
        OCTO: 32,
    }
    for name, pairs in MIXTURES.items():
        datasets = [dataset for dataset, _ in pairs]
        assert len(set(datasets)) == len(datasets)
        assert all(weight > 0 for _, weight in pairs)
        unreleased = {"gnm_dataset", "aloha_static_dataset", "aloha_mobile_dataset"} if name == OCTO else set()
        assert set(datasets) - set(DATASETS) == unreleased


def test_weights():
    soup, plus, minus = (dict(MIXTURES[f"oxe_magic_soup{suffix}"]) for suffix in ("", "_plus", "_plus_minus"))
    assert soup["fractal20220817_data"] == plus["fractal20220817_data"] == 0.54087122203
    assert minus["fractal20220817_data"] == 1.0
    assert soup["kuka"] == minus["kuka"] == 0.8341046294
    assert soup["furniture_bench_dataset_converted_externally_to_rlds"] == 0.1
    assert soup["nyu_franka_play_dataset_converted_externally_to_rlds"] == 3.0
    assert sum(soup.values()) == pytest.approx(29.57497585143)
    assert {name: plus[name] for name in plus.keys() - soup.keys()} == {
        "bc_z": 0.2,
        "fmb_dataset": 1.0,
        "dobbe": 0.2,
        "droid": 0.06,
    }
    assert plus.keys() - minus.keys() == {"language_table", "droid"}
    franka = dict(MIXTURES["rtx_franka"])
    assert (franka["taco_play"], franka["berkeley_cable_routing"], franka["viola"], franka["toto"]) == (2, 3, 2, 1)
    assert franka["cmu_franka_exploration_dataset_converted_externally_to_rlds"] == 5.0
    assert sum(franka.values()) == pytest.approx(sum(dict(MIXTURES["rtx"]).values()) + 22.2)
    octo = dict(MIXTURES[OCTO])
    assert (octo["aloha_static_dataset"], octo["roboset"], octo["bridge_dataset"]) == (3.0, 0.5, 1.0)
    # The reference takes the nominal length of an epoch from datasets of weight 1, so a mixture needs one.
    assert all(1.0 in dict(pairs).values() for pairs in MIXTURES.values())


def test_resolve_mixture():
    assert resolve_mixture("rtx") == MIXTURES["rtx"]
    assert resolve_mixture("taco_play") == (("taco_play", 1.0),)
    assert resolve_mixture([("mine", 2), ("toto", 0.5)], [*DATASETS, "mine"]) == (("mine", 2.0), ("toto", 0.5))


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("oxe_magic_sup", r"'oxe_magic_sup' \(did you mean 'oxe_magic_soup'\?\)"),
        ("bridge_origin", r"'bridge_origin' \(did you mean 'bridge_orig'\?\)"),
        (
            [("toto", 1.0), ("tako_play", 1.0), ("violas", 1.0)],
            r"'tako_play' \(did you mean 'taco_play'\?\), 'violas' .*'viola'",
        ),
        ("oxe_flex_act_soup", "'gnm_dataset' .*'aloha_static_dataset' .*'aloha_mobile_dataset'"),
        ([("toto", 1.0), ("toto", 2.0)], "'toto' is given twice"),
        ([("toto", 0.0)], "weight 0.0 of dataset 'toto'"),
        ([("toto", math.nan)], "weight nan of dataset 'toto'"),
        ([], "mixture is empty"),
    ],
)
def test_bad_mixtures(mixture, message):
    with pytest.raises(ValueError, match=message):
        resolve_mixture(mixture)
