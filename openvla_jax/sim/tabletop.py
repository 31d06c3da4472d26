"""A small rendered tabletop: coloured objects, an instruction that names one of them, a gripper that can lift it.

World frame in metres: x to the right, y away from the camera, z up from the table. The camera is orthographic and
looks down at 45 degrees, so height and depth both move things up in the image; the gripper's shadow tells them apart.
Nothing that matters is hidden: gripper position, opening and grasp can all be read from one frame, so a policy without
memory can solve the task. Each colour has its own lane across the table, so the colour word alone tells the lane; how
far along it the object lies, and where the gripper is, only the image tells.

In the world "wrist" the fixed camera does not show the arm: the state tells where the gripper is, and a second camera,
on the wrist, whether it is open and what it holds. The arm is slower there, and an episode longer.
"""

from dataclasses import dataclass

import numpy as np

from openvla_jax.errors import InputError

COLORS = {
    "red": (214, 39, 40),
    "green": (36, 150, 60),
    "blue": (30, 80, 220),
}
SHAPES = ("cube", "ball")
OBJECTS_PER_SCENE = 3

REACH = 0.18  # the gripper moves within |x|, |y| <= REACH
CEILING = 0.16  # and 0 <= z <= CEILING
LANE_SPACING, LANE_JITTER = 0.13, 0.015  # objects lie within the jitter of their lane's x
OBJECT_Y = (-0.09, 0.17)  # and anywhere between these along it
HOME, HOME_SPREAD = np.array([0.0, -0.15, 0.12]), 0.01  # the gripper starts in front, give or take the spread per axis
OBJECT_HALF = 0.04  # half the edge of a cube, radius of a ball
GRASP_RADIUS = 0.04  # closing takes the object whose centre is nearer than this, in x and y,
GRASP_HEIGHT = 0.03  # when the finger tips are lower than this
LIFT_HEIGHT = 0.10  # the episode succeeds when the named object is held at this height
HOVER = 0.10  # the expert's height on the way
KEY_STEP = 0.03  # its translations are multiples of this
MAX_STEP = 0.30  # the largest translation of one action along each axis

STATE_DIM = 8  # xyz, roll pitch yaw, pad, gripper: the POS_EULER layout of Open X-Embodiment
ACTION_DIM = 7


@dataclass(frozen=True)
class World:
    """What differs between worlds; lengths in metres."""

    one_opens: bool = True  # gripper command 1 opens
    max_step: float = MAX_STEP  # the largest translation of one action along each axis
    shows_arm: bool = True  # in the fixed camera; else there is a camera on the wrist
    patience: int = 12  # actions that an evaluation gives a policy; the expert needs less than half as many


# The demo is trained in the first; fine-tuning moves its policy to the second, the same table under a robot whose
# gripper command is reversed. The third is for chunks of actions.
WORLDS = {
    "tabletop": World(),
    "changed": World(one_opens=False),
    "wrist": World(max_step=KEY_STEP, shows_arm=False, patience=40),
}


def find_world(name: str) -> World:
    """Returns a world of `WORLDS`. Raises InputError for an unknown name."""
    if name not in WORLDS:
        raise InputError(f"unknown world {name!r}: one of {', '.join(WORLDS)}")
    return WORLDS[name]


@dataclass(frozen=True)
class Scene:
    """What a seed fixes: the objects (one colour each), where they lie, which one is named, where the gripper
    starts.
    """

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    positions: np.ndarray  # [objects, 2] metres
    target: int
    gripper: np.ndarray  # [3] metres

    def instruction(self, index: int | None = None) -> str:
        """The sentence that asks for object `index` (the target by default)."""
        index = self.target if index is None else index
        return f"pick up the {self.colors[index]} {self.shapes[index]}"


def sample_scene(seed: int) -> Scene:
    """A scene, the same for the same seed (any non-negative integer) on every machine."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(OBJECTS_PER_SCENE)
    colors = tuple(list(COLORS)[i] for i in order)
    x = LANE_SPACING * (order - 1.0) + rng.uniform(-LANE_JITTER, LANE_JITTER, OBJECTS_PER_SCENE)
    positions = np.stack([x, rng.uniform(*OBJECT_Y, OBJECTS_PER_SCENE)], axis=1)
    shapes = tuple(str(s) for s in rng.choice(SHAPES, OBJECTS_PER_SCENE))
    gripper = HOME + rng.uniform(-HOME_SPREAD, HOME_SPREAD, 3)
    return Scene(colors, shapes, positions, int(rng.integers(OBJECTS_PER_SCENE)), gripper)


class Tabletop:
    """One episode of a world of `WORLDS`. `step` takes 7-D end-effector deltas: dx dy dz [m], droll dpitch dyaw,
    gripper (1 = open; in some worlds 1 = closed).

    Translations are clipped to `World.max_step` and to the workspace. The gripper stays upright, so rotations have no
    effect (the expert's are zero). The gripper command is binary at 0.5 and acts after the translation.
    """

    def __init__(self, seed: int, world: str = "tabletop"):
        self.kind = find_world(world)
        self.scene = sample_scene(seed)
        self.gripper = self.scene.gripper.copy()
        self.objects = np.concatenate([self.scene.positions, np.zeros((OBJECTS_PER_SCENE, 1))], axis=1)  # base centres
        self.open = True
        self.held: int | None = None

    @property
    def instruction(self) -> str:
        return self.scene.instruction()

    @property
    def success(self) -> bool:
        return self.held == self.scene.target and bool(self.objects[self.held, 2] >= LIFT_HEIGHT)

    @property
    def state(self) -> np.ndarray:
        """float32 [8]: x y z, roll pitch yaw (zeros), a pad (zero), gripper opening (1 = open)."""
        return np.array([*self.gripper, 0.0, 0.0, 0.0, 0.0, float(self.open)], np.float32)

    def step(self, action: np.ndarray) -> bool:
        """Applies one action [7]; returns whether the named object is now lifted. InputError if it is not 7 finite
        numbers.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_DIM,) or not np.isfinite(action).all():
            raise InputError(f"action {action!r} given to Tabletop.step: expected {ACTION_DIM} finite numbers")
        moved = self.gripper + np.clip(action[:3], -self.kind.max_step, self.kind.max_step)
        self.gripper = np.clip(moved, (-REACH, -REACH, 0.0), (REACH, REACH, CEILING))
        was_open, self.open = self.open, bool(action[6] > 0.5) == self.kind.one_opens
        if self.open:
            self._release()
        elif was_open:
            self._grasp()
        if self.held is not None:
            self.objects[self.held] = self.gripper
        return self.success

    def _grasp(self):
        distance = np.linalg.norm(self.objects[:, :2] - self.gripper[:2], axis=-1)
        nearest = int(distance.argmin())
        if distance[nearest] <= GRASP_RADIUS and self.gripper[2] <= GRASP_HEIGHT:
            self.held = nearest

    def _release(self):
        if self.held is not None:
            self.objects[self.held, 2] = 0.0  # it drops straight down
            self.held = None

    def render(self, size: int = 48) -> np.ndarray:
        """uint8 [size, size, 3]: the scene from the fixed camera."""
        return render(self, size)

    def render_wrist(self, size: int = 48) -> np.ndarray:
        """uint8 [size, size, 3]: what lies below the gripper, from the camera on the wrist."""
        return render_wrist(self, size)


# --- Expert ---------------------------------------------------------------------------------------------------------


def expert_action(world: Tabletop) -> np.ndarray:
    """float32 [7]: the next action towards lifting the named object, a function of the visible state alone.

    Like a teleoperator with keys, it moves in multiples of KEY_STEP, as far as one action may. It travels to the object
    at hover height, comes down, closes when centred and down, then lifts. Closed on nothing, or on another object, it
    opens and rises. Every state has an answer, so perturbed states show a learner how to recover.
    """
    opening, closing = float(world.kind.one_opens), float(not world.kind.one_opens)
    limit = world.kind.max_step
    if world.held == world.scene.target:
        return np.array([0, 0, min(HOVER + KEY_STEP, limit), 0, 0, 0, closing], np.float32)
    if not world.open:
        return np.array([0, 0, min(HOVER + KEY_STEP, limit), 0, 0, 0, opening], np.float32)
    distance = world.objects[world.scene.target, :2] - world.gripper[:2]
    dx, dy = _keys(distance, limit)
    near = np.abs(_keys(distance, np.inf)).max() < 1.5 * KEY_STEP
    dz = _keys((0.0 if near else HOVER) - world.gripper[2], limit)
    done = dx == dy == dz == 0
    return np.array([dx, dy, dz, 0, 0, 0, closing if done else opening], np.float32)


def _keys(distance, limit):
    return np.clip(np.round(distance / KEY_STEP) * KEY_STEP, -limit, limit) + 0.0  # no negative zero


# --- Renderer -------------------------------------------------------------------------------------------------------

_TABLE = (128, 120, 110)  # near the mean of both towers' normalisation: an empty patch says nothing
_METAL = (245, 245, 240)
_TILT = np.sqrt(0.5)  # sine and cosine of the camera's 45 degrees
_WRIST_WIDTH = 0.24  # metres that the camera on the wrist sees


def render(world: Tabletop, size: int = 48) -> np.ndarray:
    """uint8 [size, size, 3]: painter's algorithm, exact box coverage, anti-aliased ellipses; about 0.3 ms at 48
    pixels.
    """
    canvas = _Canvas(size)
    x, y, z = world.gripper
    if world.kind.shows_arm:
        canvas.ellipse(x, y, 0.0, 0.06, 0.06 * _TILT, (70, 66, 60))  # the gripper's shadow
    for index in np.argsort(-world.objects[:, 1]):  # far ones first
        if index != world.held:
            _draw_object(canvas, world, index)
    if world.held is not None:
        _draw_object(canvas, world, world.held)
    if world.kind.shows_arm:
        half = _finger(world)
        for side in (-1, 1):
            canvas.box(x + side * half - 0.012, x + side * half + 0.012, y, z, z + 0.085, _METAL)
        canvas.box(x - 0.07, x + 0.07, y, z + 0.08, z + 0.105, _METAL)
    return canvas.image()


def render_wrist(world: Tabletop, size: int = 48) -> np.ndarray:
    """uint8 [size, size, 3]: straight down, the gripper always in the middle; heights do not show."""
    x, y, _ = world.gripper
    canvas = _Canvas(size, _WRIST_WIDTH, tilt=1.0, center=(x, y), row=0.5)
    order = [i for i in range(len(world.objects)) if i != world.held] + ([] if world.held is None else [world.held])
    for index in order:  # what is held lies above the others
        color = np.array(COLORS[world.scene.colors[index]], np.float32)
        (u, v), h = world.objects[index, :2], OBJECT_HALF
        if world.scene.shapes[index] == "ball":
            canvas.ellipse(u, v, 0.0, h, h, color)
        else:
            canvas.box(u - h, u + h, v - h, 0.0, 2 * h, color)
    half = _finger(world)
    for side in (-1, 1):
        canvas.box(x + side * half - 0.012, x + side * half + 0.012, y - 0.025, 0.0, 0.05, _METAL)
    return canvas.image()


def _finger(world: Tabletop) -> float:
    """Half the distance of the fingers."""
    return 0.056 if world.open else 0.042 if world.held is not None else 0.014


def _draw_object(canvas, world, index):
    color = np.array(COLORS[world.scene.colors[index]], np.float32)
    x, y, z = world.objects[index]
    h = OBJECT_HALF
    if world.scene.shapes[index] == "ball":
        canvas.ellipse(x, y, z + h, h, h, color)
        canvas.ellipse(x - 0.3 * h, y, z + 1.5 * h, 0.35 * h, 0.35 * h, 0.5 * color + 127)
    else:
        canvas.box(x - h, x + h, y - h, z, z + 2 * h, 0.75 * color)  # front face
        canvas.box(
            x - h, x + h, y - h, z + 2 * h, z + 4 * h, color
        )  # top face: depth 2h looks like height 2h at 45 degrees


class _Canvas:
    """A picture `width` metres wide. Depth y and height z move things up, by `tilt` of their size; `center` (x, y) on
    the table is in the middle of the columns, at the share `row` of the rows.
    """

    def __init__(self, size: int, width: float = 0.50, tilt: float = _TILT, center=(0.0, 0.0), row: float = 0.66):
        self.scale = size / width  # pixels per metre
        self.size, self.tilt, self.center, self.row = size, tilt, center, row
        self.pixels = np.empty((size, size, 3), np.float32)
        self.pixels[:] = _TABLE
        self.edges = np.arange(size, dtype=np.float32)

    def project(self, x, y, z):
        across, depth = x - self.center[0], y - self.center[1]
        return self.size / 2 + self.scale * across, self.row * self.size - self.scale * self.tilt * (depth + z)

    def blend(self, rows, cols, alpha, color):
        patch = self.pixels[rows, cols]
        patch += alpha[..., None] * (np.asarray(color, np.float32) - patch)

    def window(self, low, high):
        return slice(max(int(low), 0), max(min(int(high) + 1, self.size), 0))

    def box(self, x0, x1, y, z0, z1, color):
        """An upright rectangle at depth y, spanning x0..x1 and z0..z1."""
        u0, v1 = self.project(x0, y, z0)
        u1, v0 = self.project(x1, y, z1)
        cols, rows = self.window(u0, u1), self.window(v0, v1)
        across = np.clip(np.minimum(u1, self.edges[cols] + 1) - np.maximum(u0, self.edges[cols]), 0, 1)
        down = np.clip(np.minimum(v1, self.edges[rows] + 1) - np.maximum(v0, self.edges[rows]), 0, 1)
        self.blend(rows, cols, down[:, None] * across[None], color)

    def ellipse(self, x, y, z, radius_x, radius_v, color):
        """A flat ellipse centred at x, y, z with radii in metres along the image's axes."""
        u, v = self.project(x, y, z)
        ru, rv = radius_x * self.scale, radius_v * self.scale
        cols, rows = self.window(u - ru - 1, u + ru + 1), self.window(v - rv - 1, v + rv + 1)
        du = (self.edges[cols] + 0.5 - u) / ru
        dv = (self.edges[rows] + 0.5 - v) / rv
        distance = np.sqrt(du[None] ** 2 + dv[:, None] ** 2)
        self.blend(rows, cols, np.clip((1 - distance) * min(ru, rv) + 0.5, 0, 1), color)

    def image(self):
        return np.clip(self.pixels + 0.5, 0, 255).astype(np.uint8)
