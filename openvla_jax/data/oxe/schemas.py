"""What is stored in the steps of each dataset of Open X-Embodiment: the raw schemas, to make stand-ins of.

A schema maps "path / to / key" (keys may contain "/", so " / " separates) to "<type><columns>". Types: f, d, i, u, b
are float32, float64, int32, int64 and bool, s is text, j an encoded image, p float32 numbers packed into a string, c a
text as int32 codes. "f7" is [T, 7], "f" is [T], "i4x5x1" is [T, 4, 5, 1]. Large arrays that no transform reads in full
(depth, embeddings) are shortened. Source: reference transforms and the datasets' published features.
"""

_COMMON = {"is_first": "b", "is_last": "b", "is_terminal": "b", "reward": "f"}


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
    "f7", static_image="j", static_depth_image="j", cartesian_position="f6", gripper_position="f1", joint_position="f7"
)
_LIBERO = _flat("f7", image="j", wrist_image="j", state="f8", joint_state="f7")
_GNM = {**_flat("d2", image="j", position="d2", state="d3", yaw="d1"), "action_angle": "d3"}
_DROID = {
    **_flat(
        "d7",
        exterior_image_1_left="j",
        exterior_image_2_left="j",
        wrist_image_left="j",
        cartesian_position="d6",
        gripper_position="d1",
        joint_position="d7",
    ),
    **{f"action_dict / {key}": "d6" for key in ("cartesian_position", "cartesian_velocity")},
    **{f"action_dict / {key}": "d7" for key in ("joint_position", "joint_velocity")},
    **{f"action_dict / {key}": "d1" for key in ("gripper_position", "gripper_velocity")},
    **{f"language_instruction_{number}": "s" for number in (2, 3)},
}

_NAVIGATION = {"base_displacement_vector": "f2", "base_displacement_vertical_rotation": "f1"}

SCHEMAS = {
    "fractal20220817_data": _rtx(
        {"gripper_closedness_action": "f1", "terminate_episode": "i3", **_NAVIGATION},
        {
            "image": "j",
            "base_pose_tool_reached": "f7",
            "gripper_closed": "f1",
            "height_to_bottom": "f1",
            "workspace_bounds": "f3x3",
        },
    ),
    "kuka": _rtx(
        {"gripper_closedness_action": "f1", "terminate_episode": "i3", **_NAVIGATION},
        {"image": "j", "clip_function_input/base_pose_tool_reached": "p7", "gripper_closed": "p1", "task_id": "i"},
    ),
    "bridge_oxe": _rtx({"open_gripper": "b"}, {"image": "j", "image_1": "j", "state": "f7"}),
    "bridge_orig": _flat("f7", image_0="j", image_1="j", state="f7"),
    "taco_play": {
        **_rtx(
            {},
            {
                "rgb_static": "j",
                "rgb_gripper": "j",
                "depth_static": "f4x5",
                "depth_gripper": "f3x3",
                "robot_obs": "f15",
                "structured_language_instruction": "s",
            },
        ),
        **{f"action / {key}": "f7" for key in ("actions", "rel_actions_gripper", "rel_actions_world")},
    },
    "jaco_play": _rtx(
        {"gripper_closedness_action": "f1", "terminate_episode": "i3"},
        {
            "image": "j",
            "image_wrist": "j",
            "end_effector_cartesian_pos": "f7",
            "end_effector_cartesian_velocity": "f6",
            "joint_pos": "f8",
        },
    ),
    "language_table": {
        "action": "f2",
        "observation / rgb": "j",
        "observation / effector_translation": "f2",
        "observation / effector_target_translation": "f2",
        "observation / instruction": "c512",
        **_COMMON,
    },
    "bc_z": {
        **{
            f"action / future/{key}": kind
            for key, kind in {"xyz_residual": "f30", "axis_angle_residual": "f30", "target_close": "u10"}.items()
        },
        **{
            f"observation / present/{key}": kind
            for key, kind in {"xyz": "f3", "axis_angle": "f3", "sensed_close": "f1", "autonomous": "u1"}.items()
        },
        "observation / image": "j",
        "observation / natural_language_instruction": "s",
        "observation / natural_language_embedding": "f4",
        "observation / episode_success": "f",
        "observation / sequence_length": "u",
        **_COMMON,
    },
    "droid": _DROID,
    "libero_spatial_no_noops": _LIBERO,
    "furniture_bench_dataset_converted_externally_to_rlds": {
        **_flat("f8", image="j", wrist_image="j", state="f35"),
        "skill_completion": "f",
    },
    "stanford_hydra_dataset_converted_externally_to_rlds": {
        **_flat("f7", image="j", wrist_image="j", state="f27"),
        "is_dense": "f",
    },
    "viola": _rtx(
        {"gripper_closedness_action": "f"},
        {
            "agentview_rgb": "j",
            "eye_in_hand_rgb": "j",
            "joint_states": "f7",
            "gripper_states": "f1",
            "ee_states": "f16",
        },
    ),
    "berkeley_autolab_ur5": _rtx(
        {"gripper_closedness_action": "f"},
        {"image": "j", "hand_image": "j", "image_with_depth": "j", "robot_state": "f15"},
    ),
    "tdroid_carrot_in_bowl": _TDROID,
    "fmb_dataset": _flat(
        "f7",
        image_side_1="j",
        image_side_2="j",
        image_wrist_1="j",
        image_wrist_2="j",
        image_side_1_depth="f4x5",
        image_side_2_depth="f4x5",
        image_wrist_1_depth="f4x5",
        image_wrist_2_depth="f4x5",
        eef_pose="f7",
        state_gripper_pose="f",
        eef_force="f3",
    ),
    "robo_net": _flat("f5", image="j", image1="j", image2="j", state="f5"),
    "nyu_franka_play_dataset_converted_externally_to_rlds": _flat(
        "f15", image="j", image_additional_view="j", depth="i4x5x1", depth_additional_view="i4x5x1", state="f13"
    ),
    "berkeley_gnm_recon": _GNM,
    "toto": _rtx({"open_gripper": "b"}, {"image": "j", "state": "f7"}),
    "berkeley_fanuc_manipulation": _flat("f6", image="j", wrist_image="j", state="f13", end_effector_state="f7"),
    "cmu_play_fusion": _flat("f9", image="j", state="f8"),
    "bridge_dataset": _flat("f7", image_0="j", image_1="j", state="f7"),
    "ppgm": _TDROID,
    "ppgm_static": _TDROID,
    "ppgm_wrist": _TDROID,
    "berkeley_cable_routing": _rtx({}, {"image": "j", "top_image": "j", "wrist45_image": "j", "robot_state": "f7"}),
    "roboturk": _rtx({"gripper_closedness_action": "f1"}, {"front_rgb": "j"}),
    "nyu_door_opening_surprising_effectiveness": _rtx({"gripper_closedness_action": "f1"}, {"image": "j"}),
    "columbia_cairlab_pusht_real": _rtx(
        {"gripper_closedness_action": "f"}, {"image": "j", "wrist_image": "j", "robot_state": "f2"}
    ),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": _flat(
        "f4", image="j", depth_image="f4x5x1", ee_position="f3", ee_orientation="f4"
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": _flat("f7", image="j", state="f7"),
    "austin_buds_dataset_converted_externally_to_rlds": _flat("f7", image="j", wrist_image="j", state="f24"),
    "maniskill_dataset_converted_externally_to_rlds": _flat(
        "f7", image="j", wrist_image="j", depth="j", wrist_depth="j", state="f18", tcp_pose="f7"
    ),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": _flat("f8", image="j", highres_image="j"),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": _flat("f8", image="j", state="f21"),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": _flat("f4", image="j", state="f7"),
    "austin_sailor_dataset_converted_externally_to_rlds": _flat("f7", image="j", wrist_image="j", state="f8"),
    "austin_sirius_dataset_converted_externally_to_rlds": _flat("f7", image="j", wrist_image="j", state="f8"),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": _flat("f8", image="j", state="f7"),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": _flat("f8", image="j", state="f7"),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": _flat(
        "f7", image="j", image2="j", hand_image="j", end_effector_pose="f6"
    ),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": _flat("f14", image="j", pose_l="f6", pose_r="f6"),
    "berkeley_mvp_converted_externally_to_rlds": _flat("f8", hand_image="j", pose="f7", gripper="b", joint_pos="f7"),
    "berkeley_rpt_converted_externally_to_rlds": _flat("f8", hand_image="j", joint_pos="f7", gripper="b"),
    "kaist_nonprehensile_converted_externally_to_rlds": _flat("f20", image="j", state="f21"),
    "stanford_mask_vit_converted_externally_to_rlds": _flat("f5", image="j", end_effector_pose="f5", state="f15"),
    "tokyo_u_lsmo_converted_externally_to_rlds": _flat("f7", image="j", state="f13"),
    "dlr_sara_pour_converted_externally_to_rlds": _flat("f7", image="j", state="f6"),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": _flat("f7", image="j", state="f12"),
    "dlr_edan_shared_control_converted_externally_to_rlds": _flat("f7", image="j", state="f7"),
    "asu_table_top_converted_externally_to_rlds": {
        **_flat("f7", image="j", state="f7"),
        "ground_truth_states / EE": "f6",
        "ground_truth_states / bottle": "f6",
    },
    "stanford_robocook_converted_externally_to_rlds": _flat(
        "f7", image_1="j", image_2="j", depth_1="f4x5", depth_2="f4x5", state="f7"
    ),
    "imperialcollege_sawyer_wrist_cam": _flat("f8", image="j", wrist_image="j", state="f1"),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": _flat("f8", image="j", wrist_image="j", state="f20"),
    "uiuc_d3field": _flat("f3", image_1="j", image_2="j", depth_1="j", depth_2="j", state="f4x4"),
    "utaustin_mutex": _flat("f7", image="j", wrist_image="j", state="f24"),
    "cmu_playing_with_food": _flat("f9", image="j", finger_vision_1="j", state="f6"),
    "cmu_stretch": _flat("f8", image="j", state="f4"),
    "berkeley_gnm_cory_hall": _GNM,
    "berkeley_gnm_sac_son": _GNM,
    "dobbe": _flat("f7", wrist_image="j", state="f7"),
    "roboset": _flat("f8", image_left="j", image_right="j", image_wrist="j", state="f8"),
    "rh20t": {
        "action / tcp_base": "f6",
        "action / gripper": "d",
        "language_instruction": "s",
        **{f"observation / {key}": "j" for key in ("image_front", "image_side_right", "image_wrist")},
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
        f"aloha1_{task}_demos": _flat("f14", image="j", left_wrist_image="j", right_wrist_image="j", state="f14")
        for task in ("fold_shorts_20", "fold_shirt_30", "scoop_X_into_bowl_45", "put_X_into_pot_300")
    },
}
