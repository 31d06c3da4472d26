"""The report of one run: what it tells of a run with, and without, a checkpoint."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from openvla_jax import evaluate
from openvla_jax.checkpoint.contract import Contract
from openvla_jax.config import model_config
from openvla_jax.evaluation import offline, run_report
from openvla_jax.inference.policy import Policy
from openvla_jax.models.openvla import count_parameters
from openvla_jax.tokens.actions import ActionTokenizer

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


def test_a_run_with_a_checkpoint(workdir, monkeypatch):
    model = model_config({"preset": "tiny", "base_vocab_size": 700})
    contract = Contract(model, None, STATISTICS, training=CONFIG)
    monkeypatch.setattr(run_report, "steps_in", lambda folder: [20])
    monkeypatch.setattr(run_report, "load_contract", lambda folder: contract)
    monkeypatch.setattr(run_report, "open_checkpoint", lambda folder: folder / "checkpoints" / "20")
    (workdir / "checkpoints" / "20").mkdir(parents=True)
    (workdir / "checkpoints" / "20" / "file").write_bytes(b"x" * 2_000_000)
    image = np.full((4, 4, 3), 200, np.uint8)
    seen = offline.Frame(image, "open <the> drawer", np.array([0.5, -0.5, 1.0], np.float32), "e", 3)
    asked = []

    class Fixed:
        action_tokenizer = ActionTokenizer()

        def predict_actions(self, images, instructions, unnorm_keys):
            asked.extend(unnorm_keys)
            return np.tile([0.5, 1.0, 0.996], (len(images), 1))

    monkeypatch.setattr(Policy, "from_checkpoint", lambda path, check_images: Fixed())
    monkeypatch.setattr(offline, "held_out_frames", lambda name, data_dir, statistics, count, module: [seen] * count)
    page = run_report.write_report(workdir, frames=2).read_text()
    assert f"{count_parameters(model):,} parameters" in page
    # bridge_rt_1 weighs both datasets 1.0, so frames are drawn by size.
    assert cells(page, "bridge_orig") == ["1", "100", "3,000", "75.0%", "0.45", "-"]
    assert cells(page, "20") == ["2.0", "0.1", "0.5"]
    assert "Not shown" not in page, page[page.index("Not shown") :][:200]
    assert set(asked) == set(STATISTICS) and page.count("open &lt;the&gt; drawer</b> (step 3)") == 4
    assert re.findall(r"<td>done</td><td>(.*?)</td><td>(.*?)</td>", page)[0] == ("0.500", "-1.000")
    assert re.findall(r"<td>predicted</td><td>(.*?)</td><td>(.*?)</td>", page)[0] == ("0.500", "1.000")

    def missing(*_, module):
        raise FileNotFoundError("no D here")

    monkeypatch.setattr(offline, "held_out_frames", missing)
    assert "Not shown: no D here" in run_report.write_report(workdir).read_text()


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
