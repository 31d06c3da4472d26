"""Held-out frames through the serving path, quantisation reports, the harness adapter and their command lines."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pytest

from openvla_jax import evaluate
from openvla_jax.evaluation import figures, offline, quantization
from openvla_jax.evaluation.harness import HarnessPolicy
from openvla_jax.tokens.actions import ActionTokenizer, unnormalize_actions
from openvla_jax.types import ActionSpec, Observation, ObservationSpec

ROW = {
    "q01": [-0.1, -2.0, 0.0],
    "q99": [0.3, 2.0, 1.0],
    "min": [-1.0, -3.0, 0.0],
    "max": [1.0, 3.0, 1.0],
    "mask": [True, True, False],
}


def frames(count=40, size=(20, 24)):
    rng = np.random.default_rng(0)
    for i in range(count):
        action = np.array([*rng.uniform(-1, 1, 2), i % 2], np.float32)
        images = {"primary": rng.integers(0, 256, (*size, 3), np.uint8)}
        yield offline.Frame(Observation(images, f"do thing {i % 3}"), action, "e", i)


class Oracle:
    """Answers with what was done, off by a known amount in dimension 1."""

    def __init__(self, known, offset=0.0):
        self.known = {frame.image.tobytes(): frame for frame in known}
        self.offset, self.batches = offset, []

    def predict_chunks(self, observations):
        self.batches.append((len(observations), {observation.unnorm_key for observation in observations}))
        found = [self.known[observation.images["primary"].tobytes()] for observation in observations]
        assert [frame.instruction for frame in found] == [observation.instruction for observation in observations]
        tokenizer = ActionTokenizer()
        normalized = np.stack([tokenizer.decode(tokenizer.encode(frame.action)) for frame in found])
        first = unnormalize_actions(normalized, ROW) + np.array([0, self.offset, 0])
        return np.stack([first, np.full_like(first, 9.0)], axis=1)


def test_an_oracle_is_right_everywhere_and_errors_are_in_the_dataset_s_units():
    rows = list(frames())
    exact = Oracle(rows)
    result = offline.compare(offline.predict(exact, rows, "arm"), rows, ROW, ActionSpec())
    assert result.accuracy == 1.0
    assert exact.batches == [(16, {"arm"}), (16, {"arm"}), (16, {"arm"})], "one shape for all batches"
    # Half a bin at most: bins are 2/255 wide in a range of 0.4, 4 and (normalised as it is) 2.
    assert (result.l1_by_dimension <= np.array([0.4, 4.0, 2.0]) / 255 / 2 + 1e-9).all()
    shifted = offline.compare(offline.predict(Oracle(rows, 0.5), rows, "arm"), rows, ROW, ActionSpec())
    assert shifted.accuracy_by_dimension.tolist() == [1.0, 0.0, 1.0]
    # The last bins are clipped into when they are normalised, not in physical units.
    assert shifted.l1_by_dimension[1] == pytest.approx(0.5, abs=0.01)
    table = offline.table({"arm": shifted})
    assert "| arm | 40 | all | 66.7% |" in table and "| arm | 40 | 1 | 0.0% |" in table


def test_token_bins_joins_the_two_ids_of_the_top_bin():
    values = np.array([1.0, 0.999, -1.0, 0.0])
    assert offline.token_bins(values, 256).tolist() == [254, 254, 0, 127]
    assert offline.token_bins(values, 128).tolist() == [126, 126, 0, 63]


def test_scatter_has_a_panel_per_dimension(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    rng = np.random.default_rng(0)
    sizes = []
    for dims in (3, 7):
        path = figures.action_scatter(rng.random((30, dims)), rng.random((30, dims)), tmp_path / f"{dims}.png", "arm")
        sizes.append(Image.open(path).size)
    assert sizes[0][0] * 4 == sizes[1][0] * 3 and sizes[1][1] == 2 * sizes[0][1]


def test_quantization_table_compares_with_the_first_row():
    first = quantization.Row("float32", 1000, 1.0, np.zeros(2), 0.010, None)
    second = quantization.Row("int8", 300, 0.98, np.array([0.01, 0.002]), 0.012, None)
    lines = quantization.table([first, second]).splitlines()
    assert lines[3] == "| int8 | 0.00 MB | 0.300x | 98.0% | 0.01 0.002 | 12.0 | - |"


def test_harness_conventions():
    seen = []

    class Policy:
        def __init__(self, rotation=0, **action):
            spec = ActionSpec(dim=3, horizon=3, executed=2, **action)
            self.contract = SimpleNamespace(observation=ObservationSpec(rotation=rotation), action=spec)

        def predict_chunk(self, observation):
            seen.append(observation)
            return np.array([[0.1, 0.2, 0.996], [0.3, 0.4, 0.004], [9.0, 9.0, 9.0]])

    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    policy = HarnessPolicy(Policy(rotation=180), "libero", gripper="libero")
    with pytest.raises(ValueError, match="reset"):
        policy.step(image)
    policy.reset("open the drawer")
    np.testing.assert_array_equal(policy.step(image), [0.1, 0.2, -1.0])
    np.testing.assert_array_equal(policy.step(image), [0.3, 0.4, 1.0])
    assert len(seen) == 1, "two actions of a chunk are executed"
    policy.step(image)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0].images["primary"], np.rot90(image, 2))
    assert (seen[0].instruction, seen[0].unnorm_key) == ("open the drawer", "libero")
    raw = HarnessPolicy(Policy(rotation=180), rotation=0)
    raw.reset("x")
    assert raw.step({"primary": image})[-1] == 0.996
    np.testing.assert_array_equal(seen[2].images["primary"], image)
    reversed_gripper = HarnessPolicy(Policy(gripper="closed"), gripper="libero")
    reversed_gripper.reset("x")
    assert reversed_gripper.step(image)[-1] == 1.0
    with pytest.raises(ValueError, match="nothing says what the policy's last dimension means"):
        HarnessPolicy(Policy(gripper=""), gripper="libero")
    with pytest.raises(ValueError, match="did you mean 'libero'"):
        HarnessPolicy(Policy(), gripper="libro")


def test_held_out_frames_are_the_dataset_s_own(shared, tmp_path, monkeypatch):
    tf = pytest.importorskip("tensorflow")
    from openvla_jax.data.rlds import dataset_statistics, make_dataset
    from openvla_jax.data.source import open_source

    data_dir = str(shared / "data")
    statistics = dataset_statistics(open_source("bridge_orig", data_dir), cache_dir=str(tmp_path))
    monkeypatch.setattr(offline, "POOL", 10**6)
    got = offline.held_out_frames("bridge_orig", data_dir, statistics, 5)
    trajectories = make_dataset(
        "bridge_orig", data_dir, "val", statistics=statistics, load_proprio=False, num_parallel_reads=1
    )
    everything = []
    for t in trajectories.as_numpy_iterator():
        columns = t["observation"]["image_primary"], t["task"]["language_instruction"], t["action"]
        everything += [(image, text.decode(), action) for image, text, action in zip(*columns, strict=True)]
    labelled = [row for row in everything if row[1].strip()]
    chosen = [labelled[round(i)] for i in np.linspace(0, len(labelled) - 1, 5)]
    assert len(got) == 5 and len(labelled) > 20
    for frame, (encoded, text, action) in zip(got, chosen, strict=True):
        np.testing.assert_array_equal(frame.image, tf.io.decode_image(encoded).numpy())
        assert frame.instruction == text
        np.testing.assert_array_equal(frame.action, action)


def test_offline_command_writes_its_report(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    rows = list(frames())
    info = {
        "action": {"bins": 256, "dim": 3},
        "observation": {},
        "statistics": {"arm": {"action": ROW}},
        "training": {},
    }
    monkeypatch.setattr(evaluate, "open_policy", lambda args: (Oracle(rows), info))
    monkeypatch.setattr(offline, "held_out_frames", lambda *args, **specs: rows)
    evaluate.main(["offline", "--url", "http://robot:8000", "--data_dir", "D", "--out", str(tmp_path / "out")])
    assert "| arm | 40 | all | 100.0% |" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "offline.json").read_text())
    assert summary["arm"]["accuracy"] == 1.0 and len(summary["arm"]["l1_by_dimension"]) == 3
    assert "(arm.png)" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["offline", "--out", "o"], "give --checkpoint or --url"),
        (["offline", "--checkpoint", "/nowhere", "--out", "o"], "checkpoint /nowhere does not exist"),
        (["rollout", "--url", "robot", "--out", "o"], "url 'robot': give http://HOST:PORT"),
        (["rollout", "--url", "http://127.0.0.1:9", "--out", "o"], "does not answer"),
        (["quantization", "--checkpoint", "/nowhere", "--kinds", "int5"], "unknown quantisation 'int5'"),
    ],
)
def test_wrong_command_lines_say_so_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error.splitlines()[-1]


def test_unknown_datasets_are_named():
    args = argparse.Namespace(data_dir="D", datasets=["bridge"], frames=1, split="val")
    info = {"training": {}, "statistics": {"bridge_orig": {}}}
    with pytest.raises(ValueError, match="no statistics of 'bridge'; did you mean 'bridge_orig'"):
        evaluate.read_frames(args, info)
