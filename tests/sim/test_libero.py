"""LIBERO's conventions, messages, fingerprint and process, and the expert's planning; the simulator itself is faked."""

import json
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation
from sim.fake_libero import OBJECTS
from sim.libero_cases import fake_python

from openvla_jax.errors import InputError
from openvla_jax.sim.libero import conventions, fingerprint, messages
from openvla_jax.sim.libero.conventions import axis_angle, base_suite, numbers, to_simulator, upright
from openvla_jax.sim.libero.expert import OPENING, Disturbance, about_z, is_no_op, plan_grasp, rotation_vector
from openvla_jax.sim.libero.process import PYTHON_VARIABLE, Simulator, SimulatorError

SUITES = tuple(conventions.MAX_STEPS)


@pytest.fixture
def faked(tmp_path, monkeypatch):
    """Puts the fake simulator in place; returns a function that sets its faults."""
    monkeypatch.setenv(PYTHON_VARIABLE, str(fake_python(tmp_path)))
    return lambda **faults: monkeypatch.setenv("FAKE_LIBERO", json.dumps(faults))


# --- Conventions ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 1e-3))
def test_axis_angle_is_the_rotation_and_keeps_the_quaternion_s_sign(quaternion):
    unit = np.array(quaternion) / np.linalg.norm(quaternion)
    vector = axis_angle(unit)
    angle = np.linalg.norm(vector)
    if 1e-3 < angle < 2 * math.pi - 1e-3:  # at its ends the axis means nothing, and the reference gives zeros
        assert angle == pytest.approx(2 * math.acos(unit[3]), abs=1e-6)
        same = Rotation.from_rotvec(vector).inv() * Rotation.from_quat(unit)
        assert same.magnitude() < 1e-6
        assert np.linalg.norm(axis_angle(-unit)) == pytest.approx(2 * math.pi - angle, abs=1e-6)


@pytest.mark.parametrize(
    ("meaning", "given_gripper", "command"),
    [("open", 1.0, -1), ("open", 0.6, -1), ("open", 0.4, 1), ("open", 0.0, 1), ("open", 0.5, 0)]
    + [("closed", 1.0, 1), ("closed", 0.0, -1)],
)
def test_to_simulator_makes_the_gripper_binary_with_minus_one_open(meaning, given_gripper, command):
    action = to_simulator(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, given_gripper]), meaning)
    assert action.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, command]


@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan), np.zeros((1, 7))])
def test_to_simulator_refuses_other_actions(action):
    with pytest.raises(InputError, match="7 finite numbers"):
        to_simulator(action, "open")


def test_upright_turns_a_frame_by_half():
    frame = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(upright(frame), np.rot90(frame, 2))


def test_base_suite_of_perturbed_ones():
    assert [base_suite(name) for name in ("libero_10", "libero_10_swap", "libero_goal_with_mug", "libero_90")] == [
        "libero_10", "libero_10", "libero_goal", "libero_90",
    ]  # fmt: skip
    for name in ("libero", "libero_100", "libero_objects", ""):
        with pytest.raises(InputError, match="one of libero_spatial"):
            base_suite(name)


def test_numbers_of_lists_and_ranges():
    assert numbers("0-3,7,2") == [0, 1, 2, 3, 7]
    for text in ("", "3-1", "a", "1,", "-3", "0-99999"):
        with pytest.raises(InputError):
            numbers(text)


# --- Messages -------------------------------------------------------------------------------------------------------


def reader(data):
    """A function that reads `data` piece by piece."""
    rest = [data]

    def read(count):
        part, rest[0] = rest[0][:count], rest[0][count:]
        if len(part) < count:
            raise EOFError
        return part

    return read


ARRAYS = hnp.arrays(st.sampled_from([np.uint8, np.float64, np.float32]), hnp.array_shapes(min_dims=0, min_side=0))
VALUES = st.integers() | st.text(max_size=9) | st.booleans()


@hypothesis.settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.lists(ARRAYS, max_size=3))
def test_messages_come_back_as_they_were(values, arrays):
    values.pop("arrays", None)
    sent = values | {f"array{i}": array for i, array in enumerate(arrays)}
    got = messages.decode(reader(messages.encode(sent)))
    assert got.keys() == sent.keys() and all(got[name] == value for name, value in values.items())
    for i, array in enumerate(arrays):
        found = got[f"array{i}"]
        assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{}", b"no", b'{"arrays": 3}', b'{"arrays": [["a", "<f8", [-1]]]}', b'{"arrays": [["a", "what", [1]]]}']
    + [b'{"arrays": [["a", "<f8", [99999999999]]]}', b'{"arrays": [["a", "O", [1]]]}', b'{"arrays": [["a", "<f8"]]}'],
)
def test_messages_of_another_form_are_refused(header):
    with pytest.raises(InputError):
        messages.decode(reader(len(header).to_bytes(4, "big") + header + bytes(8)))
    with pytest.raises(InputError, match="at most"):
        messages.decode(reader(b"\xff\xff\xff\xff"))
    with pytest.raises(EOFError):
        messages.decode(reader(b"\0\0\0"))


# --- Process --------------------------------------------------------------------------------------------------------


def test_simulator_answers_and_starts_again_after_it_died(faked, tmp_path):
    faked(die=[1, 2, 1], marker=str(tmp_path / "died"))
    simulator = Simulator()
    rows = simulator.ask("suite", suite="libero_object")["tasks"]
    assert [row["language"] for row in rows] == [f"pick up the {name} and place it in the basket" for name in OBJECTS]
    with pytest.raises(InputError, match="not in this package"):
        simulator.ask("suite", suite="libero_goal")

    def episode():
        simulator.ask("load", suite="libero_object", task=1, hard_reset=True)
        first = simulator.ask("reset", state=2)["state"]
        simulator.ask("step", action=np.ones(7))
        return first, simulator.ask("step", action=np.ones(7))["state"]

    with pytest.raises(SimulatorError, match="died with code 9 at 'step': the fake simulator has had enough"):
        episode()
    spent = simulator.cpu_seconds
    first, last = episode()
    assert last - first == pytest.approx([0.2, 0.2, 0.2, 0, 0, 0, 0, 0]) and simulator.cpu_seconds > spent > 0
    simulator.close()


def test_simulator_that_hangs_is_ended(faked):
    faked(hang=[0, 0, 0])
    simulator = Simulator(timeout=2.0)
    simulator.ask("load", suite="libero_object", task=0, hard_reset=True)
    simulator.ask("reset", state=0)
    simulator.timeout = 0.3
    with pytest.raises(SimulatorError, match=r"did not answer 'step' within 0\.3 s"):
        simulator.ask("step", action=np.zeros(7))
    assert simulator._process is None


def test_simulator_that_fails_is_told_from_a_request_that_is_wrong(faked):
    simulator = Simulator()
    with pytest.raises(SimulatorError, match="failed at 'step'"):
        simulator.ask("step", action=np.zeros(7))  # before any reset: a bug
    with pytest.raises(SimulatorError, match="one of hello"):
        simulator.ask("dance")
    simulator.close()


def test_simulator_without_its_environment_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(InputError, match="not installed; run make libero-env"):
        Simulator()
    (tmp_path / "none").write_text("no program")
    with pytest.raises(InputError, match="cannot be started"):
        Simulator().ask("hello")


# --- Fingerprint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_fingerprint_of_every_suite_is_stored_and_agrees_with_itself(suite):
    stored = fingerprint.load(suite)
    record = fingerprint.check(stored)
    assert record["agrees"] and record["trace"] == 0 and set(record["pixels"].values()) == {0.0}
    assert stored.trace.shape[0] == 20 and stored.versions["mujoco"] == "3.3.2"
    assert {frame.shape for frame in stored.frames.values()} == {(256, 256, 3)}
    for path in fingerprint.FOLDER.glob(f"{suite}*"):
        assert path.stat().st_size < 200_000


def changed(share=0.0, levels=9, trace=0.0):
    """The stored fingerprint of a suite with a share of the wrist's pixels off by some levels, and another trace."""
    stored = fingerprint.load("libero_object")
    frame = stored.frames["wrist"].astype(int).reshape(-1, 3)
    frame[: int(share * len(frame)), 0] = (frame[: int(share * len(frame)), 0] + levels) % 256
    frames = {**stored.frames, "wrist": frame.astype(np.uint8).reshape(256, 256, 3)}
    return fingerprint.Fingerprint("libero_object", frames, stored.trace + trace, {"mujoco": "3.3.3"})


def test_fingerprint_allows_what_versions_that_agree_differ_by():
    for found in (changed(share=0.009), changed(share=1.0, levels=0), changed(trace=9e-5)):
        assert fingerprint.check(found)["agrees"]
    assert changed(share=0.001).digest != fingerprint.load("libero_object").digest


@pytest.mark.parametrize("how", [{"share": 0.012}, {"trace": 1.1e-4}, {"trace": np.nan}])
def test_fingerprint_of_another_simulator_stops_with_versions_and_the_fix(how):
    with pytest.raises(InputError, match=r"mujoco 3\.3\.3, the benchmark .*mujoco 3\.3\.2.*make libero-env") as error:
        fingerprint.check(changed(**how))
    assert "--allow_other_simulator" in str(error.value)
    record = fingerprint.check(changed(**how), allow_other=True)
    assert not record["agrees"] and record["versions"] == {"mujoco": "3.3.3"}


def test_fingerprint_of_the_training_data_is_compared_with_the_simulator_s():
    benchmark, other = fingerprint.check(fingerprint.load("libero_object")), fingerprint.check(changed(1.0), True)
    fingerprint.check_training({}, benchmark, False)
    fingerprint.check_training({"arm": benchmark}, {**benchmark, "digest": "1"}, False)
    fingerprint.check_training({"arm": other}, other, False)
    with pytest.raises(InputError, match=r"trained on 'arm', drawn by mujoco 3\.3\.3, this simulator has .*3\.3\.2"):
        fingerprint.check_training({"arm": other}, benchmark, False)
    fingerprint.check_training({"arm": other}, benchmark, True)


def test_fingerprint_is_stored_as_it_is_loaded(tmp_path):
    stored = fingerprint.load("libero_spatial")
    fingerprint.store(stored, tmp_path)
    again = fingerprint.load("libero_spatial", tmp_path)
    assert again.digest == stored.digest and again.versions == stored.versions
    (tmp_path / "libero_spatial.json").write_text("{}")
    with pytest.raises(InputError, match=r"libero_spatial\.json: has no 'trace'"):
        fingerprint.load("libero_spatial", tmp_path)


# --- Expert ---------------------------------------------------------------------------------------------------------


def box(centre, half):
    """The corners of an upright box."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return np.array(centre) + signs * np.array(half)


def test_plan_grasp_takes_the_narrow_side_in_its_middle():
    grasp = plan_grasp(box([0.1, 0.2, 0.05], [0.06, 0.02, 0.05]), [], hollow=False)
    assert grasp.turn == 0.0 and grasp.point[:2] == pytest.approx([0.1, 0.2])  # fingers close along y
    grasp = plan_grasp(box([0.1, 0.2, 0.05], [0.02, 0.06, 0.05]), [], hollow=False)
    assert abs(grasp.turn) == pytest.approx(np.radians(75)) and 0.0 < grasp.point[2] < 0.1


def test_plan_grasp_turns_away_from_a_neighbour():
    thing = box([0, 0, 0.05], [0.02, 0.02, 0.05])
    beside = box([0, 0.07, 0.05], [0.02, 0.02, 0.05])  # along y: where a finger would come down
    assert plan_grasp(thing, [], hollow=False).turn == 0.0
    turned = plan_grasp(thing, [beside], hollow=False)
    assert abs(turned.turn) >= np.radians(30) and turned.room > 0


def test_plan_grasp_refuses_what_does_not_fit_between_the_fingers():
    with pytest.raises(InputError, match="narrower"):
        plan_grasp(box([0, 0, 0.05], [OPENING, OPENING, 0.05]), [], hollow=False)
    bowl = box([0, 0, 0.05], [OPENING, OPENING, 0.03])
    rim = plan_grasp(bowl, [], hollow=True)
    assert np.linalg.norm(rim.point[:2]) == pytest.approx(OPENING - 0.007, abs=1e-6)


@given(st.floats(-3, 3))
def test_rotation_vector_inverts_a_turn(angle):
    assert rotation_vector(about_z(angle)) == pytest.approx([0, 0, angle], abs=1e-6)


def test_is_no_op_keeps_changes_of_the_gripper():
    still, moving = np.array([0.0] * 6 + [-1.0]), np.array([1e-3] + [0.0] * 5 + [-1.0])
    closing = np.array([0.0] * 6 + [1.0])
    assert is_no_op(still, None) and is_no_op(still, moving) and not is_no_op(moving, still)
    assert not is_no_op(closing, still)


def test_disturbance_moves_the_hand_and_never_the_gripper():
    rng = np.random.default_rng(0)
    disturb = Disturbance(0.2, rng)
    action = np.array([0.5, -0.5, 0.0, 0.1, 0.0, 0.0, 1.0])
    executed = np.stack([disturb(action) for _ in range(2000)])
    assert (executed[:, 6] == 1.0).all() and np.abs(executed[:, :6]).max() <= 1.0
    changed_steps = (executed != action).any(1).mean()
    assert 0.5 < changed_steps < 0.65 and np.abs(executed.mean(0) - action).max() < 0.05
    quiet = Disturbance(0.0, rng)
    assert quiet(action) is action


def test_simulator_s_modules_import_neither_jax_nor_the_main_environment(tmp_path):
    """The launcher finds modules without this environment's packages on the path."""
    import subprocess
    import sys

    code = (
        "import sys, runpy; sys.argv = ['x']; runpy.run_path(sys.path.pop(), run_name='launch');"
        "from openvla_jax.sim.libero import serving, expert, conventions;"
        "bad = {'jax', 'flax', 'tensorflow', 'absl', 'etils'} & {name.split('.')[0] for name in sys.modules};"
        "assert not bad, bad; import openvla_jax; assert not hasattr(openvla_jax, '__version__')"
    )
    launch = ROOT / "openvla_jax" / "sim" / "libero" / "launch.py"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.append({str(launch)!r}); {code}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
