"""The real simulator, if `make libero-env` has installed it: what the evaluation builds on."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from evaluation.libero_policy import ScriptedPolicy, evaluate

from openvla_jax.errors import InputError
from openvla_jax.evaluation.benchmarks.results import read_outcomes
from openvla_jax.sim.libero.conventions import MAX_STEPS
from openvla_jax.sim.libero.process import python_path

try:
    PYTHON = python_path()
except InputError:
    pytest.skip("the simulator's environment is not installed: make libero-env", allow_module_level=True)
pytestmark = [pytest.mark.long, pytest.mark.slow]

REFERENCE = """
import runpy
import numpy as np

runpy.run_path({launch!r}, run_name="launch")
from openvla_jax.sim.libero.conventions import CAMERAS, NO_OP, SEED
from openvla_jax.sim.libero.simulator import LiberoSimulator, _bddl, _tasks, trace_actions
from libero.libero.envs import OffScreenRenderEnv

tasks = _tasks("libero_spatial")
env = OffScreenRenderEnv(bddl_file_name=_bddl(tasks.get_task(0)), camera_heights=256, camera_widths=256)
env.seed(SEED)
states = tasks.get_task_init_states(0)
seen = {{}}
for index in range(3):  # as the reference: one environment, every state in order
    env.reset()
    observation = env.set_init_state(states[index])
    if index != 1:
        for _ in range(10):
            observation, *_ = env.step(NO_OP)
        for action in trace_actions()[:5]:
            observation, *_ = env.step(action)
        seen[index] = observation, np.array(env.sim.data.qpos), np.array(env.sim.model.body_pos)
env.close()

ours = LiberoSimulator()
ours.load("libero_spatial", 0, True)
for index in (2, 0):  # in another order
    ours.reset(index)
    for action in trace_actions()[:5]:
        ours.step(action)
    observation, qpos, body_pos = seen[index]
    assert np.array_equal(ours.env.sim.model.body_pos, body_pos), "furniture stands elsewhere"
    difference = np.abs(np.array(ours.env.sim.data.qpos) - qpos).max()
    assert difference < 1e-9, difference
    for camera, name in CAMERAS.items():
        theirs = observation[name + "_image"][::-1, ::-1]
        assert np.array_equal(ours.frame(camera), theirs), camera
print("equal")
"""


def test_simulator_shows_what_the_reference_s_loop_sees():
    """Frames are byte-equal to robosuite's observations, although rendered later and in another order of states."""
    launch = ROOT / "openvla_jax" / "sim" / "libero" / "launch.py"
    code = REFERENCE.format(launch=str(launch))
    done = subprocess.run([PYTHON, "-P", "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]


def test_evaluation_runs_a_short_real_episode(tmp_path, monkeypatch):
    class Curious(ScriptedPolicy):
        def predict_chunks(self, observations):
            self.seen += [dict(observation.images) for observation in observations]
            return np.zeros((len(observations), 4, 7))

    monkeypatch.setitem(MAX_STEPS, "libero_object", 6)
    policy = Curious()
    evaluate(tmp_path, "--tasks", "0", "--states", "0", policy=policy)
    (outcome,) = read_outcomes(tmp_path)
    assert (outcome.success, outcome.steps, outcome.redone) == (False, 6, 0)
    assert outcome.instruction == "pick up the alphabet soup and place it in the basket"
    assert len(policy.seen) == 2 and {image.shape for image in policy.seen[0].values()} == {(256, 256, 3)}
    assert all(image.std() > 10 for image in policy.seen[0].values())
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["simulator"]["agrees"] and run["simulator"]["versions"]["mujoco"] == "3.3.2"


def test_expert_s_episode_replays_in_the_real_simulator(tmp_path):
    pytest.importorskip("tensorflow")
    where = ["--suite", "libero_object"]
    expert = [
        "-m",
        "openvla_jax.sim.libero",
        *where,
        "--tasks",
        "1",
        "--states",
        "0-1",
        "--noise",
        "0",
        "--out",
        tmp_path,
    ]
    replay = ["-m", "openvla_jax.evaluate", "replay", *where, "--data_dir", tmp_path]
    for arguments, said in ((expert, "2 of 2 episodes succeeded"), (replay, "| replay | 2 / 2 |")):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
