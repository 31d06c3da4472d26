"""From the raw trajectories of Open X-Embodiment to one form: the 73 standardisation transforms of OpenVLA.

A raw trajectory is one RLDS episode as a dict of tensors with a leading time axis T (images still encoded as strings).
Every dataset has its own keys; after its transform there is an `action` whose gripper is 1 = open and 0 = closed, the
state entries that the dataset's configuration names, and a `language_instruction`. All else passes through untouched,
in its own dtype: the pipeline picks what it needs later and casts to float32 then.

A transform is put together from *readers*, functions from the raw trajectory to one tensor: `act`, `obs` and `field`
read columns, the others wrap readers. `standard(...)` makes a transform out of them, and `TRANSFORMS` at the end of the
file is the table of all datasets. Everything is plain TensorFlow on tensors of unknown length, so it runs inside
`tf.data`, keeps no state and draws no random numbers. No transform changes the dict that it is given.

Outputs equal the reference's bit for bit. Two things go beyond it: float64 actions work everywhere (the reference fails
on them in rh20t and wherever it binarises the gripper or makes it absolute), and so do trajectories of no step.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

Trajectory = dict
Reader = Callable[[Trajectory], tf.Tensor]
Transform = Callable[[Trajectory], Trajectory]

# ---------------------------------------------------------------------------------------------------------------------
# Gripper signals
# ---------------------------------------------------------------------------------------------------------------------


def binarize_gripper(gripper: tf.Tensor) -> tf.Tensor:
    """Continuous gripper [T] -> 1 (above 0.95) or 0 (below 0.05), in the same dtype.

    A value in between is on its way to the next decided one and takes that value. After the last decided step there
    is none: such steps take the raw value of the last step, as the reference does.
    """
    is_open = gripper > 0.95
    decided = tf.logical_or(is_open, gripper < 0.05)
    values = tf.cast(tf.boolean_mask(is_open, decided), gripper.dtype)
    still_to_come = tf.math.cumsum(tf.cast(decided, tf.int32), reverse=True)  # decided steps from this one on
    return tf.gather(tf.concat([values, gripper[-1:]], axis=0), tf.size(values) - still_to_come)


def absolute_gripper_from_relative(command: tf.Tensor) -> tf.Tensor:
    """Opening (< -0.1) and closing (> 0.1) commands [T] -> the held state [T], 1 open, 0 closed, in the same dtype.

    Before the first command the gripper is in the opposite state of what that command asks for; without any command it
    is open throughout.
    """
    opening = command < -0.1
    commanded = tf.logical_or(opening, command > 0.1)
    states = tf.cast(tf.boolean_mask(opening, commanded), command.dtype)
    start = tf.concat([1 - states, tf.ones([1], command.dtype)], axis=0)[:1]
    return tf.gather(tf.concat([start, states], axis=0), tf.math.cumsum(tf.cast(commanded, tf.int32)))


# ---------------------------------------------------------------------------------------------------------------------
# Rotations
# ---------------------------------------------------------------------------------------------------------------------


def euler_from_quaternion(quaternion: tf.Tensor) -> tf.Tensor:
    """Unit quaternions [..., 4], order x y z w -> Euler angles [..., 3] (roll, pitch, yaw; R = Rz Ry Rx), radians.

    Same choices as `tensorflow_graphics` 2021.12.3, which the reference calls: within 1e-6 of pitch +-90 degrees only
    the sum or difference of roll and yaw is determined, so yaw is 0 and roll carries it all. The quaternion is not
    normalised; one whose norm is far from 1 can give NaN, which the pipeline's check of actions reports.
    """
    x, y, z, w = tf.unstack(quaternion, axis=-1)
    margin = 2 * np.finfo(quaternion.dtype.as_numpy_dtype).eps

    def shrink(value):  # so that rounding never puts an entry of the rotation matrix outside of -1 ... 1
        return value * (1 - margin)

    x2, y2, z2 = shrink(2 * x), shrink(2 * y), shrink(2 * z)
    r00, r01, r02 = shrink(1 - (y2 * y + z2 * z)), shrink(y2 * x - z2 * w), shrink(z2 * x + y2 * w)
    r10, r20 = shrink(y2 * x + z2 * w), shrink(z2 * x - y2 * w)
    r21, r22 = shrink(z2 * y + x2 * w), shrink(1 - (x2 * x + y2 * y))

    def off_zero(value):  # atan2(0, -0.0) would be pi
        return tf.where(value < 0, value - margin, value + margin)

    upright = tf.stack([tf.atan2(r21, off_zero(r22)), -tf.asin(r20), tf.atan2(r10, off_zero(r00))], axis=-1)
    side = tf.where(r20 < 0, tf.ones_like(r20), -tf.ones_like(r20))  # of the vertical: pitch is side * 90 degrees
    locked = tf.stack([tf.atan2(side * r01, side * off_zero(r02)), side * (math.pi / 2), tf.zeros_like(r20)], axis=-1)
    return tf.where((tf.abs(tf.abs(r20) - 1) < 1e-6)[..., None], locked, upright)


# ---------------------------------------------------------------------------------------------------------------------
# Readers
# ---------------------------------------------------------------------------------------------------------------------


def _at(trajectory: Trajectory, *path: str) -> Any:
    """`trajectory[path[0]][path[1]]...`; KeyError with the whole path where that is not there."""
    node: Any = trajectory
    for key in path:
        if not isinstance(node, dict) or key not in node:
            raise KeyError("/".join(path))
        node = node[key]
    return node


def field(*path: str, columns: slice = slice(None)) -> Reader:
    """Columns of the last axis of the tensor at a path; KeyError(path) where there is no tensor."""

    def read(trajectory: Trajectory) -> tf.Tensor:
        value = _at(trajectory, *path)
        if isinstance(value, dict):
            raise KeyError("/".join(path))
        return value if columns == slice(None) else value[..., columns]

    return read


def obs(key: str, start: int | None = None, stop: int | None = None) -> Reader:
    """Columns [start:stop] of an observation."""
    return field("observation", key, columns=slice(start, stop))


def act(start: int | None = None, stop: int | None = None) -> Reader:
    """Columns [start:stop] of an action that is one matrix."""
    return field("action", columns=slice(start, stop))


def act_key(key: str, start: int | None = None, stop: int | None = None) -> Reader:
    """Columns [start:stop] of one entry of an action that is a dict."""
    return field("action", key, columns=slice(start, stop))


def _wrap(function: Callable[..., tf.Tensor]) -> Callable[..., Reader]:
    """A function of tensors as a function of readers."""
    return lambda *parts: lambda trajectory: function(*(part(trajectory) for part in parts))


join = _wrap(lambda *parts: tf.concat([tf.cast(part, parts[0].dtype) for part in parts], axis=-1))
zeros = _wrap(tf.zeros_like)
ones = _wrap(tf.ones_like)
floats = _wrap(lambda x: tf.cast(x, tf.float32))
column = _wrap(lambda x: x[..., None])  # [T] -> [T, 1]
first_channel = _wrap(lambda x: x[..., 0])
inverted = _wrap(lambda x: 1 - x)
clipped = _wrap(lambda x: tf.clip_by_value(x, 0, 1))
binarized = _wrap(lambda x: binarize_gripper(x[:, 0])[:, None])  # [T, 1] -> [T, 1]
absolute = _wrap(lambda x: absolute_gripper_from_relative(x[:, 0])[:, None])  # [T, 1] -> [T, 1]
euler = _wrap(euler_from_quaternion)


def zlib_floats(part: Reader, width: int) -> Reader:
    """ZLIB-compressed little-endian float32 rows, strings [T] -> float32 [T, width]."""

    def read(trajectory):
        raw = tf.io.decode_compressed(part(trajectory), compression_type="ZLIB")
        return tf.reshape(tf.io.decode_raw(raw, tf.float32), [-1, width])

    return read


def text_from_code_points(part: Reader) -> Reader:
    """Unicode code points [T, N] padded with zeros -> UTF-8 strings [T], up to the first zero."""

    def read(trajectory):
        codes = part(trajectory)
        lengths = tf.reduce_sum(tf.math.cumprod(tf.cast(codes != 0, tf.int32), axis=-1), axis=-1)
        return tf.strings.unicode_encode(tf.RaggedTensor.from_tensor(codes, lengths=lengths), output_encoding="UTF-8")

    return read


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------


def standard(
    action: Reader | None = None,
    observation: dict[str, Reader] | None = None,
    language: Reader | None = None,
    without: tuple[str, ...] = (),
) -> Transform:
    """A transform that sets the action, observation entries and instruction, and takes out the observations `without`.

    All readers see the raw trajectory; what is not named stays as it is.
    """

    def transform(trajectory: Trajectory) -> Trajectory:
        result = dict(trajectory)
        result["observation"] = {k: v for k, v in _at(trajectory, "observation").items() if k not in without}
        result["observation"].update({key: read(trajectory) for key, read in (observation or {}).items()})
        if action is not None:
            result["action"] = action(trajectory)
        if language is not None:
            result["language_instruction"] = language(trajectory)
        return result

    return transform


def chain(*transforms: Transform) -> Transform:
    """Apply transforms one after the other."""

    def transform(trajectory: Trajectory) -> Trajectory:
        for step in transforms:
            trajectory = step(trajectory)
        return trajectory

    return transform


def _without_first_step(trajectory: Trajectory) -> Trajectory:
    """BridgeData V2 starts with an all-zero action. `traj_metadata` keeps its length, as in the reference."""
    return {
        key: value if key == "traj_metadata" else tf.nest.map_structure(lambda x: x[1:], value)
        for key, value in trajectory.items()
    }


def _relabelled_by_reached_state(trajectory: Trajectory) -> Trajectory:
    """Replace the commanded motion by what the arm did: action[t, :6] = state[t+1, :6] - state[t, :6].

    The last step has no successor and is dropped everywhere. Angle differences are not wrapped to +-pi: pretrained
    weights were trained on them as they are.
    """
    state = obs("state", 0, 6)(trajectory)
    gripper = act(-1)(trajectory)[:-1]
    result = tf.nest.map_structure(lambda x: x[:-1], trajectory)
    result["action"] = tf.concat([state[1:] - state[:-1], gripper], axis=-1)
    return result


def _swapped_exterior_cameras(trajectory: Trajectory) -> Trajectory:
    """Exchange DROID's two exterior cameras for about half of the trajectories, so that a policy sees both.

    The reference throws a coin at each reading. Here a hash of the trajectory's actions decides: the same episode keeps
    the same camera in every epoch and process, and the pipeline stays reproducible and resumable.
    """
    actions = field("action_dict", "cartesian_velocity")(trajectory)
    swap = tf.strings.to_hash_bucket_fast(tf.io.serialize_tensor(actions), 2) == 1
    left, right = "exterior_image_1_left", "exterior_image_2_left"
    first, second = obs(left)(trajectory), obs(right)(trajectory)
    cameras = {left: tf.where(swap, second, first), right: tf.where(swap, first, second)}
    return dict(trajectory, observation=dict(trajectory["observation"], **cameras))


# DROID's 1 % and 99 % quantiles of the six motion dimensions, as the reference has them written down.
_DROID_Q01 = (
    -0.7776297926902771,
    -0.5803514122962952,
    -0.5795090794563293,
    -0.6464047729969025,
    -0.7041108310222626,
    -0.8895104378461838,
)
_DROID_Q99 = (
    0.7597932070493698,
    0.5726242214441299,
    0.7351000607013702,
    0.6705610305070877,
    0.6464948207139969,
    0.8897542208433151,
)


def droid_moves(frame: Trajectory) -> tf.Tensor:
    """DROID's frame filter: False where the arm is commanded to stand still, however the gripper moves.

    frame["action"] [..., 7] is normalised by quantiles; the frame is kept if one of its motion dimensions is further
    than 1e-5 from a normalised zero. That zero comes from constants, so the filter fits the normalisation to
    BOUNDS_Q99 with DROID's own published statistics only, in the reference as here.
    """
    low, high = tf.constant(_DROID_Q01, tf.float32), tf.constant(_DROID_Q99, tf.float32)
    standing_still = 2 * (0 - low) / (high - low + 1e-8) - 1
    return tf.reduce_any(tf.abs(frame["action"][..., :6] - standing_still) > 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The datasets
# ---------------------------------------------------------------------------------------------------------------------

_LANGUAGE = obs("natural_language_instruction")
_ROTATION = act_key("rotation_delta")
_POSE, _LAST_STATE = obs("state", 0, 6), obs("state", -1)


def _pose_and_gripper(pose: Reader = _POSE, gripper: Reader = _LAST_STATE) -> dict[str, Reader]:
    return {"eef_state": pose, "gripper_state": gripper}


def _dict_action(gripper: Reader, rotation: Reader = _ROTATION, **more) -> Transform:
    """For datasets of RT-X with a dict action and the instruction among the observations."""
    return standard(join(act_key("world_vector"), rotation, gripper), language=_LANGUAGE, **more)


def _arm_and(gripper: Reader, **more) -> Transform:
    """Six columns of arm motion as they are, then the gripper."""
    return standard(join(act(0, 6), gripper), **more)


_RELATIVE_GRIPPER = absolute(act_key("gripper_closedness_action", 0, 1))
_OPEN_GRIPPER = column(act_key("open_gripper"))
_FROM_CLOSED = inverted(clipped(act(-1)))  # 1 closed, 0 or -1 open -> 0 closed, 1 open

_BRIDGE_STATE = {"EEF_state": _POSE, "gripper_state": _LAST_STATE}
_bridge_orig = chain(
    _without_first_step, _arm_and(binarized(act(-1)), observation=_BRIDGE_STATE), _relabelled_by_reached_state
)
_tdroid = _arm_and(
    binarized(act(-1)),
    observation={"EEF_state": obs("cartesian_position", 0, 6), "gripper_state": obs("gripper_position", -1)},
)
_rt1 = _dict_action(_RELATIVE_GRIPPER)
_without_last_action = act(None, -1)  # the last column says whether the episode ends
_four_dof = join(act(0, 4), zeros(act(0, 2)), act(-1))
_gnm = standard(
    join(act(), zeros(act()), zeros(act()), zeros(act(0, 1))),  # a driving robot: planar motion, no gripper
    {"state": join(obs("position"), zeros(obs("state", 0, 3)), obs("yaw"))},
)
_droid = standard(
    join(
        field("action_dict", "cartesian_velocity", columns=slice(0, 6)),
        inverted(field("action_dict", "gripper_position")),
    ),
    {"proprio": join(obs("cartesian_position"), obs("gripper_position"))},
)
_libero = _arm_and(_FROM_CLOSED, observation={"EEF_state": _POSE, "gripper_state": obs("state", -2)})

TRANSFORMS: dict[str, Transform] = {
    "bridge_oxe": chain(
        _without_first_step, _dict_action(_OPEN_GRIPPER, observation=_BRIDGE_STATE), _relabelled_by_reached_state
    ),
    "bridge_orig": _bridge_orig,
    "bridge_dataset": _bridge_orig,
    "ppgm": _tdroid,
    "ppgm_static": _tdroid,
    "ppgm_wrist": _tdroid,
    "fractal20220817_data": _rt1,
    "kuka": _dict_action(
        _RELATIVE_GRIPPER,
        observation={
            key: zlib_floats(obs(key), width)
            for key, width in (("clip_function_input/base_pose_tool_reached", 7), ("gripper_closed", 1))
        },
    ),
    # The gripper is clipped and not inverted, although the reference's comment says otherwise; models know it so.
    "taco_play": standard(
        join(act_key("rel_actions_world", 0, 6), clipped(act_key("rel_actions_world", -1))),
        {"state_eef": obs("robot_obs", 0, 6), "state_gripper": obs("robot_obs", 7, 8)},
        _LANGUAGE,
    ),
    "jaco_play": _dict_action(
        _RELATIVE_GRIPPER,
        rotation=zeros(act_key("world_vector")),
        observation={
            "state_eef": obs("end_effector_cartesian_pos", 0, 6),
            "state_gripper": obs("end_effector_cartesian_pos", -1),
        },
    ),
    "berkeley_cable_routing": _dict_action(zeros(act_key("world_vector", 0, 1))),
    "roboturk": _dict_action(inverted(clipped(act_key("gripper_closedness_action")))),
    "nyu_door_opening_surprising_effectiveness": _rt1,
    "viola": _dict_action(inverted(clipped(column(act_key("gripper_closedness_action"))))),
    "berkeley_autolab_ur5": _dict_action(
        absolute(column(act_key("gripper_closedness_action"))),
        observation={"state": obs("robot_state", 6, 14), "depth": obs("image_with_depth")},
        without=("image_with_depth",),
    ),
    "toto": _dict_action(_OPEN_GRIPPER),
    # Pushing in the plane with a fixed tool, counted as an open gripper.
    "language_table": standard(
        join(act(), zeros(act()), zeros(act()), ones(act(0, 1))),
        language=text_from_code_points(obs("instruction")),
    ),
    "columbia_cairlab_pusht_real": _dict_action(column(act_key("gripper_closedness_action"))),  # not inverted either
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": standard(
        join(act(0, 3), zeros(act(0, 3)), act(-1)), {"depth_image": first_channel(obs("depth_image"))}
    ),
    "nyu_rot_dataset_converted_externally_to_rlds": standard(act(0, 7), _pose_and_gripper()),
    "stanford_hydra_dataset_converted_externally_to_rlds": _arm_and(
        inverted(act(-1)),
        observation=_pose_and_gripper(join(obs("state", 0, 3), obs("state", 7, 10)), obs("state", -3, -2)),
    ),
    "austin_buds_dataset_converted_externally_to_rlds": _arm_and(
        _FROM_CLOSED, observation={"state": obs("state", 0, 8)}
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": standard(
        join(act(-8, -2), clipped(act(-2, -1))),
        {
            "depth": floats(first_channel(obs("depth"))),
            "depth_additional_view": floats(first_channel(obs("depth_additional_view"))),
            "eef_state": obs("state", -6),
        },
    ),
    "maniskill_dataset_converted_externally_to_rlds": standard(observation={"gripper_state": obs("state", 7, 8)}),
    "furniture_bench_dataset_converted_externally_to_rlds": standard(
        join(act(0, 3), euler(act(3, 7)), _FROM_CLOSED),
        {"state": join(obs("state", 0, 7), obs("state", -1))},
    ),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": standard(_without_last_action),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": standard(
        _without_last_action, {"joint_state": obs("state", 0, 7)}
    ),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": standard(
        join(act(0, 3), zeros(act(0, 3)), act(-1)), _pose_and_gripper()
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": _arm_and(_FROM_CLOSED),
    "austin_sirius_dataset_converted_externally_to_rlds": _arm_and(_FROM_CLOSED),
    # The first of several future waypoints; its axis-angle rotation stands in for Euler angles.
    "bc_z": standard(
        join(
            act_key("future/xyz_residual", 0, 3),
            act_key("future/axis_angle_residual", 0, 3),
            inverted(act_key("future/target_close", 0, 1)),
        ),
        language=_LANGUAGE,
    ),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": standard(_without_last_action, _pose_and_gripper()),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": standard(
        _without_last_action, _pose_and_gripper()
    ),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": standard(),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": standard(act(-7)),  # the right arm
    "robo_net": standard(_four_dof, _pose_and_gripper(join(obs("state", 0, 4), zeros(obs("state", 0, 2))))),
    "berkeley_mvp_converted_externally_to_rlds": standard(),
    "berkeley_rpt_converted_externally_to_rlds": standard(),
    "kaist_nonprehensile_converted_externally_to_rlds": _arm_and(
        zeros(act(0, 1)), observation={"state": obs("state", -7)}
    ),
    "stanford_mask_vit_converted_externally_to_rlds": standard(
        _four_dof,
        _pose_and_gripper(
            join(obs("end_effector_pose", 0, 4), zeros(obs("end_effector_pose", 0, 2))), obs("end_effector_pose", -1)
        ),
    ),
    "tokyo_u_lsmo_converted_externally_to_rlds": standard(observation=_pose_and_gripper()),
    "dlr_sara_pour_converted_externally_to_rlds": standard(),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": standard(observation={"state": obs("state", 0, 6)}),
    "dlr_edan_shared_control_converted_externally_to_rlds": _arm_and(inverted(act(-1))),
    "asu_table_top_converted_externally_to_rlds": standard(
        observation=_pose_and_gripper(field("ground_truth_states", "EE"))
    ),
    "stanford_robocook_converted_externally_to_rlds": standard(observation=_pose_and_gripper()),
    "imperialcollege_sawyer_wrist_cam": standard(_without_last_action),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": standard(
        join(act(0, 3), euler(act(3, 7)), act(7, 8)),
        {"joint_state": obs("state", 0, 7), "gripper_state": obs("state", 7, 8)},
    ),
    "uiuc_d3field": standard(join(act(), zeros(act()), zeros(act(0, 1)))),
    "utaustin_mutex": _arm_and(_FROM_CLOSED, observation={"state": obs("state", 0, 8)}),
    # No gripper action was recorded: the measured state stands in.
    "berkeley_fanuc_manipulation": standard(
        join(act(), inverted(obs("state", 6, 7))),
        {"joint_state": obs("state", 0, 6), "gripper_state": obs("state", 6, 7)},
    ),
    "cmu_playing_with_food": standard(join(act(0, 3), euler(act(3, 7)), act(-1))),
    "cmu_play_fusion": standard(join(act(0, 3), act(-4))),
    "cmu_stretch": standard(
        _without_last_action, _pose_and_gripper(join(obs("state", 0, 3), zeros(obs("state", 0, 3))))
    ),
    "berkeley_gnm_recon": _gnm,
    "berkeley_gnm_cory_hall": _gnm,
    "berkeley_gnm_sac_son": _gnm,
    "droid": chain(_droid, _swapped_exterior_cameras),
    "fmb_dataset": standard(observation={"proprio": join(obs("eef_pose"), column(obs("state_gripper_pose")))}),
    "dobbe": standard(observation={"proprio": obs("state")}),
    "roboset": standard(join(act(0, 7), _FROM_CLOSED), {"proprio": obs("state")}),
    "rh20t": standard(
        join(act_key("tcp_base"), column(act_key("gripper"))),
        {"proprio": join(obs("tcp_base"), column(obs("gripper_width")))},
    ),
    "tdroid_carrot_in_bowl": _tdroid,
    "tdroid_pour_corn_in_pot": _tdroid,
    "tdroid_flip_pot_upright": _tdroid,
    "tdroid_move_object_onto_plate": _tdroid,
    "tdroid_knock_object_over": _tdroid,
    "tdroid_cover_object_with_towel": _tdroid,
    "droid_wipe": _droid,
    "libero_spatial_no_noops": _libero,
    "libero_object_no_noops": _libero,
    "libero_goal_no_noops": _libero,
    "libero_10_no_noops": _libero,
}
