"""LIBERO's tasks as environments: a simulator's process, seen through the reference's conventions."""

from collections.abc import Iterator, Mapping

import numpy as np

from openvla_jax.errors import InputError
from openvla_jax.sim.libero.conventions import (
    CAMERAS,
    IMAGE_SIZE,
    MAX_STEPS,
    STATE,
    base_suite,
    to_simulator,
)
from openvla_jax.sim.libero.process import Simulator
from openvla_jax.types import Observation, ObservationSpec

SPEC = ObservationSpec(("primary", "wrist"), state=STATE)  # everything that OpenVLA-OFT sees
PAD = "pad"  # OpenVLA's column of zeros between rotation and gripper


class LiberoEnvironment:
    """One task of a suite of LIBERO or LIBERO-PRO. A seed is the index of an initial state.

    Actions are a policy's: 7 numbers, the last one the gripper from 0 to 1, as `gripper` says. Images are rendered
    when they are looked at, and only until the next step. Success ends an episode.

    The simulator may be shared by environments that take turns. If it fails, SimulatorError is raised; `reset` then
    begins again, in a new process.
    """

    achieved = "solved"  # what a success is called in figures

    def __init__(
        self,
        simulator: Simulator,
        suite: str,
        task: int,
        instruction: str,
        spec: ObservationSpec = SPEC,
        *,
        gripper: str = "open",
        blank: bool = False,
        unnorm_key: str | None = None,
        hard_reset: bool = True,
    ):
        """Starts nothing yet.

        Args:
            simulator: The process; `task` is loaded into it if another one is there.
            suite: The suite's name.
            task: Its index there.
            instruction: What the policy is asked for.
            spec: Cameras and columns of the state that observations have.
            gripper: "open" if 1 opens, "closed" if 1 closes.
            blank: Whether frames are black, and not rendered.
            unnorm_key: Of observations.
            hard_reset: Whether each episode builds the simulation anew, as the reference does.

        Raises:
            InputError: for a suite, a camera or a column of the state that LIBERO does not have.
        """
        check_spec(spec)
        self.simulator, self.suite, self.task, self.instruction, self.spec = simulator, suite, task, instruction, spec
        self.gripper, self.blank, self.unnorm_key, self.hard_reset = gripper, blank, unnorm_key, hard_reset
        self.max_steps = MAX_STEPS[base_suite(suite)]
        self.moment = 0  # counts resets and steps: a frame belongs to one of them
        columns = [*STATE, PAD]
        self._columns = [columns.index(name) for name in spec.state]

    def reset(self, seed: int) -> Observation:
        """Begins the episode of initial state `seed`, settled; returns its first observation.

        Raises InputError for a task or a state that the suite does not have.
        """
        self.moment += 1
        self.simulator.ask("load", suite=self.suite, task=self.task, hard_reset=self.hard_reset)
        return self._observe(self.simulator.ask("reset", state=int(seed))["state"])

    def step(self, action: np.ndarray) -> tuple[Observation, bool, bool]:
        """Executes one action, float [7]; returns (observation, done, success).

        Raises InputError for an action of another shape, or one that is not finite.
        """
        self.moment += 1
        answer = self.simulator.ask("step", action=to_simulator(action, self.gripper))
        return self._observe(answer["state"]), answer["success"], answer["success"]

    def frame(self, camera: str) -> np.ndarray:
        """Returns what a camera sees now, uint8 [256, 256, 3], also if the policy's images are blank."""
        return self.simulator.ask("render", cameras=[camera])[camera]

    def _observe(self, state: np.ndarray) -> Observation:
        values = np.append(state, 0.0)[self._columns] if self.spec.state else None
        return Observation(_Frames(self), self.instruction, values, self.unnorm_key)


class _Frames(Mapping[str, np.ndarray]):
    """The images of one moment, rendered at the first look."""

    def __init__(self, environment: LiberoEnvironment):
        self._environment, self._moment = environment, environment.moment
        self._rendered: dict[str, np.ndarray] = {}

    def __getitem__(self, camera: str) -> np.ndarray:
        environment = self._environment
        if camera not in environment.spec.cameras:
            raise KeyError(camera)
        if camera not in self._rendered:
            if environment.moment != self._moment:
                raise RuntimeError(f"the image of {camera!r} is of an earlier step: look at it before the next one")
            black = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            self._rendered[camera] = black if environment.blank else environment.frame(camera)
        return self._rendered[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(self._environment.spec.cameras)

    def __len__(self) -> int:
        return len(self._environment.spec.cameras)


def check_spec(spec: ObservationSpec) -> None:
    """Raises InputError if LIBERO cannot show what a policy is to be shown, naming what is missing."""
    for camera in spec.cameras:
        if camera not in CAMERAS:
            raise InputError(f"the policy sees camera {camera!r}: LIBERO has {', '.join(CAMERAS)}; evaluate another")
    for column in spec.state:
        if column not in (*STATE, PAD):
            names = ", ".join(STATE)
            raise InputError(f"the policy's state has column {column!r}: LIBERO has {names}; evaluate another")
    if spec.rotation not in (0, 180):
        raise InputError(
            f"the policy wants frames turned by {spec.rotation} degrees: LIBERO's come as in its training data; "
            "correct observation.rotation of the checkpoint"
        )
