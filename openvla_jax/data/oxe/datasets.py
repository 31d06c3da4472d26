"""The datasets of Open X-Embodiment that OpenVLA knows: which keys hold cameras and state, what the action means."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import tensorflow as tf

from openvla_jax.data import DataError
from openvla_jax.data.oxe.state import StateEncoding, state_names
from openvla_jax.data.oxe.transforms import TRANSFORMS, Trajectory, Transform, droid_moves, standard
from openvla_jax.errors import InputError


class ActionEncoding(IntEnum):
    """What the action vector of a dataset holds."""

    EEF_POS = 1  # delta xyz (3), delta roll pitch yaw (3), gripper (1)
    JOINT_POS = 2  # joint angles (7), gripper (1)
    JOINT_POS_BIMANUAL = 3  # joint angles and gripper (6 + 1) of two arms
    EEF_R6 = 4  # delta xyz (3), the first two columns of the rotation (6), gripper (1)


# encoding -> (is the dimension absolute, not a delta?, is it normalised?)
_ACTION_MASKS = {
    ActionEncoding.EEF_POS: ((False,) * 6 + (True,), (True,) * 6 + (False,)),
    ActionEncoding.EEF_R6: ((False,) * 9 + (True,), (True,) * 9 + (False,)),
    ActionEncoding.JOINT_POS_BIMANUAL: ((True,) * 14, (True,) * 14),
}


@dataclass(frozen=True)
class DatasetConfig:
    """How one dataset is read.

    image_keys, depth_keys: view ("primary", "secondary", "wrist", ...) -> key of the standardised observation, None
    if the dataset has no such camera. state_keys: observations concatenated into the state; None is one zero column.
    state_columns: names of the state's columns, if they are not those of `oxe.state` for this dataset and encoding.
    transform: raw trajectory -> standardised trajectory, in TensorFlow operations (no Python branches on tensors: it is
    traced as it stands). frame_filter: frame with normalised actions [..., action dim] -> scalar bool, False drops it.
    action_masks: (is it absolute?, is it normalised?) per action dimension, if no ActionEncoding describes it.
    grippers: "action" or "proprio" -> dimension -> (closed, open) in the data's units, for gripper commands whose
    values are to be checked (see `statistics.check_grippers`).
    """

    name: str
    image_keys: dict[str, str | None]
    depth_keys: dict[str, str | None]
    state_keys: tuple[str | None, ...]
    state_encoding: StateEncoding
    action_encoding: ActionEncoding | None
    transform: Transform
    language_key: str = "language_instruction"
    frame_filter: Callable[[Trajectory], tf.Tensor] | None = None
    action_masks: tuple[tuple[bool, ...], tuple[bool, ...]] | None = None
    state_columns: tuple[str, ...] | None = None
    grippers: Mapping[str, Mapping[int, tuple[float, float]]] = field(default_factory=dict)

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state's columns, pads included; () if the dataset has no state."""
        return state_names(self.name, self.state_encoding) if self.state_columns is None else self.state_columns

    @tf.autograph.experimental.do_not_convert
    def standardize(self, trajectory: Trajectory) -> Trajectory:
        """Raw trajectory -> {"observation", "action", "language_instruction", ...}; the input is left as it is.

        DataError where the trajectory lacks a key that the transform reads, or the result an action or instruction.
        """
        try:
            result = self.transform(_copy_of_dicts(trajectory))
            _ = result["action"], result[self.language_key]
        except KeyError as error:
            raise DataError(
                f"dataset {self.name!r}: trajectory has no {error.args[0]!r}; it has {', '.join(_paths(trajectory))}. "
                f"Is this the right dataset and version?"
            ) from error
        return result

    @property
    def unsupported_reason(self) -> str | None:
        """Why no policy can be trained on this dataset, or None if one can."""
        if self._known_masks() is None:
            return f"dataset {self.name!r} has {self.encoding_name} actions, which the reference does not train on"
        if not any(self.image_keys.values()):
            return f"dataset {self.name!r} has no camera in its configuration"
        return None

    @property
    def supported(self) -> bool:
        """Whether the dataset can be trained on."""
        return self.unsupported_reason is None

    @property
    def absolute_action_mask(self) -> tuple[bool, ...]:
        """Per action dimension: absolute (True: padding repeats it) or relative (False: padding is 0)."""
        return self._masks()[0]

    @property
    def action_normalization_mask(self) -> tuple[bool, ...]:
        """Per action dimension: normalised by the dataset's statistics?"""
        return self._masks()[1]

    @property
    def encoding_name(self) -> str:
        """What the actions are, in one word."""
        return "own" if self.action_encoding is None else self.action_encoding.name

    def _known_masks(self):
        return self.action_masks or (self.action_encoding and _ACTION_MASKS.get(self.action_encoding))

    def _masks(self):
        masks = self._known_masks()
        if masks is None:
            raise InputError(f"{self.unsupported_reason}; leave it out of the mixture")
        return masks


def _copy_of_dicts(tree):
    return {key: _copy_of_dicts(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _paths(tree, prefix=""):
    for key, value in tree.items():
        yield from _paths(value, f"{prefix}{key}/") if isinstance(value, dict) else (f"{prefix}{key}",)


# ---------------------------------------------------------------------------------------------------------------------
# The datasets
# ---------------------------------------------------------------------------------------------------------------------

NONE, POS_EULER, POS_QUAT = StateEncoding.NONE, StateEncoding.POS_EULER, StateEncoding.POS_QUAT
JOINT, JOINT_POS = StateEncoding.JOINT, ActionEncoding.JOINT_POS

POSE = ("EEF_state", None, "gripper_state")  # the transforms spell it in two ways, as the reference does
POSE_LOWER = ("eef_state", None, "gripper_state")
ZEROS = (None,) * 8


def _entry(name, images, state, encoding, depth=(None, None, None), action=ActionEncoding.EEF_POS, frame_filter=None):
    """images, depth: keys of the primary, secondary and wrist camera."""
    views = ("primary", "secondary", "wrist")
    return DatasetConfig(
        name=name,
        image_keys=dict(zip(views, images, strict=True)),
        depth_keys=dict(zip(views, depth, strict=True)),
        state_keys=state,
        state_encoding=encoding,
        action_encoding=action,
        transform=TRANSFORMS[name],
        frame_filter=frame_filter,
    )


def _aloha(name):
    """OpenVLA-OFT's bimanual tasks: two arms' absolute joint angles, three cameras, nothing to standardise."""
    return DatasetConfig(
        name=name,
        image_keys={
            "primary": "image",
            "secondary": None,
            "left_wrist": "left_wrist_image",
            "right_wrist": "right_wrist_image",
        },
        depth_keys={"primary": None, "secondary": None, "wrist": None},
        state_keys=("state",),
        state_encoding=StateEncoding.JOINT_BIMANUAL,
        action_encoding=ActionEncoding.JOINT_POS_BIMANUAL,
        transform=standard(),
    )


def _tabletop(name, wrist):
    """The embedded demonstration task, written by openvla_jax.sim.dataset in this very form."""
    return DatasetConfig(
        name=name,
        image_keys={"primary": "image", "secondary": None, "wrist": wrist},
        depth_keys={"primary": None, "secondary": None, "wrist": None},
        state_keys=("state",),
        state_encoding=POS_EULER,
        action_encoding=ActionEncoding.EEF_POS,
        transform=standard(),
    )


_ENTRIES = [
    _entry("fractal20220817_data", ("image", None, None), ("base_pose_tool_reached", "gripper_closed"), POS_QUAT),
    _entry("kuka", ("image", None, None), ("clip_function_input/base_pose_tool_reached", "gripper_closed"), POS_QUAT),
    _entry("bridge_oxe", ("image", "image_1", None), POSE, POS_EULER),
    _entry("bridge_orig", ("image_0", "image_1", None), POSE, POS_EULER),
    _entry("bridge_dataset", ("image_0", "image_1", None), POSE, POS_EULER),
    _entry(
        "taco_play",
        ("rgb_static", None, "rgb_gripper"),
        ("state_eef", None, "state_gripper"),
        POS_EULER,
        depth=("depth_static", None, "depth_gripper"),
    ),
    _entry("jaco_play", ("image", None, "image_wrist"), ("state_eef", None, "state_gripper"), POS_EULER),
    _entry("berkeley_cable_routing", ("image", "top_image", "wrist45_image"), ("robot_state", None), JOINT),
    _entry("roboturk", ("front_rgb", None, None), ZEROS, NONE),
    _entry("nyu_door_opening_surprising_effectiveness", (None, None, "image"), ZEROS, NONE),
    _entry("viola", ("agentview_rgb", None, "eye_in_hand_rgb"), ("joint_states", "gripper_states"), JOINT),
    _entry("berkeley_autolab_ur5", ("image", None, "hand_image"), ("state",), POS_QUAT, depth=("depth", None, None)),
    _entry("toto", ("image", None, None), ("state", None), JOINT),
    _entry(
        "language_table", ("rgb", None, None), ("effector_translation", None, None, None, None, None, None), POS_EULER
    ),
    _entry(
        "columbia_cairlab_pusht_real",
        ("image", None, "wrist_image"),
        ("robot_state", None, None, None, None, None, None),
        POS_EULER,
    ),
    _entry(
        "stanford_kuka_multimodal_dataset_converted_externally_to_rlds",
        ("image", None, None),
        ("ee_position", "ee_orientation", None),
        POS_QUAT,
        depth=("depth_image", None, None),
    ),
    _entry("nyu_rot_dataset_converted_externally_to_rlds", ("image", None, None), POSE_LOWER, POS_EULER),
    _entry(
        "stanford_hydra_dataset_converted_externally_to_rlds", ("image", None, "wrist_image"), POSE_LOWER, POS_EULER
    ),
    _entry("austin_buds_dataset_converted_externally_to_rlds", ("image", None, "wrist_image"), ("state",), JOINT),
    _entry(
        "nyu_franka_play_dataset_converted_externally_to_rlds",
        ("image", "image_additional_view", None),
        ("eef_state", None, None),
        POS_EULER,
        depth=("depth", "depth_additional_view", None),
    ),
    _entry(
        "maniskill_dataset_converted_externally_to_rlds",
        ("image", None, "wrist_image"),
        ("tcp_pose", "gripper_state"),
        POS_QUAT,
        depth=("depth", None, "wrist_depth"),
    ),
    _entry(
        "furniture_bench_dataset_converted_externally_to_rlds", ("image", None, "wrist_image"), ("state",), POS_QUAT
    ),
    _entry("cmu_franka_exploration_dataset_converted_externally_to_rlds", ("highres_image", None, None), ZEROS, NONE),
    _entry("ucsd_kitchen_dataset_converted_externally_to_rlds", ("image", None, None), ("joint_state", None), JOINT),
    _entry("ucsd_pick_and_place_dataset_converted_externally_to_rlds", ("image", None, None), POSE_LOWER, POS_EULER),
    _entry("austin_sailor_dataset_converted_externally_to_rlds", ("image", None, "wrist_image"), ("state",), POS_QUAT),
    _entry("austin_sirius_dataset_converted_externally_to_rlds", ("image", None, "wrist_image"), ("state",), POS_QUAT),
    _entry(
        "bc_z", ("image", None, None), ("present/xyz", "present/axis_angle", None, "present/sensed_close"), POS_EULER
    ),
    _entry("utokyo_pr2_opening_fridge_converted_externally_to_rlds", ("image", None, None), POSE_LOWER, POS_EULER),
    _entry(
        "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds", ("image", None, None), POSE_LOWER, POS_EULER
    ),
    _entry(
        "utokyo_xarm_pick_and_place_converted_externally_to_rlds",
        ("image", "image2", "hand_image"),
        ("end_effector_pose", None, None),
        POS_EULER,
    ),
    _entry(
        "utokyo_xarm_bimanual_converted_externally_to_rlds", ("image", None, None), ("pose_r", None, None), POS_EULER
    ),
    _entry("robo_net", ("image", "image1", None), POSE_LOWER, POS_EULER),
    _entry(
        "berkeley_mvp_converted_externally_to_rlds",
        (None, None, "hand_image"),
        ("pose", "gripper"),
        POS_QUAT,
        action=JOINT_POS,
    ),
    _entry(
        "berkeley_rpt_converted_externally_to_rlds",
        (None, None, "hand_image"),
        ("joint_pos", "gripper"),
        JOINT,
        action=JOINT_POS,
    ),
    _entry("kaist_nonprehensile_converted_externally_to_rlds", ("image", None, None), ("state", None), POS_QUAT),
    _entry("stanford_mask_vit_converted_externally_to_rlds", ("image", None, None), POSE_LOWER, POS_EULER),
    _entry("tokyo_u_lsmo_converted_externally_to_rlds", ("image", None, None), POSE_LOWER, POS_EULER),
    _entry("dlr_sara_pour_converted_externally_to_rlds", ("image", None, None), ("state", None, None), POS_EULER),
    _entry("dlr_sara_grid_clamp_converted_externally_to_rlds", ("image", None, None), ("state", None, None), POS_EULER),
    _entry("dlr_edan_shared_control_converted_externally_to_rlds", ("image", None, None), ("state", None), POS_EULER),
    _entry("asu_table_top_converted_externally_to_rlds", ("image", None, None), POSE_LOWER, POS_EULER),
    _entry(
        "stanford_robocook_converted_externally_to_rlds",
        ("image_1", "image_2", None),
        POSE_LOWER,
        POS_EULER,
        depth=("depth_1", "depth_2", None),
    ),
    _entry(
        "imperialcollege_sawyer_wrist_cam",
        ("image", None, "wrist_image"),
        (None, None, None, None, None, None, None, "state"),
        NONE,
    ),
    _entry(
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
        ("image", None, "wrist_image"),
        ("joint_state", "gripper_state"),
        JOINT,
    ),
    _entry("uiuc_d3field", ("image_1", "image_2", None), ZEROS, NONE, depth=("depth_1", "depth_2", None)),
    _entry("utaustin_mutex", ("image", None, "wrist_image"), ("state",), JOINT),
    _entry(
        "berkeley_fanuc_manipulation", ("image", None, "wrist_image"), ("joint_state", None, "gripper_state"), JOINT
    ),
    _entry("cmu_playing_with_food", ("image", None, "finger_vision_1"), ("state", None, None), POS_EULER),
    _entry("cmu_play_fusion", ("image", None, None), ("state",), JOINT),
    _entry("cmu_stretch", ("image", None, None), POSE_LOWER, POS_EULER),
    _entry("berkeley_gnm_recon", (None, None, "image"), ("state", None, None), POS_EULER),
    _entry("berkeley_gnm_cory_hall", (None, None, "image"), ("state", None, None), POS_EULER),
    _entry("berkeley_gnm_sac_son", (None, None, "image"), ("state", None, None), POS_EULER),
    _entry(
        "droid",
        ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left"),
        ("proprio",),
        POS_QUAT,
        frame_filter=droid_moves,
    ),
    _entry(
        "fmb_dataset",
        ("image_side_1", "image_side_2", "image_wrist_1"),
        ("proprio",),
        POS_EULER,
        depth=("image_side_1_depth", "image_side_2_depth", "image_wrist_1_depth"),
    ),
    _entry("dobbe", ("wrist_image", None, None), ("proprio",), POS_EULER),
    _entry("roboset", ("image_left", "image_right", "image_wrist"), ("proprio",), JOINT, action=JOINT_POS),
    _entry("rh20t", ("image_front", "image_side_right", "image_wrist"), ("proprio",), POS_EULER),
    *(
        _entry(f"tdroid_{task}", ("static_image", None, None), POSE, POS_EULER, ("static_depth_image", None, None))
        for task in (
            "carrot_in_bowl",
            "pour_corn_in_pot",
            "flip_pot_upright",
            "move_object_onto_plate",
            "knock_object_over",
            "cover_object_with_towel",
        )
    ),
    _entry("droid_wipe", ("exterior_image_2_left", None, "wrist_image_left"), ("proprio",), POS_EULER),
    *(
        _entry(f"libero_{suite}_no_noops", ("image", None, "wrist_image"), POSE, POS_EULER)
        for suite in ("spatial", "object", "goal", "10")
    ),
    # These three have a transform, but which keys hold their cameras was never published.
    *(_entry(name, (None, None, None), POSE, POS_EULER) for name in ("ppgm", "ppgm_static", "ppgm_wrist")),
    _aloha("aloha1_fold_shorts_20_demos"),
    _aloha("aloha1_fold_shirt_30_demos"),
    _aloha("aloha1_scoop_X_into_bowl_45_demos"),
    _aloha("aloha1_put_X_into_pot_300_demos"),
    _tabletop("tabletop", None),
    _tabletop("tabletop_wrist", "wrist_image"),
]

DATASETS: dict[str, DatasetConfig] = {entry.name: entry for entry in _ENTRIES}
