"""What the columns of each dataset's state ("proprio") are called, in the order in which OpenVLA concatenates them.

OpenVLA fills columns that a dataset lacks with zeros, called "pad" here: LIBERO's state has 9 columns, Bridge's 8.
OpenVLA-OFT leaves the pads out: 8 and 7 columns. A policy is given columns by name (`ObservationSpec.state`), so both
layouts come from one table: take all names, or those of `without_pads`.
"""

from collections.abc import Sequence
from enum import IntEnum


class StateEncoding(IntEnum):
    """What the concatenated state of a dataset holds, as the reference declares it."""

    NONE = -1  # no state published
    POS_EULER = 1  # xyz (3), roll pitch yaw (3), pad (1), gripper (1)
    POS_QUAT = 2  # xyz (3), quaternion (4), gripper (1)
    JOINT = 3  # joint angles (7, padded), gripper (1)
    JOINT_BIMANUAL = 4  # joint angles and gripper (6 + 1) of two arms


_POSITION, _EULER, _AXIS_ANGLE = ("x", "y", "z"), ("roll", "pitch", "yaw"), ("rx", "ry", "rz")
_QUATERNION = ("qx", "qy", "qz", "qw")
_SIX_JOINTS = tuple(f"joint_{i}" for i in range(1, 7))
_UNPADDED_EULER = (*_POSITION, *_EULER, "gripper")

_BY_ENCODING: dict[StateEncoding, tuple[str, ...]] = {
    StateEncoding.NONE: (),
    StateEncoding.POS_EULER: (*_POSITION, *_EULER, "pad", "gripper"),
    StateEncoding.POS_QUAT: (*_POSITION, *_QUATERNION, "gripper"),
    StateEncoding.JOINT: (*_SIX_JOINTS, "joint_7", "gripper"),
    StateEncoding.JOINT_BIMANUAL: tuple(
        f"{side}_{name}" for side in ("left", "right") for name in (*_SIX_JOINTS, "gripper")
    ),
}
_LIBERO = (*_POSITION, *_AXIS_ANGLE, "pad", "gripper_left", "gripper_right")
# The state of these is not what the reference's encoding says.
_BY_DATASET: dict[str, tuple[str, ...]] = {
    "bc_z": (*_POSITION, *_AXIS_ANGLE, "pad", "gripper"),
    "berkeley_fanuc_manipulation": (*_SIX_JOINTS, "pad", "gripper"),
    "dobbe": _UNPADDED_EULER,
    "droid": _UNPADDED_EULER,
    "droid_wipe": _UNPADDED_EULER,
    "fmb_dataset": (*_POSITION, *_QUATERNION, "gripper"),
    "rh20t": _UNPADDED_EULER,
    **{f"libero_{suite}_no_noops": _LIBERO for suite in ("spatial", "object", "goal", "10")},
}


def state_names(dataset: str, encoding: StateEncoding) -> tuple[str, ...]:
    """Returns the names of a dataset's state columns, pads included; () if it publishes no state."""
    return _BY_DATASET.get(dataset, _BY_ENCODING[encoding])


def without_pads(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names without pads: the layout of OpenVLA-OFT."""
    return tuple(name for name in names if name != "pad")
