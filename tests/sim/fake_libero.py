"""A simulator's process without a simulator: it speaks the messages of LIBERO's, and a policy can solve its tasks.

The hand has to reach the place that the task's own object lies at. Frames are of one grey level that tells camera, task
and step. FAKE_LIBERO, a JSON object in the environment, makes it misbehave:

    die, hang     [task, state, step]: what happens at that step, once if `marker` is a path, which then appears
    blind         the same, when it renders there
    other         true: it draws other frames than the benchmark's simulator
    slow          seconds that every step takes
"""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from openvla_jax.errors import InputError
from openvla_jax.sim.libero.serving import serve, take_output

FINGERPRINTS = Path(__file__).resolve().parents[2] / "openvla_jax" / "sim" / "libero" / "fingerprints"
OBJECTS = ("milk", "butter", "ketchup")
STATES = 5
STRIDE = 0.1  # metres of an action of 1
NEAR = 0.06
SUITES = {
    "libero_object": "pick up the {} and place it in the basket",
    "libero_object_task": "",
    "libero_object_lan": "put the {} into the basket",
    "libero_object_object": "pick up the {} and place it in the basket",
    "libero_object_swap": "pick up the {} and place it in the basket",
}


def place_of(name: str) -> np.ndarray:
    """Where an object lies [3]."""
    return np.array([0.3, 0.25 * (OBJECTS.index(name) - 1), 0.2])


def start_of(state: int) -> np.ndarray:
    """Where the hand is at first [3]."""
    return np.array([-0.3, 0.02 * state, 0.4])


class FakeSimulator:
    def __init__(self) -> None:
        self.faults = json.loads(os.environ.get("FAKE_LIBERO", "{}"))

    def hello(self):
        return {"versions": {"mujoco": "0.0"}}

    def suite(self, suite):
        if suite not in SUITES:
            raise InputError(f"suite {suite!r} is not in this package: one of {', '.join(SUITES)}")
        rows = []
        for index, name in enumerate(OBJECTS):
            language = f"pick up the {name} and place it in the basket"
            other = OBJECTS[(index + 1) % len(OBJECTS)]
            file_language = SUITES[suite].format(name) or language.replace(name, other)
            file = {"name": f"pick_up_the_{name}", "language": language, "file_language": file_language}
            rows.append(file | {"states": STATES})
        return {"tasks": rows}

    def load(self, suite, task, hard_reset):
        self.task = task
        return {}

    def reset(self, state):
        if state >= STATES:
            raise InputError(f"state {state}: there are states 0 to {STATES - 1}")
        self.start, self.hand, self.steps = state, start_of(state), 0
        return self.measured()

    def step(self, action):
        self.misbehave("die", "hang")
        self.steps += 1
        self.hand = self.hand + STRIDE * action[:3]
        self.closed = action[6] > 0
        return self.measured()

    def measured(self):
        reached = np.linalg.norm(self.hand - place_of(OBJECTS[self.task])) < NEAR
        state = np.array([*self.hand, np.pi, 0.0, 0.0, 0.04, -0.04])
        return {"state": state, "success": bool(reached and self.steps)}

    def render(self, cameras):
        self.misbehave("blind")
        level = {"primary": 100, "wrist": 200}
        return {c: np.full((256, 256, 3), level[c] + 10 * self.task + self.steps % 10, np.uint8) for c in cameras}

    def fingerprint(self):
        stored = FINGERPRINTS / "libero_object.json"
        frames = {c: np.array(Image.open(stored.with_name(f"libero_object_{c}.png"))) for c in ("primary", "wrist")}
        if self.faults.get("other"):
            frames["primary"][:128] += 100
        trace = np.array(json.loads(stored.read_text())["trace"])
        return {**frames, "trace": trace, "versions": {"mujoco": "9.9.9" if self.faults.get("other") else "0.0"}}

    def demonstrate(self, state, noise, seed, max_steps):
        self.reset(state)
        rows = {"primary": [], "wrist": [], "state": [], "joint_state": [], "action": []}
        success = False
        while not success and self.steps < max_steps:
            action = np.zeros(7)
            action[:3] = np.clip((place_of(OBJECTS[self.task]) - self.hand) / STRIDE, -1, 1)
            action[6] = 1.0 if self.steps > 2 else -1.0
            for name, value in self.render(["primary", "wrist"]).items():
                rows[name].append(value)
            rows["state"].append(self.measured()["state"].astype(np.float32))
            rows["joint_state"].append(np.arange(7, dtype=np.float32))
            rows["action"].append(action.astype(np.float32))
            success = self.step(action)["success"]
        return {"success": success, **{name: np.stack(values) for name, values in rows.items()}}

    def misbehave(self, *faults):
        time.sleep(self.faults.get("slow", 0))
        for fault in faults:
            if self.faults.get(fault) == [self.task, self.start, self.steps]:
                marker = self.faults.get("marker")
                if marker and os.path.exists(marker):
                    continue
                if marker:
                    Path(marker).touch()
                print("the fake simulator has had enough", file=sys.stderr, flush=True)
                time.sleep(1000) if fault == "hang" else os._exit(9)


if __name__ == "__main__":
    answers = take_output()
    print("what libraries print is no answer")
    serve(FakeSimulator(), sys.stdin.buffer, answers)
