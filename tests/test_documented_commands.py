"""Every command in README.md, docs/*.md and the first paragraph of each config is one that the parsers accept."""

import ast
import re
import shlex

import pytest
from conftest import ROOT

from openvla_jax import config_files, convert_weights, evaluate, serve, train
from openvla_jax.data import __main__ as data
from openvla_jax.sim import dataset
from openvla_jax.sim.libero import __main__ as libero
from openvla_jax.sweep import __main__ as sweep

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = [ROOT / "configs" / f"{name}.py" for name in config_files.names()]
STARTS = ("python ", "openvla ", "make ", "time make ")


def commands(path):
    """The commands of a page's blocks and code spans, or of a config's first paragraph, continued lines joined."""
    text = path.read_text()
    if path.suffix == ".py":
        first = ast.get_docstring(ast.parse(text)).split("\n\n")[0]
        return [" ".join(first.split())]
    text = re.sub(r"```python.*?```", "", text, flags=re.DOTALL)
    blocks = re.sub(r"\\\n +", " ", text)
    lines = [line.strip() for line in re.findall(r"^ {4}(.*)$", blocks, flags=re.MULTILINE)]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    return [line for line in [*lines, *spans] if line.startswith((*STARTS, "scripts/")) and line != "scripts/"]


def parse(command):
    """Raises, or exits, for a command that does not exist or does not take these arguments."""
    words = [word for word in shlex.split(command, comments=True) if word not in ("time", "...")]
    words = words[: next((i for i, word in enumerate(words) if word in ("&&", "|", ">", ";")), len(words))]
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), command
    elif program.startswith("scripts/"):
        assert (ROOT / program).is_file(), command
    elif program == "openvla":
        parse_module("openvla_jax." + {"convert": "convert_weights"}.get(rest[0], rest[0]), rest[1:])
    elif rest[0] == "-m":
        parse_module(rest[1], rest[2:])
    elif rest[0] in ("train.py", "finetune.py", "convert_weights.py"):
        parse_module(f"openvla_jax.{rest[0].removesuffix('.py')}", rest[1:])
    else:
        source = (ROOT / rest[0]).read_text()  # of scripts/ or benchmarks/
        for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
            assert f'"{flag}"' in source, f"{command}: {rest[0]} has no {flag}"


def parse_module(module, arguments):
    name = module.removeprefix("openvla_jax.")
    if name == "pytest":
        assert all((ROOT / word).exists() for word in arguments if word.startswith("tests/"))
    elif name == "tests.fuzz":
        source = (ROOT / "tests" / "fuzz" / "__main__.py").read_text()
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
    elif name in ("train", "finetune"):
        if "--config" not in arguments:  # the page leaves the rest out
            arguments = ["--config", "debug", "--workdir", "W", *arguments]
        train.parse(arguments, name)
    elif name == "sweep" and arguments[:1] == ["report"]:
        sweep.report_parser().parse_args(arguments[1:])
    elif name == "sweep":
        config_files.find(sweep.sweep_parser().parse_args(arguments).sweep)
    else:
        parsers = {"convert_weights": convert_weights, "data": data, "evaluate": evaluate, "serve": serve}
        (parsers | {"sim.dataset": dataset, "sim.libero": libero})[name].parser().parse_args(arguments)


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_commands_parse(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands(path)
    assert found or path.suffix == ".md"
    for command in found:
        try:
            parse(command)
        except (SystemExit, KeyError, ValueError, OSError) as error:
            pytest.fail(f"{command!r}: {error!r}")


@pytest.mark.parametrize(
    "command",
    ["python train.py --config configs/no.py --workdir W", "python -m openvla_jax.data inspect MIX",
     "python train.py --config debug --workdir W --config.trian.steps=3", "python -m openvla_jax.evaluat rollout"],
)  # fmt: skip
def test_parse_refuses_what_does_not_exist(command):
    with pytest.raises((SystemExit, KeyError, ValueError)):
        parse(command)
