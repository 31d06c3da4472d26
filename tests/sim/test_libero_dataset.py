"""The expert's episodes as RLDS, from a fake simulator: form, resuming, and what is refused."""

import json

import numpy as np
import pytest
from sim.fake_libero import OBJECTS
from sim.libero_cases import fake_python

pytest.importorskip("tensorflow")
from openvla_jax.data.rlds import dataset_statistics, make_dataset
from openvla_jax.data.source import open_source
from openvla_jax.errors import InputError
from openvla_jax.evaluation.benchmarks.replay import replay
from openvla_jax.sim.libero import __main__ as command
from openvla_jax.sim.libero import dataset
from openvla_jax.sim.libero.process import PYTHON_VARIABLE, Simulator


@pytest.fixture
def faked(tmp_path_factory, monkeypatch):
    """Puts the fake simulator in place; returns a function that sets its faults."""
    monkeypatch.setenv(PYTHON_VARIABLE, str(fake_python(tmp_path_factory.mktemp("fake"))))
    return lambda **faults: monkeypatch.setenv("FAKE_LIBERO", json.dumps(faults))


def write(out, *more):
    return command.main(["--suite", "libero_object", "--tasks", "0-2", "--states", "0-1", "--out", str(out), *more])


def test_expert_s_episodes_are_read_as_the_reference_s_datasets(tmp_path, faked, capsys):
    assert write(tmp_path, "--noise", "0") == 0
    assert "6 of 6 episodes succeeded" in capsys.readouterr().out
    source = open_source("libero_object_no_noops", str(tmp_path))
    assert {name: split.num_examples for name, split in source.info.splits.items()} == {"train": 5, "val": 1}
    trajectories = list(
        make_dataset(
            "libero_object_no_noops", str(tmp_path), "train", views=("primary", "wrist"), num_parallel_reads=1,
            state=("x", "y", "z", "rx", "ry", "rz", "gripper_left", "gripper_right"),
        ).as_numpy_iterator()
    )  # fmt: skip
    words = [trajectory["task"]["language_instruction"][0].decode() for trajectory in trajectories]
    assert words == [f"pick up the {OBJECTS[i // 2]} and place it in the basket" for i in range(5)]
    statistics = dataset_statistics(source, load_proprio=True)
    assert source.info.metadata["simulator"]["versions"] == {"mujoco": "0.0"}, "what a contract then records"
    # The stored gripper is -1 open, +1 closed; the transform makes that 1 and 0, and leaves it unnormalised.
    assert trajectories[0]["action"][:4, 6].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert statistics["action"]["min"][6] == 0.0 and statistics["action"]["max"][6] == 1.0
    assert statistics["proprio"]["mean"][3] == pytest.approx(np.pi) and statistics["proprio"]["max"][7] > 0
    frames = trajectories[0]["observation"]
    assert frames["image_primary"][0][:2] == b"\xff\xd8" and frames["image_wrist"][0] != frames["image_primary"][0]
    described = json.loads((tmp_path / "libero_object_no_noops" / "1.0.0" / "metadata.json").read_text())
    assert described["simulator"]["agrees"] and described["starts"] == {
        "train": [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]], "val": [[2, 1]],
    }  # fmt: skip
    assert write(tmp_path, "--noise", "0") == 0, "what is complete is kept"


@pytest.mark.long
def test_expert_s_episodes_replay_through_a_contract(tmp_path, faked):
    write(tmp_path, "--noise", "0")
    simulator = Simulator()
    outcomes = list(replay(tmp_path, "libero_object", simulator))
    simulator.close()
    assert [(o.task, o.state) for o in outcomes] == [(task, state) for task in range(3) for state in range(2)]
    assert all(outcome.success for outcome in outcomes)
    path = tmp_path / "libero_object_no_noops" / "1.0.0" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"noise": 0.2}))
    with pytest.raises(InputError, match=r"noise 0\.2; write a dataset with --noise 0"):
        next(replay(tmp_path, "libero_object", simulator))


def test_expert_goes_on_after_a_kill_and_after_its_simulator_died(tmp_path, faked, capsys):
    faked(die=[1, 1, 2], marker=str(tmp_path / "died"))
    starts = [dataset.Start(task, state) for task in range(2) for state in range(2)]
    simulator = Simulator()
    collected = dataset.collect(simulator, "libero_object", starts, 0.0, tmp_path)
    first = [next(collected), next(collected)]
    collected.close()  # what a kill leaves: whole files of whole episodes
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "episodes" / "libero_object").glob("*.npz")}
    assert len(kept) == 2
    rest = list(dataset.collect(simulator, "libero_object", starts, 0.0, tmp_path))
    simulator.close()
    assert rest[:2] == first and [success for _, success, _ in rest] == [True] * 4
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert (tmp_path / "died").exists() and "begun again" in capsys.readouterr().out


def test_expert_keeps_episodes_of_one_noise_apart(tmp_path, faked, capsys):
    write(tmp_path, "--noise", "0")
    with pytest.raises(SystemExit):
        write(tmp_path, "--noise", "0.1")
    assert "choose another --out" in capsys.readouterr().err
    path = tmp_path / "episodes" / "libero_object" / "task_0_state_0.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit):
        write(tmp_path, "--noise", "0")
    assert "task_0_state_0.npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "0-3"], "task 3: suite 'libero_object' has tasks 0 to 2"),
        (["--states", "0-9"], "state 9: task 0 has states 0 to 4"),
        (["--noise", "2"], "noise 2.0: from 0 to 1"),
        (["--suite", "libero"], "invalid choice"),
    ],
)
def test_expert_refuses_what_does_not_exist(tmp_path, faked, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        write(tmp_path, *more)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("libero*"))


def test_expert_without_successes_writes_no_dataset(tmp_path, faked):
    folder = tmp_path / "episodes" / "libero_object"
    folder.mkdir(parents=True)
    starts = [dataset.Start(0, 0), dataset.Start(0, 1)]
    for start in starts:
        np.savez(dataset.episode_path(folder, start), success=False)
    with pytest.raises(InputError, match="0 of 2 episodes succeeded: a dataset needs 2"):
        dataset.write("libero_object", starts, {0: "x"}, tmp_path, {})
