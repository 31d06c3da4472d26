"""The embedded tabletop world as an environment."""

from collections.abc import Callable

import numpy as np

from openvla_jax.sim.tabletop import WORLDS, Tabletop, find_world
from openvla_jax.types import Observation, ObservationSpec

IMAGE_SIZE = 48
MAX_STEPS = WORLDS["tabletop"].patience
WRIST_STATE = ("x", "y", "z")  # that the gripper is closed, only the camera on the wrist shows


def misnamed(world: Tabletop) -> str:
    """Returns the instruction for another object of the scene: what is left of success if words are ignored."""
    return world.scene.instruction((world.scene.target + 1) % len(world.scene.colors))


class TabletopEnvironment:
    """Scenes of one of `sim.tabletop.WORLDS`. Success is lifting the scene's own target.

    They are seen by one camera; in the world "wrist" by two, with the gripper's position as the state. `instruct` gives
    the sentence that the policy reads. `world` is the scene since the last reset.
    """

    achieved = "lifted"  # what a success is called in figures

    def __init__(self, name: str = "tabletop", instruct: Callable[[Tabletop], str] = lambda world: world.instruction):
        """Raises InputError for an unknown world."""
        self.name, self.instruct, kind = name, instruct, find_world(name)
        self.max_steps = kind.patience
        self.spec = ObservationSpec() if kind.shows_arm else ObservationSpec(("primary", "wrist"), state=WRIST_STATE)

    def reset(self, seed: int) -> Observation:
        """Begins the scene that `seed` decides."""
        self.world = Tabletop(seed, self.name)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool, bool]:
        """Executes one action, float [7]; a scene ends with its success. Raises InputError for another shape."""
        success = self.world.step(action)
        return self._observe(), success, success

    def _observe(self) -> Observation:
        images = {"primary": self.world.render(IMAGE_SIZE)}
        if not self.spec.state:
            return Observation(images, self.instruct(self.world))
        images["wrist"] = self.world.render_wrist(IMAGE_SIZE)
        return Observation(images, self.instruct(self.world), self.world.state[: len(WRIST_STATE)])
