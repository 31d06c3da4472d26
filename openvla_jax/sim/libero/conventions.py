"""What the reference fixes about LIBERO: suites and step limits, settling, images, state and gripper.

The lines that these come from are in OpenVLA's `experiments/robot/libero` (`run_libero_eval.py`, `libero_utils.py`).
NumPy only: the simulator's process imports this too.
"""

import math

import numpy as np

from openvla_jax.errors import InputError

# Actions of the policy after which an episode has failed: the longest human demonstration, and a little.
MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
SETTLING_STEPS = 10  # before the policy acts: objects are set down a little above the table
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
SEED = 0  # of every environment; it decides where furniture stands
IMAGE_SIZE = 256  # pixels of a rendered frame
ACTION_DIM = 7
CONTROL_RATE = 20.0  # actions per second

# The names of this project's cameras -> the simulator's.
CAMERAS = {"primary": "agentview", "wrist": "robot0_eye_in_hand"}
# The columns of the state, as OpenVLA-OFT has them; "pad", between rz and the gripper in OpenVLA's layout, is 0.
STATE = ("x", "y", "z", "rx", "ry", "rz", "gripper_left", "gripper_right")


def base_suite(suite: str) -> str:
    """Returns the suite of the reference that `suite` is or perturbs: libero_goal of libero_goal_swap (LIBERO-PRO).

    Raises InputError for a suite of another name.
    """
    for name in MAX_STEPS:
        if suite == name or suite.startswith(f"{name}_"):
            return name
    raise InputError(f"suite {suite!r}: one of {', '.join(MAX_STEPS)}, or one of LIBERO-PRO as libero_object_swap")


def upright(frame: np.ndarray) -> np.ndarray:
    """Returns a rendered frame, uint8 [H, W, 3], as the reference trains and evaluates on it.

    OpenGL gives the bottom row first. The reference turns that by 180 degrees: the image is upright and mirrored.
    """
    return np.ascontiguousarray(frame[::-1, ::-1])


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Returns axis times angle, float64 [3], of a quaternion (x, y, z, w); the angle is from 0 to 2 pi.

    The quaternion's sign is kept, as the reference does. The hand points down at an angle near pi: with a normalised
    sign the axis would flip there.
    """
    w = min(max(float(quaternion[3]), -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3], np.float64) * 2.0 * math.acos(w) / sine


def to_simulator(action: np.ndarray, gripper: str) -> np.ndarray:
    """Returns a policy's action, float [7], as the simulator takes it: the gripper is -1 open, +1 closed.

    gripper: "open" if 1 opens in the policy's action, "closed" if 1 closes (`ActionSpec.gripper`). As in the
    reference the command is made binary at 0.5. Raises InputError for another shape, or an action that is not finite.
    """
    action = np.array(action, np.float64)
    if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
        raise InputError(f"action {action.tolist()}: give {ACTION_DIM} finite numbers")
    closing = np.sign(2.0 * action[-1] - 1.0)
    action[-1] = -closing if gripper == "open" else closing
    return action


def numbers(text: str) -> list[int]:
    """Returns the numbers of a list such as "0-9,12". Raises InputError for another form."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise InputError(f"{text!r}: give numbers and ranges, as 0-9,12")
        if int(last or first) >= 10_000:
            raise InputError(f"{text!r}: numbers are below 10000")
        found += range(int(first), int(last or first) + 1)
    return sorted(set(found))
