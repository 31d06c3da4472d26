"""A policy, local or behind a server, as an evaluation harness drives one: reset with an instruction, then step.

Simulators differ from the training data in conventions that no checkpoint knows. Those of the reference's evaluations
are here by name; everything else (resize, crop, JPEG, prompt, statistics) is the checkpoint's, done by the policy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from openvla_jax.config import nearest

# The last dimension, from 1 = open, 0 = closed to what the environment takes.
GRIPPERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw": lambda gripper: gripper,
    "binary": lambda gripper: np.where(gripper > 0.5, 1.0, 0.0),
    "libero": lambda gripper: np.where(gripper > 0.5, -1.0, 1.0),  # -1 open, 1 closed
}


class HarnessPolicy:
    """`policy` is an `openvla_jax.Policy` or an `inference.client.Client`. `rotate` turns images by 180 degrees, as
    LIBERO's cameras need.

        policy = HarnessPolicy(Client(url), unnorm_key="libero_spatial_no_noops", gripper="libero", rotate=True)
        policy.reset(task.language)
        action = policy.step(observation["agentview_image"])
    """

    def __init__(self, policy: Any, unnorm_key: str | None = None, gripper: str = "raw", rotate: bool = False):
        if gripper not in GRIPPERS:
            raise ValueError(f"unknown gripper convention {gripper!r}; {nearest(gripper, GRIPPERS)}")
        self.policy, self.unnorm_key, self.rotate = policy, unnorm_key, rotate
        self._gripper = GRIPPERS[gripper]
        self.instruction: str | None = None

    def reset(self, instruction: str) -> None:
        """Begins an episode."""
        self.instruction = instruction

    def step(self, image: np.ndarray) -> np.ndarray:
        """The action for a camera image uint8 [H, W, 3], float64 [A] in the environment's convention."""
        if self.instruction is None:
            raise ValueError("step before reset: reset(instruction) begins an episode")
        image = np.ascontiguousarray(image[::-1, ::-1]) if self.rotate else image
        action = np.array(self.policy.predict_action(image, self.instruction, self.unnorm_key))
        action[-1] = self._gripper(action[-1])
        return action
