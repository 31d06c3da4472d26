"""The embedded tabletop world as an environment."""

from collections.abc import Callable

import numpy as np

from openvla_jax.sim.tabletop import Tabletop
from openvla_jax.types import Observation, ObservationSpec

IMAGE_SIZE = 48
MAX_STEPS = 12  # the expert needs about 5


def misnamed(world: Tabletop) -> str:
    """Returns the instruction for another object of the scene: what is left of success if words are ignored."""
    return world.scene.instruction((world.scene.target + 1) % len(world.scene.colors))


class TabletopEnvironment:
    """Scenes of one of `sim.tabletop.WORLDS`, seen by one camera. Success is lifting the scene's own target.

    `instruct` gives the sentence that the policy reads. `world` is the scene since the last reset.
    """

    max_steps = MAX_STEPS
    spec = ObservationSpec(("primary",))
    achieved = "lifted"  # what a success is called in figures

    def __init__(self, name: str = "tabletop", instruct: Callable[[Tabletop], str] = lambda world: world.instruction):
        self.name, self.instruct = name, instruct

    def reset(self, seed: int) -> Observation:
        """Begins the scene that `seed` decides. Raises InputError for an unknown world."""
        self.world = Tabletop(seed, self.name)
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[Observation, bool, bool]:
        """Executes one action, float [7]; a scene ends with its success. Raises InputError for another shape."""
        success = self.world.step(action)
        return self._observe(), success, success

    def _observe(self) -> Observation:
        return Observation({"primary": self.world.render(IMAGE_SIZE)}, self.instruct(self.world))
