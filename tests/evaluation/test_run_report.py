"""The report of one run: what it tells of a run with, and without, a checkpoint."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("matplotlib")

from openvla_jax import evaluate
from openvla_jax.checkpoint.reading import load_contract
from openvla_jax.evaluation import run_report
from openvla_jax.inference.policy import Policy
from openvla_jax.models.openvla import count_parameters
from openvla_jax.sim import dataset

ACTION = {
    "q01": [-1.0, -2.0, 0.0],
    "q99": [1.0, 2.0, 1.0],
    "min": [-1.0] * 3,
    "max": [1.0] * 3,
    "mask": [True, True, False],
}
CONFIG = {
    "seed": 7,
    "init_from": "",
    "data": {"dataset": "bridge_rt_1", "data_dir": "D"},
    "train": {"batch_size": 4, "accumulation": 1, "steps": 40},
    "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
}
STATISTICS = {
    "bridge_orig": {"action": ACTION, "num_transitions": 3000, "num_trajectories": 100},
    "fractal20220817_data": {"action": ACTION, "num_transitions": 1000, "num_trajectories": 20},
}


@pytest.fixture
def workdir(tmp_path):
    rows = []
    for step in (10, 20):
        row = {"step": step, "time": 100.0 + step, "train/loss": 1 / step, "train/learning_rate": 1e-3}
        row |= {f"train/{name}/action_accuracy": 0.25 + step / 100 for name in STATISTICS}
        row |= {"train/examples_per_second": 50.0, "train/resident_memory_gb": 2.5 - step / 20}
        rows += [row, {"step": step, "time": 101.0 + step, "val/loss": 2 / step, "val/action_accuracy": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def cells(page, first):
    """The other cells of the table row that starts with `first`."""
    (row,) = re.findall(rf"<tr><td>{re.escape(first)}</td>(.*?)</tr>", page)
    return re.findall(r"<td>(.*?)</td>", row)


def test_a_run_without_a_checkpoint(workdir, capsys):
    evaluate.main(["report", str(workdir)])
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    page = (workdir / "report.html").read_text()
    assert cells(page, "step")[0].startswith("20 of 40, 0m11s")
    assert cells(page, "loss") == ["train 0.05, val 0.1"]
    assert cells(page, "first process on its host, at most") == ["2.00"]
    assert cells(page, "fullest device of the first process, at most") == ["not recorded"]
    assert "there is no checkpoint yet" in page
    sources = re.findall(r'(?:src|href)="([^"]{22})', page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64") for source in sources)


def test_mixture_draws_frames_by_size():
    """bridge_rt_1 weighs both datasets 1.0."""
    metrics = [{"train/bridge_orig/action_accuracy": 0.45}]
    rows = run_report.mixture(CONFIG, metrics, STATISTICS)
    assert rows[1] == ("bridge_orig", "1", "100", "3,000", "75.0%", "0.45", "-")
    assert rows[2][:5] == ("fractal20220817_data", "1", "20", "1,000", "25.0%")


def test_report_shows_what_a_checkpoint_predicts_on_held_out_frames(tmp_path, monkeypatch):
    """Of a real run; its held-out frames are written by the simulator, which says here what was done in them."""
    shutil.copytree(ROOT / "tests" / "data" / "checkpoint_v1", tmp_path / "v1")
    monkeypatch.chdir(tmp_path / "v1")
    page = run_report.write_report("run", frames=2).read_text()
    contract = load_contract("run")
    assert f"{count_parameters(contract.model):,} parameters" in page
    assert cells(page, "tabletop")[1:4] == ["3", "25", "100.0%"]
    size = sum(path.stat().st_size for path in Path("run/checkpoints/4").rglob("*") if path.is_file())
    assert cells(page, "4") == [f"{size / 1e6:,.1f}", "-", "-"]
    assert "Not shown" not in page, page[page.index("Not shown") :][:200]

    instruction, steps = dataset.expert_episode(dataset.FIRST_SEED["val"], noise=0.02)
    policy = Policy.from_checkpoint("run", check_images=False)
    shown = [int(step) for step in re.findall(rf"{instruction}</b> \(step (\d+)\)", page)]
    assert len(set(shown)) == 2
    bounds = contract.statistics["tabletop"]["action"]  # training clips actions to them, but not the gripper's
    low, high = np.array([*bounds["q01"][:6], 0.0]), np.array([*bounds["q99"][:6], 1.0])
    for kind, actions in (
        ("done", [np.clip(steps[step]["action"], low, high) for step in shown]),
        ("predicted", [policy.predict_action(steps[step]["image"], instruction) for step in shown]),
    ):
        rows = re.findall(rf"<tr><td>{kind}</td>(.*?)</tr>", page)
        found = [[float(cell) for cell in re.findall(r"<td>(.*?)</td>", row)] for row in rows]
        np.testing.assert_allclose(found, actions, rtol=0, atol=6e-4)

    shutil.rmtree("data")
    assert "Not shown: " in run_report.write_report("run").read_text()


def test_what_is_no_run_is_told_in_one_line(tmp_path, capsys):
    for content, message in (
        (None, "holds no training run (config.json and metrics.jsonl missing)"),
        ("", "no metrics"),
    ):
        if content is not None:
            (tmp_path / "config.json").write_text("{}")
            (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(SystemExit) as caught:
            evaluate.main(["report", str(tmp_path)])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and message in error and error.count("\n") == 1
