"""Bad input on the command line: one line on stderr, exit code 2, no directory left behind."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from configs import debug
from openvla_jax.sim.dataset import write_dataset
from openvla_jax.training import loop


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    write_dataset(directory, episodes=3)
    return directory


def run(script, *arguments):
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.preset": "openvla-7"}, "did you mean 'openvla-7b'"),
        ({"data.dataset": "tabletopp"}, "'tabletop'"),
        ({"train.batch_size": 12, "train.accumulation": 2}, "nearest that is: 16"),
        ({"mesh.fsdp": 3}, "does not fit 8 devices"),
        ({"data.resume": "maybe"}, "one of auto, exact, reseed"),
        ({"train.remat": "some"}, "unknown remat policy 'some'"),
        ({"optimizer.schedule": "linear"}, "one of constant, cosine"),
        ({"init_from": "/does/not/exist"}, "/does/not/exist does not exist"),
        ({"tokenizer": "/does/not/exist"}, "/does/not/exist"),
        ({"data.data_dir": "/does/not/exist"}, "/does/not/exist"),
        ({"data.text_length": 9}, "text_length"),
    ],
)
def test_bad_settings_stop_before_anything_is_written(tmp_path, data_dir, settings, message):
    config = debug.get_config()
    config.update_from_flattened_dict({"data.data_dir": str(data_dir)} | settings)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        loop.run(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [("--config.trian.steps=3", "train"), ("--config.train.steps=many", "many"), ("--config.mesh.fsdp=3", "1 devices")],
)
def test_the_command_prints_one_line(tmp_path, data_dir, override, message):
    arguments = [
        "--config",
        "configs/debug.py",
        "--workdir",
        str(tmp_path / "run"),
        f"--config.data.data_dir={data_dir}",
    ]
    result = run("train.py", *arguments, override)
    assert result.returncode == 2, result.stderr[-2000:]
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr[-2000:]
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_missing_config_file():
    result = run("train.py", "--config", "configs/no_such.py", "--workdir", "unused")
    assert result.returncode == 2
    assert "no_such.py" in result.stderr.splitlines()[-1]


def test_finetuning_needs_a_checkpoint():
    result = run("finetune.py", "--config", "configs/finetune/full.py", "--workdir", "unused")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: fine-tuning starts from a checkpoint: give --config.init_from=DIR"
