import itertools
import math

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from openvla_jax.config import model_config
from openvla_jax.models.tuning import count_trainable
from openvla_jax.settings import Settings
from openvla_jax.sweep import axis, chain, log_spaced, product, seeds, zipped
from openvla_jax.sweep.points import SweepError, apply, load_config, load_sweep
from openvla_jax.train import parse
from openvla_jax.training.step import make_tuning

LR, STEPS = "optimizer.learning_rate", "train.steps"


def sweep(tmp_path, points, base="configs/debug.py"):
    path = tmp_path / "sweep.py"
    path.write_text(f"from math import nan\nimport numpy as np\ndef get_sweep():\n    return {base!r}, {points}\n")
    return path


def test_composition():
    rates, steps = axis(LR, [1e-4, 1e-3]), axis(STEPS, [5, 6])
    assert product(rates, steps) == [{LR: a, STEPS: b} for a in (1e-4, 1e-3) for b in (5, 6)]
    assert zipped(rates, steps) == [{LR: 1e-4, STEPS: 5}, {LR: 1e-3, STEPS: 6}]
    assert chain(rates, steps) == rates + steps
    assert seeds(2, first=4) == [{"seed": 4}, {"seed": 5}]
    with pytest.raises(SweepError, match="2, 1 points"):
        zipped(rates, steps[:1])
    with pytest.raises(SweepError, match=f"two axes set {LR}"):
        product(rates, rates)


@given(st.floats(1e-8, 1e8), st.floats(1e-8, 1e8), st.integers(2, 30))
def test_log_spaced_values_have_equal_ratios(low, high, count):
    values = log_spaced(low, high, count)
    assert len(values) == count
    assert values[0] == pytest.approx(low, rel=1e-3) and values[-1] == pytest.approx(high, rel=1e-3)
    steps = [math.log(b / a) for a, b in itertools.pairwise(values)]
    assert max(steps) - min(steps) < 2.1e-3  # four digits


def test_points_become_directories_and_commands(tmp_path):
    file = sweep(
        tmp_path, [{LR: 1e-4, "model.preset": "tiny"}, {"optimizer": {"learning_rate": 1}, "augment.hue": 0.1}]
    )
    first, second = load_sweep(file, ["train.steps=12", f"{LR}=3"])
    assert (first.name, second.name) == ("learning_rate=0.0001,preset=tiny", "learning_rate=1,hue=0.1")
    assert first.steps == second.steps == 12
    assert first.arguments("W/x") == [
        "-m", "openvla_jax", "train", "--config", "configs/debug.py", "--workdir", "W/x",
        "--config.train.steps=12", "--config.optimizer.learning_rate=0.0001", "--config.model.preset=tiny",
    ]  # fmt: skip


def test_the_commands_say_what_was_checked(tmp_path):
    """The flags of a point, read by the training command, give the overrides back, type and all."""
    overrides = {
        "augment.contrast": (0.5, 1.5),
        "augment.enabled": True,
        "data.statistics": "s.json",
        LR: 1e-5,
        "seed": 3,
    }
    (point,) = load_sweep(sweep(tmp_path, [overrides]))
    options, config = parse(point.arguments("W")[3:], "train")
    assert options.workdir == "W"
    for key, value in overrides.items():
        found = config
        for part in key.split("."):
            found = found[part]
        assert found == value and type(found) is type(value)


def test_runs_that_log_to_wandb_are_grouped(tmp_path):
    path = sweep(tmp_path, [{"seed": 1}, {"seed": 2, "wandb.group": "mine"}])
    assert [p.overrides.get("wandb.group") for p in load_sweep(path, group="s")] == [None, "mine"]
    points = load_sweep(path, ["wandb.project=P"], group="s")
    assert [p.overrides["wandb.group"] for p in points] == ["s", "mine"]
    assert "--config.wandb.group=s" in points[0].arguments("W")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "sweeps").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_shipped_sweeps_have_models_that_can_be_built(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    points = load_sweep(path, ["init_from=runs/demo"] if path.stem == "tuning" else [])
    assert len(points) > 1
    for point in points:
        config = apply(load_config(point.config), point.overrides, point.name)
        model = model_config(config.model.to_dict() if config.model.preset else {"preset": "tiny"})  # of `init_from`
        assert model.patches > 0 and count_trainable(model, make_tuning(Settings.from_dict(config.to_dict())))


def test_another_base_for_some_points(tmp_path):
    path = sweep(tmp_path, [{}, {"config": "configs/finetune/full.py"}])
    points = load_sweep(path, ["init_from=runs/demo"])
    assert points[0].name == "base" and points[1].name == "config=configs_finetune_full.py"
    assert points[1].arguments("W")[4] == "configs/finetune/full.py"
    with pytest.raises(SweepError, match=r"point 1 .*fine-tuning starts from a checkpoint: give --set init_from"):
        load_sweep(path)


def test_an_argument_of_the_config_is_passed_on(tmp_path):
    (tmp_path / "c.py").write_text(
        "from configs.debug import get_config as debug\n"
        "def get_config(steps):\n    config = debug()\n    config.train.steps = int(steps)\n    return config\n"
    )
    assert load_config(f"{tmp_path}/c.py:77").train.steps == 77


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("[]", "has no points"),
        (f"[{{'{LR}': 1e-4}}, {{'{LR}': 1e-4}}]", r"point 1 \(learning_rate=0.0001\) is there twice"),
        ("[{'optimizer.learning_rat': 1e-4}]", "did you mean 'optimizer.learning_rate'"),
        ("[{'optimiser.learning_rate': 1e-4}]", "did you mean 'optimizer'"),
        ("[{'seed.x': 1}]", "has no 'seed.x'"),
        (f"[{{'{LR}': 'fast'}}]", r"learning_rate is float \(0.001\), not str \('fast'\)"),
        ("[{'train.steps': 1.5}]", r"train.steps is int \(40\), not float"),
        ("[{'train.steps': True}]", "not bool"),
        ("[{'augment.enabled': 1}]", "is bool"),
        ("[{'model': 3}]", "'model' is a group of settings"),
        ("[{'seed': None}]", "give a number"),
        ("[3]", "give a dict"),
        ("{'seed': 1}", "must return"),
        ("3", "must return|not iterable"),
    ],
)
def test_bad_sweeps_are_told_in_one_line(tmp_path, points, message):
    with pytest.raises(SweepError, match=message) as caught:
        load_sweep(sweep(tmp_path, points))
    assert "\n" not in str(caught.value)


def test_missing_files_are_told(tmp_path):
    with pytest.raises(SweepError, match=r"no\.py does not exist"):
        load_sweep(tmp_path / "no.py")
    with pytest.raises(SweepError, match=r"config file configs/no\.py does not exist"):
        load_sweep(sweep(tmp_path, [{"seed": 1}], base="configs/no.py"))
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(SweepError, match="has no function get_sweep"):
        load_sweep(tmp_path / "empty.py")
    with pytest.raises(SweepError, match=r"train\.steps is int"):
        load_sweep(sweep(tmp_path, [{"seed": 1}]), ["train.steps=many"])
