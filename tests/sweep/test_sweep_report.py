import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from openvla_jax.evaluation.rollouts import wilson_interval
from openvla_jax.sweep import report, rollouts
from openvla_jax.sweep.__main__ import main
from openvla_jax.sweep.points import SweepError

LR = "optimizer.learning_rate"
METRIC = "val/action_accuracy"


def make(workdir, points):
    """A sweep's files: `points` maps name -> (overrides, value of the metric or None for one that has not begun)."""
    record = {name: {"config": "c.py", "overrides": overrides} for name, (overrides, _) in points.items()}
    workdir.mkdir()
    (workdir / "sweep.json").write_text(json.dumps({"points": record}))
    for name, (_, value) in points.items():
        if value is not None:
            (workdir / name).mkdir()
            rows = [{"step": s, "train/loss": 1 / s} for s in (1, 2)] + [{"step": 2, METRIC: value}]
            (workdir / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def test_best_intervals_and_csv(tmp_path):
    values = {1e-4: (0.5, 0.6, 0.55), 1e-2: (0.8, 0.9, None)}
    points = {f"lr={lr},seed={s}": ({LR: lr, "seed": s}, v) for lr, row in values.items() for s, v in enumerate(row)}
    workdir = make(tmp_path / "s", points)
    paths = report.write_report(workdir, METRIC, lower=False)
    assert [path.name for path in paths] == ["report.html", "report.md", "results.csv", "curves.png", "effect.png"]

    lines = (workdir / "report.md").read_text().splitlines()
    assert "5 of 6 points have it so far." in lines
    half = stats.t.ppf(0.975, 2) * stats.sem(values[1e-4])
    assert f"| 0.0001 | 0.55 | {0.55 - half:.3g} to {0.55 + half:.3g} | 3 of 3 |" in lines
    half = stats.t.ppf(0.975, 1) * stats.sem(values[1e-2][:2])
    assert f"| 0.01 | **0.85** | {0.85 - half:.3g} to {0.85 + half:.3g} | 2 of 3 |" in lines

    rows = list(csv.DictReader(io.StringIO((workdir / "results.csv").read_text())))
    assert len(rows) == 6
    assert rows[3] == {
        "point": "lr=0.01,seed=0",
        LR: "0.01",
        "seed": "0",
        "step": "2",
        "train/loss": "0.5",
        METRIC: "0.8",
    }
    assert rows[5][METRIC] == "" and rows[5]["step"] == "0"


def test_success_in_closed_loop_is_a_metric(tmp_path, monkeypatch, capsys):
    """Measured once for each checkpoint; a single seed shows the interval of its scenes."""
    workdir = make(tmp_path / "s", {"a": ({LR: 1e-4}, 0.5), "b": ({LR: 1e-3}, 0.4), "c": ({LR: 1e-2}, None)})
    for name, step in (("a", 2), ("b", 2)):
        (workdir / name / "checkpoints" / str(step)).mkdir(parents=True)
    asked = []

    def success(checkpoint, episodes, world):
        asked.append(checkpoint.name)
        wins = {"a": 3, "b": 9}[checkpoint.name]
        return wins / episodes, wilson_interval(wins, episodes)

    monkeypatch.setattr(rollouts, "_success", success)
    assert main(["report", str(workdir), "--rollouts", "10"]) == 0
    assert "b: 90.0% of 10 scenes at step 2" in capsys.readouterr().out
    low, high = wilson_interval(9, 10)
    lines = (workdir / "report.md").read_text().splitlines()
    assert f"| 0.001 | **0.9** | {low:.3g} to {high:.3g} |" in lines and "| 0.01 | - | - |" in lines
    assert main(["report", str(workdir), "--rollouts", "10"]) == 0
    assert asked == ["a", "b"]
    (workdir / "a" / "checkpoints" / "3").mkdir()
    assert main(["report", str(workdir), "--rollouts", "10"]) == 0
    assert asked == ["a", "b", "a"]
    assert main(["report", str(workdir), "--rollouts", "10", "--world", "changed"]) == 0
    assert asked == ["a", "b", "a", "a", "b"]
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(workdir), "--rollouts", "0"])


def test_settings_that_change_together_are_one_axis(tmp_path):
    points = {f"p{s}": ({"towers.a.size": s, "towers.b.size": s, "seed": k}, s / 100) for k, s in ((0, 24), (1, 48))}
    workdir = make(tmp_path / "s", points)
    assert "effect.png" in [path.name for path in report.write_report(workdir, METRIC, lower=False)]
    assert "| 48 | **0.48** |" in (workdir / "report.md").read_text().splitlines()


def test_lower_is_better_for_losses(tmp_path):
    workdir = make(tmp_path / "s", {"a": ({LR: 1e-4}, 0.5), "b": ({LR: 1e-3}, 0.4)})
    report.write_report(workdir, METRIC, lower=True)
    assert "| 0.001 | **0.4** |" in (workdir / "report.md").read_text()


def test_the_page_needs_nothing_else(tmp_path):
    workdir = make(tmp_path / "s", {"<b>": ({LR: 1e-4, "x": "<script>"}, 0.5), "b": ({LR: 1e-3, "x": "q"}, 0.4)})
    report.write_report(workdir, METRIC, lower=False)
    page = (workdir / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    sources = re.findall(r'(?:src|href)="([^"]{22})', page)
    assert sources and all(source.startswith("data:image/png;base64") for source in sources)


def test_two_axes_give_a_heat_map_of_all_cells(tmp_path):
    grid = {(lr, width): lr * 100 + width for lr in (0.1, 0.2) for width in (1, 2, 3)}
    workdir = make(tmp_path / "s", {f"{k}": ({LR: k[0], "w": k[1]}, v) for k, v in grid.items()})
    assert "heat_map.png" in [path.name for path in report.write_report(workdir, METRIC, lower=False)]
    image = np.asarray(Image.open(workdir / "heat_map.png").convert("RGB"))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 6
    holes = make(tmp_path / "t", {f"{k}": ({LR: k[0], "w": k[1]}, v) for k, v in list(grid.items())[:5]})
    assert "heat_map.png" not in [path.name for path in report.write_report(holes, METRIC, lower=False)]


def test_settings_that_are_no_numbers(tmp_path):
    workdir = make(
        tmp_path / "s", {"a": ({"model.preset": "tiny"}, 0.5), "b": ({}, 0.4), "c": ({"model.preset": "x"}, None)}
    )
    report.write_report(workdir, METRIC, lower=False)
    lines = (workdir / "report.md").read_text().splitlines()
    assert "| tiny | **0.5** |" in lines and "| base | 0.4 |" in lines and "| x | - |" in lines


def test_what_is_not_there_is_told(tmp_path):
    workdir = make(tmp_path / "s", {"a": ({LR: 1e-4}, 0.5)})
    with pytest.raises(SweepError, match=f"no point has 'val/los' yet; there are train/loss, {METRIC}"):
        report.write_report(workdir, "val/los", lower=True)
    with pytest.raises(SweepError, match="holds no sweep"):
        report.write_report(tmp_path, METRIC, lower=True)
    with pytest.raises(SweepError, match="no point has metrics yet"):
        report.write_report(make(tmp_path / "t", {"a": ({LR: 1e-4}, None)}), METRIC, lower=True)
