"""A scripted expert for LIBERO's tasks of putting one object on or into another, driven by the simulator's state.

It reads the pose of the object and of its goal, plans one grasp from above (where to close the fingers and how far to
turn the wrist), and steers LIBERO's operational-space controller through waypoints: above, down, close, up, above the
goal, down, open. It knows no task by name; object and goal come from the task's BDDL file.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from openvla_jax.errors import InputError

# Of the controller: an action of 1 asks for this much.
METRES, RADIANS = 0.05, 0.5
# Of the hand, in metres.
OPENING = 0.078  # between the open fingers
FINGER_TIP = 0.012  # the tips reach this far below the grip site
FINGER_THICK, FINGER_BROAD = 0.012, 0.012  # half sizes of a finger: along its motion, across it
TURNS = np.radians(np.arange(-75, 90, 15))  # of the wrist, that are tried
# Of MuJoCo: types of geometry.
SPHERE, CAPSULE, CYLINDER, MESH = 2, 3, 5, 7
# Disturbances: how often noise is added, how often a push begins, and for how many steps it lasts.
NOISE_SHARE, PUSH_SHARE, PUSH_STEPS = 0.5, 0.03, 5


# ---------------------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------------------


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Returns axis times angle, float64 [3], of a rotation matrix [3, 3] that turns by less than half a turn."""
    cosine = np.clip((np.trace(matrix) - 1) / 2, -1.0, 1.0)
    axis = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    length = np.linalg.norm(axis)
    return axis * (np.arccos(cosine) / length) if length > 1e-9 else np.zeros(3)


def about_z(angle: float) -> np.ndarray:
    """Returns the rotation matrix [3, 3] of a turn about the vertical, in radians."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1.0]])


def corners(sim: Any, body: str) -> np.ndarray:
    """Returns points [N, 3] in the world that span the collision geometry of a body and of what hangs on it."""
    model, data = sim.model, sim.data
    root = model.body_name2id(body)
    points = []
    for geom in range(model.ngeom):
        link = model.geom_bodyid[geom]
        while link not in (0, root):
            link = model.body_parentid[link]
        if link == root and model.geom_contype[geom]:
            points.append(_spanned(model, geom) @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(points)


def _spanned(model: Any, geom: int) -> np.ndarray:
    """Points [N, 3] that span one geometry, in its own frame."""
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == MESH:
        first, count = model.mesh_vertadr[model.geom_dataid[geom]], model.mesh_vertnum[model.geom_dataid[geom]]
        return model.mesh_vert[first : first + count]
    half = {
        SPHERE: [size[0]] * 3,
        CAPSULE: [size[0], size[0], size[0] + size[1]],
        CYLINDER: [size[0], size[0], size[1]],
    }
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    return signs * np.array(half.get(kind, size))


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grasp:
    """Where the grip site closes [3], how far the wrist turns from its rest, and the room to other things."""

    point: np.ndarray
    turn: float
    room: float


def plan_grasp(points: np.ndarray, others: list[np.ndarray], hollow: bool) -> Grasp:
    """Returns the grasp from above with most room; little turns are preferred.

    points: of the object. others: of what must not be touched. hollow: a bowl, taken at its rim; anything else is
    taken around its middle. Raises InputError if no side of the object fits between the fingers.
    """
    low, high = points.min(0), points.max(0)
    middle = (low + high) / 2
    best: tuple[float, Grasp] | None = None
    for turn in TURNS:
        along, across = np.array([-np.sin(turn), np.cos(turn)]), np.array([np.cos(turn), np.sin(turn)])
        reach = (points[:, :2] - middle[:2]) @ along
        if hollow:
            places = [middle[:2] + sign * along * (np.abs(reach).max() - 0.007) for sign in (-1, 1)]
            height = high[2] - 0.022
        elif np.ptp(reach) > OPENING - 0.008:
            continue
        else:
            places = [middle[:2] + along * (reach.max() + reach.min()) / 2]
            height = max(high[2] - 0.035, middle[2] - 0.005, low[2] + FINGER_TIP + 0.004)
        for place in places:
            room = _room(place, height, along, across, others)
            score = min(room, 0.03) - 0.004 * abs(turn)
            if best is None or score > best[0]:
                best = (score, Grasp(np.array([*place, height]), float(turn), room))
    if best is None:
        raise InputError(f"no side of the object is narrower than {OPENING} m: the expert cannot take it")
    return best[1]


def _room(place: np.ndarray, height: float, along: np.ndarray, across: np.ndarray, others: list[np.ndarray]) -> float:
    """Metres from the open fingers to the nearest other thing, at most 0.2."""
    room = 0.2
    for other in others:
        near = other[other[:, 2] > height - FINGER_TIP - 0.01]
        if len(near):
            offset = near[:, :2] - place
            beside = np.maximum(np.abs(offset @ along) - OPENING / 2 - FINGER_THICK, 0)
            before = np.maximum(np.abs(offset @ across) - FINGER_BROAD, 0)
            room = min(room, float(np.hypot(beside, before).min()))
    return room


@dataclass(frozen=True)
class Waypoint:
    """A pose of the grip site to reach within `within` metres, or to hold for `hold` steps."""

    position: np.ndarray
    turn: float
    closed: bool
    within: float = 0.008
    hold: int = 0
    patience: int = 40  # steps after which the next waypoint is due in any case
    speed: float = 1.0  # the largest component of a translation


class Expert:
    """Acts on one episode of a `ControlEnv` that has settled."""

    def __init__(self, env: Any):
        """Raises InputError if the task is not one object to put on or into something."""
        goal = env.env.parsed_problem["goal_state"]
        if len(goal) != 1 or goal[0][0] not in ("on", "in"):
            raise InputError(f"the expert knows only one object to put on or into something, not {goal}")
        _, self.thing, self.place = goal[0]
        self.env, self.sim = env.env, env.sim
        self.rest = self._hand()[1]
        self.plan = self._plan()
        self.steps_of_waypoint = 0

    @property
    def holds(self) -> bool:
        """Whether the fingers are closing or opening now."""
        return bool(self.plan and self.plan[0].hold)

    def act(self) -> np.ndarray | None:
        """Returns the next action, float64 [7], in the simulator's convention; None at the end of the plan."""
        if not self.plan:
            return None
        aim = self.plan[0]
        position, rotation = self._hand()
        error = aim.position - position
        turned = rotation_vector(about_z(aim.turn) @ self.rest @ rotation.T)
        action = np.zeros(7)
        action[:3] = error / METRES * 2.0
        longest = np.abs(action[:3]).max()
        if longest > aim.speed:
            action[:3] *= aim.speed / longest
        action[3:6] = np.clip(turned / RADIANS * 1.5, -0.5, 0.5)
        action[6] = 1.0 if aim.closed else -1.0
        self.steps_of_waypoint += 1
        arrived = np.linalg.norm(error) < aim.within and np.linalg.norm(turned) < 0.1
        late = self.steps_of_waypoint >= (aim.hold or aim.patience)
        if late or (arrived and not aim.hold):
            self.plan.pop(0)
            self.steps_of_waypoint = 0
        return action

    def _hand(self) -> tuple[np.ndarray, np.ndarray]:
        site = self.sim.model.site_name2id("gripper0_grip_site")
        return self.sim.data.site_xpos[site].copy(), self.sim.data.site_xmat[site].reshape(3, 3).copy()

    def _points(self, name: str) -> np.ndarray:
        return corners(self.sim, self.env.get_object(name).root_body)

    def _plan(self) -> list[Waypoint]:
        sites, ground = self.env.object_sites_dict, ("main_table", "floor")
        support = sites[self.place].parent_name if self.place in sites else self.place
        points, target = self._points(self.thing), self._points(support)
        others = [self._points(name) for name in self.env.objects_dict if name not in (self.thing, support)]
        others += [
            self._points(name)
            for name in self.env.fixtures_dict
            if name not in ground and self.env.get_object(name) is not None
        ]
        grasp = plan_grasp(points, [*others, target], hollow="bowl" in self.thing)
        low, high = points.min(0), points.max(0)
        offset = grasp.point - np.array([*(low + high)[:2] / 2, low[2]])  # from the object's foot to the fingers
        middle = (target.min(0) + target.max(0)) / 2
        onto = self.place == support and self.env.get_object(support) is not None
        drop = target[:, 2].min() + 0.016 if onto else target[:, 2].max() + 0.015
        travel = max(grasp.point[2] + 0.12, drop + offset[2] + 0.06)
        above = np.array([*grasp.point[:2], travel])
        over = np.array([*(middle + offset)[:2], travel])
        down = np.array([*over[:2], drop + offset[2]])
        return [
            Waypoint(above, grasp.turn, False, within=0.02),
            Waypoint(above - [0, 0, 0.06], grasp.turn, False),
            Waypoint(grasp.point, grasp.turn, False, within=0.005, speed=0.6),
            Waypoint(grasp.point, grasp.turn, True, hold=12),
            Waypoint(above, grasp.turn, True, within=0.03),
            Waypoint(over, grasp.turn, True, within=0.015),
            Waypoint(down, grasp.turn, True, speed=0.6),
            Waypoint(down, grasp.turn, False, hold=8),
            Waypoint(over, grasp.turn, False, within=0.02),
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Episodes
# ---------------------------------------------------------------------------------------------------------------------


def demonstrate(simulator: Any, noise: float, seed: int, max_steps: int) -> dict[str, Any]:
    """Has the expert act in the episode that `simulator` has begun; returns what it saw and did.

    What is stored is what the expert would do. What is executed is, now and then, that plus noise, or a push of
    several steps, so that the episode also visits states beside the expert's path and shows the way back (Laskey et
    al. 2017, DART). Steps that would change nothing are left out, as in the reference's data.

    Args:
        simulator: A `LiberoSimulator` after `reset`.
        noise: Standard deviation of what is added to an action's six motions; 0 executes what is stored.
        seed: Of the noise.
        max_steps: Steps after which the episode has failed.

    Returns:
        success; and per step `primary` and `wrist` uint8 [T, 256, 256, 3], `state` float32 [T, 8], `joint_state`
        float32 [T, 7], `action` float32 [T, 7] with the gripper as the simulator takes it.
    """
    expert, rng = Expert(simulator.env), np.random.default_rng(seed)
    steps: list[dict[str, np.ndarray]] = []
    disturb = Disturbance(noise, rng)
    success = False
    while len(steps) < max_steps and not success:
        holds = expert.holds
        action = expert.act()
        if action is None:
            break
        if is_no_op(action, steps[-1]["action"] if steps else None):
            continue
        seen = {name: simulator.frame(name) for name in ("primary", "wrist")}
        joints = simulator.observation["robot0_joint_pos"].astype(np.float32)
        state = simulator.state().astype(np.float32)
        steps.append({**seen, "state": state, "joint_state": joints, "action": action.astype(np.float32)})
        executed = steps[-1]["action"].astype(np.float64)
        success = simulator.step(executed if holds else disturb(executed))["success"]
    arrays = {name: np.stack([step[name] for step in steps]) for name in steps[0]} if steps else {}
    return {"success": success, **arrays}


def is_no_op(action: np.ndarray, previous: np.ndarray | None) -> bool:
    """Returns whether an action neither moves nor changes the gripper: the reference's rule."""
    still = np.linalg.norm(action[:-1]) < 1e-4
    return bool(still and (previous is None or action[-1] == previous[-1]))


class Disturbance:
    """Adds noise to some actions, and now and then a push that lasts for several."""

    def __init__(self, noise: float, rng: np.random.Generator):
        self.noise, self.rng = noise, rng
        self.push, self.left = np.zeros(3), 0

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Returns what is executed instead of `action`, float64 [7]."""
        if not self.noise:
            return action
        action = action.copy()
        if self.rng.random() < NOISE_SHARE:
            action[:6] += self.rng.normal(0.0, self.noise, 6) * (1, 1, 1, 0.3, 0.3, 0.3)
        if not self.left and self.rng.random() < PUSH_SHARE:
            self.push, self.left = self.rng.uniform(-1.0, 1.0, 3), PUSH_STEPS
        if self.left:
            action[:3] += self.push
            self.left -= 1
        action[:6] = np.clip(action[:6], -1.0, 1.0)
        return action
