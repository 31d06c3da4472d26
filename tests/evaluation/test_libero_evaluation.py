"""The evaluation on LIBERO against a fake simulator: protocol, resuming, shards, arms, recovery, bad input."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from evaluation.libero_policy import INFO, ScriptedPolicy, evaluate
from scipy.stats import binom
from sim.fake_libero import OBJECTS, place_of, start_of
from sim.libero_cases import fake_python

from openvla_jax import evaluate as evaluate_command
from openvla_jax.errors import InputError
from openvla_jax.evaluation.benchmarks import arms, report
from openvla_jax.evaluation.benchmarks.command import film_of, run_merge
from openvla_jax.evaluation.benchmarks.libero import protocol_of, shard_of
from openvla_jax.evaluation.benchmarks.results import Episode, Outcome, Results, read_outcomes
from openvla_jax.evaluation.environments.libero import LiberoEnvironment
from openvla_jax.evaluation.rollouts import wilson_interval
from openvla_jax.sim.libero.conventions import MAX_STEPS
from openvla_jax.sim.libero.process import PYTHON_VARIABLE, Simulator

LAST = "pick up the butter and place it in the basket"


@pytest.fixture(autouse=True)
def faked(tmp_path_factory, monkeypatch):
    """Puts the fake simulator in place; returns a function that sets its faults."""
    monkeypatch.setenv(PYTHON_VARIABLE, str(fake_python(tmp_path_factory.mktemp("fake"))))
    return lambda **faults: monkeypatch.setenv("FAKE_LIBERO", json.dumps(faults))


def steps_to(task, state):
    """Actions that the scripted policy needs: the longest way along an axis, at 0.1 m an action, to within 0.06 m."""
    hand, goal, count = start_of(state), place_of(OBJECTS[task]), 0
    while count == 0 or np.linalg.norm(goal - hand) >= 0.06:
        hand, count = hand + np.clip(goal - hand, -0.1, 0.1), count + 1
    return count


# --- Environment ----------------------------------------------------------------------------------------------------


LAZY = """
import numpy as np
from openvla_jax.evaluation.environments.libero import LiberoEnvironment
from openvla_jax.sim.libero.process import Simulator
from openvla_jax.types import Environment, ObservationSpec

asked = []
class Counting(Simulator):
    def ask(self, do, **values):
        asked.append(do)
        return super().ask(do, **values)

spec = ObservationSpec(("wrist", "primary"), state=("z", "pad", "gripper_right", "x"))
environment = LiberoEnvironment(Counting(), "libero_object_swap", 1, "x", spec, unnorm_key="key")
assert isinstance(environment, Environment) and environment.max_steps == 280
first = environment.reset(2)
assert asked == ["load", "reset"] and list(first.images) == ["wrist", "primary"] and len(first.images) == 2
assert first.state.tolist() == [0.4, 0.0, -0.04, -0.3] and first.unnorm_key == "key"
assert first.images["wrist"][0, 0, 0] == 210 and first.images["wrist"].shape == (256, 256, 3)
assert asked == ["load", "reset", "render"] and first.images["wrist"] is first.images["wrist"]
second, done, success = environment.step(np.array([1.0, 0, 0, 0, 0, 0, 1.0]))
assert not done and not success and abs(second.state[3] + 0.2) < 1e-9
assert first.images["wrist"][0, 0, 0] == 210, "what was looked at stays"
for error, images, camera in ((RuntimeError, first.images, "primary"), (KeyError, second.images, "left")):
    try:
        images[camera]
    except error as raised:
        print(raised)
    else:
        raise AssertionError(camera)
assert asked == ["load", "reset", "render", "step"]
environment.simulator.close()
"""


def test_environment_renders_what_the_spec_names_at_the_first_look():
    """In a process without the tests' type checks, which look into every mapping."""
    done = subprocess.run([sys.executable, "-c", LAZY], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "is of an earlier step: look at it before the next one" in done.stdout


def test_environment_that_is_blank_renders_nothing():
    simulator = Simulator()
    environment = LiberoEnvironment(simulator, "libero_object", 0, LAST, blank=True)
    observation = environment.reset(0)
    assert not observation.images["primary"].any() and not observation.images["wrist"].any()
    assert environment.frame("primary").any(), "a film shows what happens"
    simulator.close()


# --- Protocol -------------------------------------------------------------------------------------------------------


def test_evaluation_runs_every_episode_by_the_contract(tmp_path, capsys):
    policy = ScriptedPolicy()
    evaluate(tmp_path, "--tasks", "0-1", policy=policy)
    outcomes = read_outcomes(tmp_path)
    assert [tuple(o.episode) for o in outcomes] == [("policy", task, state) for task in (0, 1) for state in range(5)]
    assert all(o.success and o.steps == steps_to(o.task, o.state) for o in outcomes)
    assert outcomes[-1].instruction == LAST and outcomes[-1].redone == 0 and outcomes[-1].cpu_seconds > 0
    levels, instruction, state, key = policy.seen[1]
    assert levels == {"primary": 103, "wrist": 203}, "a chunk of 4, of which 3 are executed"
    assert instruction == f"pick up the {OBJECTS[0]} and place it in the basket" and key == "libero_object_no_noops"
    assert state.shape == (8,)
    run = json.loads((tmp_path / "run.json").read_text())
    protocol = run["protocol"]
    assert (protocol["max_steps"], protocol["settling_steps"], protocol["executed"]) == (280, 10, 3)
    assert run["simulator"]["agrees"] and run["simulator"]["versions"] == {"mujoco": "0.0"}
    assert (run["policy"]["name"], run["episodes"], run["shard"]) == ("scripted", 10, [0, 1])
    low, high = wilson_interval(10, 10)
    assert f"| policy | 10 / 10 | 100.0% | {low:.1%} to {high:.1%} |" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "10 episodes." in page and LAST in page and "bounds" not in page


def test_evaluation_fails_episodes_at_the_step_limit(tmp_path, monkeypatch):
    monkeypatch.setitem(MAX_STEPS, "libero_object", 4)
    evaluate(tmp_path, "--tasks", "0", "--states", "0-1")
    assert [(o.success, o.steps) for o in read_outcomes(tmp_path)] == [(False, 4)] * 2


def test_evaluation_goes_on_where_it_ended_and_may_grow(tmp_path, capsys):
    evaluate(tmp_path, "--tasks", "0", "--states", "0-2")
    with (tmp_path / "episodes.jsonl").open("ab") as file:
        file.write(b'{"arm": "policy", "task": 0, "sta')  # what a kill leaves
    before = read_outcomes(tmp_path)
    policy = ScriptedPolicy()
    evaluate(tmp_path, "--tasks", "0-1", policy=policy)
    assert "3 of 10 episodes are done already" in capsys.readouterr().out
    after = read_outcomes(tmp_path)
    assert after[:3] == before and len({o.episode for o in after}) == len(after) == 10
    count = len(policy.seen)
    evaluate(tmp_path, "--tasks", "0-1", policy=policy)
    assert len(policy.seen) == count, "nothing is left to do"


@pytest.mark.long
def test_evaluation_killed_in_the_middle_loses_and_repeats_nothing(tmp_path, faked):
    faked(slow=0.02)
    script = Path(__file__).with_name("libero_policy.py")
    command = [sys.executable, str(script), str(tmp_path / "out"), "--processes", "2"]
    path = tmp_path / "out" / "episodes.jsonl"
    kills = 0
    while kills < 2:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        done = path.read_bytes().count(b"\n") if path.exists() else 0
        deadline = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < done + 3:
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        kills += 1
    kept = read_outcomes(tmp_path / "out")
    faked()
    evaluate(tmp_path / "out", "--processes", "2")
    outcomes = read_outcomes(tmp_path / "out")
    assert outcomes[: len(kept)] == kept and len(kept) >= 6
    assert sorted(tuple(o.episode) for o in outcomes) == [("policy", t, s) for t in range(3) for s in range(5)]


@pytest.mark.long
def test_evaluation_in_two_processes_has_the_outcomes_of_one(tmp_path):
    evaluate(tmp_path / "one")
    evaluate(tmp_path / "two", "--processes", "2")
    one, two = ({o.episode: (o.success, o.steps) for o in read_outcomes(tmp_path / name)} for name in ("one", "two"))
    assert one == two and len(one) == 15


@pytest.mark.parametrize(("fault", "timeout"), [("die", "60"), pytest.param("hang", "2", marks=pytest.mark.long)])
def test_evaluation_redoes_an_episode_whose_simulator_fails(tmp_path, faked, fault, timeout):
    faked(**{fault: [1, 3, 3]}, marker=str(tmp_path / "happened"))
    evaluate(tmp_path / "out", "--timeout", timeout)
    assert (tmp_path / "happened").exists()
    outcomes = read_outcomes(tmp_path / "out")
    assert {o.episode: o.redone for o in outcomes if o.redone} == {Episode("policy", 1, 3): 1}
    assert len(outcomes) == 15 and all(o.success and o.steps == steps_to(o.task, o.state) for o in outcomes)
    assert "<td>episodes done again</td><td>1</td>" in (tmp_path / "out" / "report.html").read_text()


def test_evaluation_redoes_an_episode_whose_simulator_dies_rendering(tmp_path, faked):
    """In a process without the tests' type checks, which look at images before the evaluation does."""
    faked(blind=[1, 3, 3], marker=str(tmp_path / "happened"))
    script = Path(__file__).with_name("libero_policy.py")
    command = [sys.executable, str(script), str(tmp_path / "out"), "--tasks", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outcomes = read_outcomes(tmp_path / "out")
    assert (tmp_path / "happened").exists() and [o.redone for o in outcomes] == [0, 0, 0, 1, 0]
    assert all(o.success and o.steps == steps_to(1, o.state) for o in outcomes)


def test_evaluation_gives_up_a_simulator_that_fails_every_time(tmp_path, faked):
    faked(die=[0, 1, 0])
    with pytest.raises(InputError, match=r"3 times in task 0, state 1 of libero_object; run the command again"):
        evaluate(tmp_path)
    assert len(read_outcomes(tmp_path)) == 1, "what was finished is kept"


@pytest.mark.long
def test_evaluation_films_chosen_episodes(tmp_path):
    pytest.importorskip("PIL")
    from PIL import Image

    evaluate(tmp_path, "--tasks", "0", "--videos", "0:1", "--arms", "policy", "blank", "--states", "0-1")
    films = sorted((tmp_path / "videos").iterdir())
    assert [film.name for film in films] == ["blank_task0_state1.gif", "policy_task0_state1.gif"]
    with Image.open(films[1]) as film:
        assert film.n_frames > 1
    assert 'src="videos/policy_task0_state1.gif"' in (tmp_path / "report.html").read_text()


# --- Shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_shards_merge_to_the_whole_evaluation(tmp_path, capsys):
    evaluate(tmp_path / "whole")
    folders = [tmp_path / str(index) for index in range(4)]
    for index, folder in enumerate(folders):
        evaluate(folder, "--shard", f"{index}/4")
    assert sorted(len(read_outcomes(folder)) for folder in folders) == [3, 4, 4, 4]
    merge = lambda *given: run_merge(Namespace(folders=list(given), out=tmp_path / "all"))
    with pytest.raises(InputError, match="shards 1/4, 3/4 are missing"):
        merge(folders[0], folders[2])
    with pytest.raises(InputError, match="both hold shard 0/4"):
        merge(folders[0], folders[0])
    lines = (folders[1] / "episodes.jsonl").read_text()
    (folders[1] / "episodes.jsonl").write_text(lines[: lines.rindex("\n", 0, -1) + 1])
    with pytest.raises(InputError, match=r"has [23] of [34] episodes"):
        merge(*folders)
    (folders[1] / "episodes.jsonl").write_text(lines)
    merge(*folders)
    facts = lambda folder: [(o.episode, o.success, o.steps) for o in read_outcomes(folder)]
    assert facts(tmp_path / "all") == sorted(facts(tmp_path / "whole"))
    assert "| policy | 15 / 15 |" in capsys.readouterr().out.splitlines()[-2]
    other = json.loads((folders[2] / "run.json").read_text())
    (folders[2] / "run.json").write_text(json.dumps(other | {"suite": "libero_goal"}))
    with pytest.raises(InputError, match="another suite"):
        merge(*folders)


@pytest.mark.parametrize("text", ["4/4", "a/4", "1", "-1/4", "1/0"])
def test_shard_of_refuses_what_is_no_part(text):
    with pytest.raises(InputError, match="i/n"):
        shard_of(text)
    assert shard_of("0/4") == (0, 4)


# --- Arms -----------------------------------------------------------------------------------------------------------


def test_arms_change_one_thing_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MAX_STEPS, "libero_object", 30)
    policy = ScriptedPolicy()
    evaluate(tmp_path, "--tasks", "0", "--arms", *arms.ARMS, policy=policy)
    found = report.by_arm(read_outcomes(tmp_path))
    rates = {arm: sum(o.success for o in rows) for arm, rows in found.items()}
    assert rates == {"policy": 5, "blank": 0, "instruction": 0, "object": 5, "phrasing": 5}
    words = {arm: rows[0].instruction for arm, rows in found.items()}
    plain, reworded = "pick up the milk and place it in the basket", "put the milk into the basket"
    assert words == dict(policy=plain, blank=plain, object=plain, instruction=LAST, phrasing=reworded)
    assert any(levels["primary"] == 0 for levels, *_ in policy.seen)
    table = capsys.readouterr().out
    p_value = 2 * binom.cdf(0, 5, 0.5)
    assert f"| blank | 0 / 5 | 0.0% | 0.0% to 43.4% | 5 | 0 | {p_value:.3g} |" in table


def test_sentence_is_the_file_s_name_unless_libero_pro_changed_it():
    row = {"language": "pick up the milk", "file_language": "Pick the milk"}
    assert arms.sentence(row, row) == "pick up the milk" and arms.sentence(row, None) == "pick up the milk"
    assert arms.sentence({**row, "file_language": "grab milk"}, row) == "grab milk"


def test_arms_that_a_suite_lacks_are_named(tmp_path):
    with pytest.raises(InputError, match="libero_object_swap' is changed already"):
        evaluate(tmp_path, "--suite", "libero_object_swap", "--arms", "object")
    row = {"name": "a", "language": "b", "file_language": "c", "states": 1}
    ask = lambda suite: [] if suite.endswith("_lan") else [row]
    with pytest.raises(InputError, match="no such sentence for task 0, a"):
        arms.conditions(ask, "libero_goal", ["phrasing"])


@pytest.mark.parametrize(("only_first", "only_second"), [(10, 2), (0, 6), (7, 7), (0, 0)])
def test_pairs_have_mcnemar_s_exact_probability(only_first, only_second):
    def arm(flags):
        return [Outcome("a", 0, i, bool(flag), 1, "") for i, flag in enumerate(flags)]

    first = [1] * only_first + [0] * only_second + [1, 1, 0]
    second = [0] * only_first + [1] * only_second + [1, 1, 0]
    pairs = report.pair(arm(first), arm(second) + [Outcome("a", 9, 9, True, 1, "")])
    assert (pairs.episodes, pairs.only_first, pairs.only_second) == (len(first), only_first, only_second)
    count, least = only_first + only_second, min(only_first, only_second)
    assert pairs.p_value == pytest.approx(min(1.0, 2 * binom.cdf(least, count, 0.5)) if count else 1.0)


# --- What is refused ------------------------------------------------------------------------------------------------


def info_with(**parts):
    """What the scripted policy says of itself, with parts of its specs replaced."""
    return {**INFO, **{name: {**INFO[name], **change} for name, change in parts.items()}}


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (info_with(observation={"cameras": ["primary", "left_wrist"]}), "sees camera 'left_wrist': LIBERO has primary"),
        (info_with(observation={"state": ["x", "joint_1"]}), "state has column 'joint_1': LIBERO has x, y"),
        (info_with(observation={"rotation": 90}), "turned by 90 degrees"),
        (info_with(action={"frame": "joint"}), "actions are 'joint'"),
        (info_with(action={"gripper": ""}), "nothing says what 1 means"),
        ({**INFO, "statistics": {"bridge_orig": INFO["statistics"]["libero_object_no_noops"]}}, "bridge_orig, not of"),
        ({**INFO, "statistics": {"libero_object": {"action": {"q01": [0.0] * 6}}}}, "have 6 numbers: LIBERO takes 7"),
    ],
)
def test_protocol_of_refuses_a_policy_for_another_robot(info, message):
    with pytest.raises(InputError, match=message):
        protocol_of(info, "libero_object")


def test_protocol_of_takes_the_suite_s_statistics():
    row = INFO["statistics"]["libero_object_no_noops"]
    several = {**INFO, "statistics": {"bridge_orig": row, "libero_object": row, "libero_object_no_noops": row}}
    assert protocol_of(several, "libero_object_swap").unnorm_key == "libero_object"
    assert protocol_of(several, "libero_object", "bridge_orig").unnorm_key == "bridge_orig"
    with pytest.raises(InputError, match="not of mine"):
        protocol_of(several, "libero_object", "mine")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--suite", "libero_objects"], "suite 'libero_objects': one of libero_spatial"),
        (["--suite", "libero_object_what"], "'libero_object_what' is not in this package"),
        (["--tasks", "3"], "task 3: suite 'libero_object' has tasks 0 to 2"),
        (["--states", "0-5"], "state 5: task 0 of 'libero_object' has states 0 to 4"),
        (["--states", "x"], "give numbers and ranges"),
        (["--processes", "0"], "processes 0: at least 1"),
        (["--videos", "3"], "give TASK:STATE"),
    ],
)
def test_evaluation_refuses_what_does_not_exist(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, *more)
    assert not (tmp_path / "episodes.jsonl").exists()


def test_evaluation_stops_at_another_simulator_unless_it_is_allowed(tmp_path, faked):
    faked(other=True)
    with pytest.raises(
        InputError, match=r"not the benchmark's: libero_object: 50\.0% of primary's pixels.*mujoco 9\.9\.9"
    ):
        evaluate(tmp_path / "a")
    evaluate(tmp_path / "a", "--allow_other_simulator", "--tasks", "0")
    assert "do not compare the rates" in (tmp_path / "a" / "report.html").read_text()
    faked()
    with pytest.raises(InputError, match="another simulator"):
        evaluate(tmp_path / "a", "--tasks", "0")


def test_evaluation_refuses_a_folder_of_another_policy(tmp_path):
    evaluate(tmp_path, "--tasks", "0")
    with pytest.raises(InputError, match=r"another policy.*choose another --out"):
        evaluate(tmp_path, "--tasks", "0", name="other")
    with pytest.raises(InputError, match="another protocol"):
        evaluate(tmp_path, "--tasks", "0", "--soft_reset")
    held = json.loads((tmp_path / "run.json").read_text())
    with Results(tmp_path, held, []), pytest.raises(InputError, match="another process"):
        evaluate(tmp_path, "--tasks", "0")


def test_evaluation_refuses_chunks_that_are_too_short(tmp_path):
    with pytest.raises(InputError, match="predicts 2 actions at once, of which 3 are"):
        evaluate(tmp_path, policy=ScriptedPolicy(executed=1))


def test_results_on_a_full_disk_raise_what_the_system_says(tmp_path):
    evaluate(tmp_path, "--tasks", "0", "--states", "0")
    run, (outcome,) = json.loads((tmp_path / "run.json").read_text()), read_outcomes(tmp_path)
    with Results(tmp_path, run, []) as opened:
        opened._file.close()
        opened._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(OSError, match="No space left"):
            opened.add(dataclasses.replace(outcome, state=1))
        assert len(opened.outcomes) == 1
    assert read_outcomes(tmp_path) == [outcome]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "episodes.jsonl:1"),
        ("[1]", "expected form"),
        ('{"arm": 3}', "episodes.jsonl:1"),
        ("x", "remove the line"),
    ],
)
def test_outcomes_that_are_damaged_name_their_line(tmp_path, line, message):
    (tmp_path / "episodes.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        read_outcomes(tmp_path)


def test_outcomes_that_are_there_twice_are_refused(tmp_path):
    line = json.dumps(dataclasses.asdict(Outcome("policy", 0, 0, True, 3, "x"))) + "\n"
    (tmp_path / "episodes.jsonl").write_text(line)
    assert len(read_outcomes(tmp_path)) == 1
    (tmp_path / "episodes.jsonl").write_text(line * 2)
    with pytest.raises(InputError, match="twice"):
        read_outcomes(tmp_path)


def test_film_of_refuses_another_form():
    assert film_of("3:12") == (3, 12)
    for text in ("3", "a:1", "1:", ":1", "-1:2"):
        with pytest.raises(InputError):
            film_of(text)


@pytest.mark.long
def test_command_evaluates_a_checkpoint_by_its_contract(tmp_path, monkeypatch):
    from openvla_jax.checkpoint.load import save_model
    from tests.inference.small_policy import small_policy

    policy = small_policy(INFO["statistics"])
    save_model(policy.model, policy.contract, tmp_path / "checkpoint")
    monkeypatch.setitem(MAX_STEPS, "libero_object", 3)
    where = ["--checkpoint", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")]
    assert evaluate_command.main(["libero", "--suite", "libero_object", "--tasks", "0", "--states", "0-1", *where]) == 0
    assert [(o.state, o.steps) for o in read_outcomes(tmp_path / "out")] == [(0, 3), (1, 3)]
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["policy"]["name"] == str(tmp_path / "checkpoint")
    assert (run["protocol"]["cameras"], run["protocol"]["state"], run["protocol"]["executed"]) == (["primary"], [], 1)


def test_command_reports_bad_input_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(SystemExit) as stopped:
        evaluate_command.main(["libero", "--suite", "libero_object", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "give --checkpoint or --url" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        evaluate_command.main(["merge", str(tmp_path / "no"), "--out", str(tmp_path / "all")])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
