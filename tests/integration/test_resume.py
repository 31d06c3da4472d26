"""Train, kill -9, run again: the curve is the uninterrupted run's. Through the command line, in processes of their
own.
"""

import json
import os
import signal
import subprocess
import sys
import time

import one_tower
import pytest
from conftest import ROOT, xla_flags

from openvla_jax.checkpoint.reading import steps_in
from openvla_jax.sim.dataset import write_dataset
from openvla_jax.training import loop

STEPS = {1: 24, 8: 12}  # by devices: eight of them take longer than one


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_dataset(directory, episodes=12)
    return directory


def start(workdir, data_dir, devices, *overrides):
    command = [
        sys.executable, "train.py", "--config", "tests/integration/one_tower.py", "--workdir", str(workdir),
        f"--config.data.data_dir={data_dir}", f"--config.train.steps={STEPS[devices]}",
        "--config.train.checkpoint_every=6", "--config.train.eval_every=12", *overrides,
    ]  # fmt: skip
    env = os.environ | {"XLA_FLAGS": xla_flags(devices)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def curve(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    keep = ("train/loss", "train/grad_norm", "train/action_accuracy", "val/loss")
    return [{"step": line["step"]} | {key: line[key] for key in keep if key in line} for line in lines]


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 8])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, data_dir, devices):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, data_dir, devices))

    process = start(killed, data_dir, devices)
    metrics = killed / "metrics.jsonl"
    deadline = time.time() + 600
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 7 and steps_in(killed / "checkpoints"):
            break
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0][-3000:]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    saved = steps_in(killed / "checkpoints")[-1]
    assert saved < STEPS[devices]

    output = finish(start(killed, data_dir, devices))
    assert f"resumed from step {saved}" in output
    assert curve(killed) == curve(whole)
    assert [line["step"] for line in curve(whole) if "train/loss" in line] == list(range(1, STEPS[devices] + 1))


@pytest.mark.slow
@pytest.mark.long
def test_sigterm_saves_and_another_config_is_refused(tmp_path, data_dir):
    workdir = tmp_path / "run"
    process = start(workdir, data_dir, 1, "--config.train.steps=100000", "--config.train.checkpoint_every=50000")
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 143, output[-3000:]
    assert len(steps_in(workdir / "checkpoints")) == 1

    config = one_tower.get_config()
    config.data.data_dir, config.seed = str(data_dir), 8
    with pytest.raises(ValueError, match="seed was 7, is 8") as caught:
        loop.run(config, workdir)
    assert "\n" not in str(caught.value)
