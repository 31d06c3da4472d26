"""The raw schemas of the datasets without a golden, to make stand-in trajectories of.

A schema maps "path / to / key" (keys may contain "/", so " / " separates) to "<type><columns>": f, d, i, u, b, s are
float32, float64, int32, int64, bool and string; "f7" is [T, 7], "f" is [T], "i4x5x1" is [T, 4, 5, 1].
"""

import numpy as np

_TYPES = {"f": np.float32, "d": np.float64, "i": np.int32, "u": np.int64, "b": np.bool_, "s": np.object_}

_COMMON = {
    "is_first": "b",
    "reward": "f",
    "traj_metadata / episode_metadata / file_path": "s",
    "_len": "i",
    "_traj_index": "u",
}


def _flat(action, **observations):
    """An action matrix and an instruction at the top level."""
    keys = {f"observation / {key}": kind for key, kind in observations.items()}
    return {"action": action, "language_instruction": "s", **keys, **_COMMON}


def _rtx(gripper, observations, **actions):
    """A dict action and the instruction among the observations."""
    actions = {"world_vector": "f3", "rotation_delta": "f3", "terminate_episode": "f", **gripper, **actions}
    return {
        **{f"action / {key}": kind for key, kind in actions.items()},
        **{f"observation / {key}": kind for key, kind in observations.items()},
        "observation / natural_language_instruction": "s",
        "observation / natural_language_embedding": "f4",
        **_COMMON,
    }


_TDROID = _flat(
    "f7", static_image="s", static_depth_image="s", cartesian_position="f6", gripper_position="f1", joint_position="f7"
)
_LIBERO = _flat("f7", image="s", wrist_image="s", state="f8", joint_state="f7")
_GNM = {**_flat("d2", image="s", position="d2", state="d3", yaw="d1"), "action_angle": "d3"}
_DROID = {
    **_flat(
        "d7",
        exterior_image_1_left="s",
        exterior_image_2_left="s",
        wrist_image_left="s",
        cartesian_position="d6",
        gripper_position="d1",
    ),
    "action_dict / cartesian_velocity": "d6",
    "action_dict / gripper_position": "d1",
}

SCHEMAS = {
    "bridge_dataset": _flat("f7", image_0="s", image_1="s", state="f7"),
    "ppgm": _TDROID,
    "ppgm_static": _TDROID,
    "ppgm_wrist": _TDROID,
    "berkeley_cable_routing": _rtx({}, {"image": "s", "top_image": "s", "wrist45_image": "s", "robot_state": "f7"}),
    "roboturk": _rtx({"gripper_closedness_action": "f1"}, {"front_rgb": "s"}),
    "nyu_door_opening_surprising_effectiveness": _rtx({"gripper_closedness_action": "f1"}, {"image": "s"}),
    "columbia_cairlab_pusht_real": _rtx(
        {"gripper_closedness_action": "f"}, {"image": "s", "wrist_image": "s", "robot_state": "f2"}
    ),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": _flat(
        "f4", image="s", depth_image="f4x5x1", ee_position="f3", ee_orientation="f4"
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": _flat("f7", image="s", state="f7"),
    "austin_buds_dataset_converted_externally_to_rlds": _flat("f7", image="s", wrist_image="s", state="f24"),
    "maniskill_dataset_converted_externally_to_rlds": _flat(
        "f7", image="s", wrist_image="s", depth="s", wrist_depth="s", state="f18", tcp_pose="f7"
    ),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": _flat("f8", image="s", highres_image="s"),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": _flat("f8", image="s", state="f21"),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": _flat("f4", image="s", state="f7"),
    "austin_sailor_dataset_converted_externally_to_rlds": _flat("f7", image="s", wrist_image="s", state="f8"),
    "austin_sirius_dataset_converted_externally_to_rlds": _flat("f7", image="s", wrist_image="s", state="f8"),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": _flat("f8", image="s", state="f7"),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": _flat("f8", image="s", state="f7"),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": _flat(
        "f7", image="s", image2="s", hand_image="s", end_effector_pose="f6"
    ),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": _flat("f14", image="s", pose_l="f6", pose_r="f6"),
    "berkeley_mvp_converted_externally_to_rlds": _flat("f8", hand_image="s", pose="f7", gripper="b", joint_pos="f7"),
    "berkeley_rpt_converted_externally_to_rlds": _flat("f8", hand_image="s", joint_pos="f7", gripper="b"),
    "kaist_nonprehensile_converted_externally_to_rlds": _flat("f20", image="s", state="f21"),
    "stanford_mask_vit_converted_externally_to_rlds": _flat("f5", image="s", end_effector_pose="f5", state="f15"),
    "tokyo_u_lsmo_converted_externally_to_rlds": _flat("f7", image="s", state="f13"),
    "dlr_sara_pour_converted_externally_to_rlds": _flat("f7", image="s", state="f6"),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": _flat("f7", image="s", state="f12"),
    "dlr_edan_shared_control_converted_externally_to_rlds": _flat("f7", image="s", state="f7"),
    "asu_table_top_converted_externally_to_rlds": {
        **_flat("f7", image="s", state="f7"),
        "ground_truth_states / EE": "f6",
        "ground_truth_states / bottle": "f6",
    },
    "stanford_robocook_converted_externally_to_rlds": _flat(
        "f7", image_1="s", image_2="s", depth_1="f4x5", depth_2="f4x5", state="f7"
    ),
    "imperialcollege_sawyer_wrist_cam": _flat("f8", image="s", wrist_image="s", state="f1"),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": _flat("f8", image="s", wrist_image="s", state="f20"),
    "uiuc_d3field": _flat("f3", image_1="s", image_2="s", depth_1="s", depth_2="s", state="f4x4"),
    "utaustin_mutex": _flat("f7", image="s", wrist_image="s", state="f24"),
    "cmu_playing_with_food": _flat("f9", image="s", finger_vision_1="s", state="f6"),
    "cmu_stretch": _flat("f8", image="s", state="f4"),
    "berkeley_gnm_cory_hall": _GNM,
    "berkeley_gnm_sac_son": _GNM,
    "dobbe": _flat("f7", wrist_image="s", state="f7"),
    "roboset": _flat("f8", image_left="s", image_right="s", image_wrist="s", state="f8"),
    "rh20t": {
        "action / tcp_base": "f6",
        "action / gripper": "d",
        "language_instruction": "s",
        **{f"observation / {key}": "s" for key in ("image_front", "image_side_right", "image_wrist")},
        "observation / tcp_base": "f6",
        "observation / gripper_width": "f",
        **_COMMON,
    },
    "tdroid_pour_corn_in_pot": _TDROID,
    "tdroid_flip_pot_upright": _TDROID,
    "tdroid_move_object_onto_plate": _TDROID,
    "tdroid_knock_object_over": _TDROID,
    "tdroid_cover_object_with_towel": _TDROID,
    "droid_wipe": _DROID,
    "libero_object_no_noops": _LIBERO,
    "libero_goal_no_noops": _LIBERO,
    "libero_10_no_noops": _LIBERO,
    **{
        f"aloha1_{task}_demos": _flat("f14", image="s", left_wrist_image="s", right_wrist_image="s", state="f14")
        for task in ("fold_shorts_20", "fold_shirt_30", "scoop_X_into_bowl_45", "put_X_into_pot_300")
    },
}


def raw_trajectory(schema: dict[str, str], seed: int = 0, length: int = 8) -> dict:
    """A nested dict of numpy arrays with the paths and types of a schema; numbers around -1 to 1."""
    generator = np.random.default_rng(seed)
    trajectory: dict = {}
    for path, kind in schema.items():
        shape = (length, *(int(n) for n in kind[1:].split("x") if n))
        if kind[0] == "s":
            values = np.array([f"{path} {t}".encode() for t in range(length)], object)
        else:
            values = generator.uniform(-1.2, 1.2, shape) if kind[0] in "fd" else generator.integers(0, 2, shape)
            values = values.astype(_TYPES[kind[0]])
        *folders, key = path.split(" / ")
        node = trajectory
        for folder in folders:
            node = node.setdefault(folder, {})
        node[key] = values
    return trajectory
