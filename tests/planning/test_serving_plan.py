"""Serving planned for TPU slices: a tiny model compiled for real by the TPU compiler, and what is refused."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from openvla_jax import serve
from openvla_jax.config import tiny
from openvla_jax.models.openvla import count_parameters


@pytest.mark.tpu_aot
@pytest.mark.long
def test_a_tiny_policy_is_planned_by_the_tpu_compiler(tmp_path):
    pytest.importorskip("libtpu")
    out = tmp_path / "plan.json"
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "openvla_jax.serve", "--plan_model", "tiny", "--plan", "v5e:2x2"]
    command += ["--plan_out", str(out)]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    (entry,) = json.loads(out.read_text())["entries"]
    assert (entry["topology"], entry["chips"], entry["weights"], entry["fits"]) == ("v5e:2x2", 4, "bfloat16", True)
    # Kernels and tables are split over the chips, norms and positions are not.
    whole = 2 * count_parameters(tiny())
    assert whole / 4 < entry["weight_bytes"] < whole / 3
    assert entry["weight_bytes"] < entry["hbm_peak_bytes"] < 2**30
    stages = entry["stages"]
    assert {name: stage["times"] for name, stage in stages.items()} == {"vision": 1, "prefill": 1, "decode step": 6}
    parts = sum(stage["times"] * stage["seconds"] for stage in stages.values())
    assert all(stage["seconds"] > 0 for stage in stages.values())
    assert entry["seconds"] == pytest.approx(parts, rel=0.3)
    assert entry["seconds"] > entry["read_seconds"] + entry["products_seconds"] > entry["read_seconds"] > 0
    assert "v5e:2x2: 4 chips, batch 1, bfloat16 weights" in result.stdout and "Estimates, not meas" in result.stdout


CHUNKS = """
from configs.common import base

def get_config(head):
    config = base()
    config.model = {"preset": "tiny"}
    config.observation.cameras = ("primary", "wrist")
    config.observation.state = ("x", "y", "z")
    config.action.update(head=head, horizon=4, executed=4, denoising_steps=3)
    config.film = head == "diffusion"
    return config
"""


@pytest.mark.tpu_aot
@pytest.mark.long
@pytest.mark.parametrize(("head", "passes"), [("l1", 1), ("diffusion", 3)])
def test_a_policy_that_predicts_chunks_is_planned_from_its_training_config(head, passes, tmp_path):
    pytest.importorskip("libtpu")
    out, config = tmp_path / "plan.json", tmp_path / "chunks.py"
    config.write_text(CHUNKS)
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "openvla_jax.serve", "--plan_config", f"{config}:{head}", "--plan", "v5e:2x2"]
    result = subprocess.run(
        [*command, "--plan_out", str(out)], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (entry,) = json.loads(out.read_text())["entries"]
    assert entry["horizon"] == 4 and entry["fits"]
    assert {name: stage["times"] for name, stage in entry["stages"].items()} == {"vision": 1, "language model": passes}
    assert f"planning one chunk of 4 actions (head {head})" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "v5e:2x2,v9:4x4"], "unknown TPU 'v9'"),
        (["--plan", "v5e:4x4"], "16 chips do not divide the 4 heads of dino"),
        (["--plan", "v5e:2x2*2"], "one action is decoded within one slice"),
        (["--plan", "v5e:2x2", "--plan_batch", "0"], "--plan_batch 0"),
        (["--plan", "v5e:2x2", "--checkpoint", "/nowhere"], "/nowhere does not exist"),
        (["--plan", "v5e:2x2", "--plan_config", "nothing"], "config file nothing does not exist"),
        ([], "give --checkpoint DIR, or --plan SLICES"),
    ],
)
def test_bad_plans_are_told_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # a plan's settings are for its own process
    with pytest.raises(SystemExit) as caught:
        serve.main(["--plan_model", "tiny", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error.splitlines()[-1]
