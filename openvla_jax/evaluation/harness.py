"""A policy, local or behind a server, as an evaluation harness drives one: reset with an instruction, then step.

Simulators differ from the training data in conventions that no checkpoint knows. Those of the reference's evaluations
are here by name; everything else (resize, crop, JPEG, prompt, statistics) is the checkpoint's, done by the policy.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from openvla_jax.config import nearest
from openvla_jax.errors import InputError
from openvla_jax.inference.client import ActionQueue
from openvla_jax.types import ActionSpec, Observation, ObservationSpec

# The last dimension, from 1 = open, 0 = closed to what the environment takes.
GRIPPERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "raw": lambda gripper: gripper,
    "binary": lambda gripper: np.where(gripper > 0.5, 1.0, 0.0),
    "libero": lambda gripper: np.where(gripper > 0.5, -1.0, 1.0),  # -1 open, 1 closed
}


class HarnessPolicy:
    """Drives a policy, an `openvla_jax.Policy` or an `inference.client.Client`, episode by episode.

    The rotation of images, the meaning of the gripper and the number of executed actions come from the policy's specs;
    `rotation` (degrees, counter-clockwise) replaces the first. Raises InputError for an unknown gripper convention, or
    one that cannot be made from the policy's.

        policy = HarnessPolicy(Client(url), unnorm_key="libero_spatial_no_noops", gripper="libero", rotation=180)
        policy.reset(task.language)
        action = policy.step(observation["agentview_image"])
    """

    def __init__(self, policy: Any, unnorm_key: str | None = None, gripper: str = "raw", rotation: int | None = None):
        if gripper not in GRIPPERS:
            raise InputError(f"unknown gripper convention {gripper!r}; {nearest(gripper, GRIPPERS)}")
        observation, self.action = specs(policy)
        if gripper != "raw" and not self.action.gripper:
            raise InputError(f"gripper {gripper!r}: nothing says what the policy's last dimension means; use 'raw'")
        if rotation is not None:
            observation = dataclasses.replace(observation, rotation=rotation)
        self.policy, self.unnorm_key, self.observation = policy, unnorm_key, observation
        self._gripper, self._raw = GRIPPERS[gripper], gripper == "raw"
        self.instruction: str | None = None
        self._queue = ActionQueue(policy, self.action.executed)

    def reset(self, instruction: str) -> None:
        """Begins an episode."""
        self.instruction = instruction
        self._queue.reset()

    def step(self, images: np.ndarray | Mapping[str, np.ndarray], state: np.ndarray | None = None) -> np.ndarray:
        """Returns the next action, float64 [A], in the environment's convention.

        images: uint8 [H, W, 3] by camera name, or that of the first camera alone. state: float [S], if the policy
        takes one. Both are looked at if a chunk of actions has been executed. Raises InputError before `reset`.
        """
        if self.instruction is None:
            raise InputError("step before reset: reset(instruction) begins an episode")
        seen = None
        if self._queue.empty:
            given = images if isinstance(images, Mapping) else {self.observation.cameras[0]: images}
            turned = {name: np.rot90(image, self.observation.rotation // 90) for name, image in given.items()}
            seen = Observation(turned, self.instruction, state, self.unnorm_key)
        action = self._queue.next(seen)
        if not self._raw:
            opening = action[-1] if self.action.gripper == "open" else 1 - action[-1]
            action[-1] = self._gripper(opening)
        return action


def specs(policy: Any) -> tuple[ObservationSpec, ActionSpec]:
    """Returns what a policy, or the server behind a client, is to be shown and answers with."""
    if hasattr(policy, "contract"):
        return policy.contract.observation, policy.contract.action
    info = policy.info()
    return ObservationSpec.from_dict(info["observation"]), ActionSpec.from_dict(info["action"])
