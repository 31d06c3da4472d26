"""The command line: one line and exit code 2 for bad input, configs by name, and imports among config files."""

import subprocess
import sys
import tempfile

import jax
import pytest
from conftest import ROOT

import configs.debug
from openvla_jax import cli, config_files
from openvla_jax.__main__ import COMMANDS, RESERVED, main
from openvla_jax.errors import InputError
from openvla_jax.train import load_config, parse, plan


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("two\n  lines"), "error: two lines"),
        (InputError.of("x.json", "is empty", "download it again"), "error: x.json: is empty; download it again"),
        (ModuleNotFoundError("No module named 'av'", name="av"),
         "error: No module named 'av'; pip install 'openvla_jax[lerobot]'"),
        (FileNotFoundError(2, "No such file or directory", "x.json"),
         "error: [Errno 2] No such file or directory: 'x.json'"),
        (OSError(28, "No space left on device", "x.json"), "error: [Errno 28] No space left on device: 'x.json'"),
        (MemoryError("of the host"),
         "error: out of memory (of the host): take a smaller batch, lower precision, or a machine with more"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 9GiB\nBT: 1"),
         "error: out of memory (RESOURCE_EXHAUSTED: Failed to allocate request for 9GiB): take a smaller batch, lower "
         "precision, or a machine with more"),
    ],
)  # fmt: skip
def test_command_reports_user_errors_in_one_line(error, line, monkeypatch, capsys):
    def run(arguments):
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.command(run)([])
    assert (caught.value.code, capsys.readouterr().err) == (2, f"{line}\n")
    monkeypatch.setenv("OPENVLA_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        cli.command(run)([])
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and printed.endswith(f"{line}\n")


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), TypeError("x"), RuntimeError("two\nlines")])
def test_command_calls_other_errors_bugs_and_keeps_their_traceback(error, monkeypatch, capsys, tmp_path):
    def run(arguments):
        raise error

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cli.command(run)([]) == 1
    printed = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    text = " ".join(str(error).split())
    assert printed == (
        f"error: this is a bug in openvla_jax: {type(error).__name__}: {text}; its traceback is in {file}: please "
        "report it\n"
    )
    assert file.read_text().startswith("Traceback") and "raise error" in file.read_text()


def test_command_prints_the_traceback_of_a_bug_if_no_file_can_be_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert cli.command(lambda arguments: 1 // 0)([]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and "its traceback is above" in printed.splitlines()[-1]


def test_command_returns_the_exit_code():
    def stopped(arguments):
        raise KeyboardInterrupt

    assert cli.command(lambda arguments: None)(["x"]) == 0
    assert cli.command(lambda arguments: len(arguments))(["x"]) == 1
    assert cli.command(stopped)([]) == 130


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        *(([name], f"`openvla {name}` is not in this version yet; ") for name in RESERVED),
        (["train", "--config", "tabletop"], "give --workdir DIR"),
        (["train", "--config", "tabletopp", "--workdir", "W"], "did you mean 'tabletop'?"),
        (["train", "--conf", "tabletop", "--workdir", "W"], "the following arguments are required: --config"),
        (
            ["train", "--config", "tabletop", "--workdir", "W", "--config.trian.steps=3"],
            "has no setting 'trian'; did you mean 'train'?",
        ),
        (["train", "--config", "tabletop", "--workdir", "W", "--steps=3"], "unknown flag --steps=3"),
        (["train", "--config", "tabletop", "--workdir", "W", "3"], "unknown argument 3"),
        (["train", "--config", "openvla_7b:v5", "--workdir", "W"], "error: unknown slice 'v5': one of v4-128"),
        (["finetune", "--config", "finetune/lora", "--workdir", "W"], "fine-tuning starts from a checkpoint"),
        (["plan", "--config", "openvla_7b"], "no TPU slice to plan for"),
        (["data", "inspect", "bridge_orig"], "--data_dir is required"),
        (["sweep", "--sweep", "sweeps/rl", "--workdir", "W"], "did you mean 'sweeps/lr'?"),
        (["serve"], "give --checkpoint DIR"),
    ],
)
def test_main_reports_bad_arguments_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert message in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert "usage: openvla" in capsys.readouterr().out
    assert name in sys.modules["openvla_jax.__main__"].__doc__


def test_plan_is_training_planned(monkeypatch):
    seen = []
    monkeypatch.setattr("openvla_jax.train._plan", lambda config, *rest: seen.append((config.train.steps, *rest)) or 1)
    arguments = ["v5p:4x4x4,v5e:2x2", "--config", "tabletop", "--config.train.steps=7", "--plan_out", "p.json"]
    assert plan(arguments) == 1
    assert seen == [(7, ["v5p:4x4x4", "v5e:2x2"], "p.json", False)]


def test_a_config_has_a_path_and_a_name(monkeypatch, tmp_path):
    by_path = parse(["--config", "configs/openvla_7b.py:v5e-64", "--workdir", "W"], "train")[1]
    monkeypatch.chdir(tmp_path)  # outside the checkout
    for name in ("openvla_7b:v5e-64", "configs/openvla_7b.py:v5e-64", f"{ROOT}/configs/openvla_7b.py:v5e-64"):
        assert load_config(name, []).to_dict() == by_path.to_dict()
    assert by_path.mesh.data == 2 and by_path.is_locked
    assert load_config("finetune/tabletop:scratch", ["--config.train.steps=3"]).train.steps == 3


def test_a_file_of_ones_own_comes_before_the_packages(monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("from configs.debug import get_config as debug\nSTEPS = 3\n"
                                                  "def get_config():\n    return debug()\n")  # fmt: skip
    (tmp_path / "configs" / "longer.py").write_text(
        "def get_config():\n    from configs import mine\n    config = mine.get_config()\n"
        "    config.train.steps = 2 * mine.STEPS\n    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/longer.py", []).train.steps == 6
    assert load_config("debug", []).train.steps == configs.debug.get_config().train.steps
    assert sys.modules["configs"] is configs and sys.modules["configs.debug"] is configs.debug
    assert "configs.mine" not in sys.modules


def test_names_lists_what_find_finds(monkeypatch, tmp_path):
    names = config_files.names()
    assert {"tabletop", "finetune/lora", "sweeps/lr"} <= set(names) and "common" not in names
    monkeypatch.chdir(tmp_path)
    assert {config_files.find(name) for name in names} == {str(ROOT / "configs" / f"{name}.py") for name in names}


def test_importing_the_command_line_is_light():
    heavy = "{'jax', 'flax', 'tensorflow', 'transformers', 'orbax'}"
    code = f"import sys, openvla_jax.__main__, openvla_jax.train; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
