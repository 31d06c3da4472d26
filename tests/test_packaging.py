"""What setup.py declares is what the package imports, and a wheel works outside a checkout."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from conftest import ROOT, xla_flags

# Distributions whose modules have another name.
MODULES = {
    "absl-py": {"absl"},
    "httptools": set(),  # uvicorn's HTTP parser, which it finds by itself
    "orbax-checkpoint": {"orbax"},
    "pillow": {"PIL"},
    "prometheus-client": {"prometheus_client"},
    "pyyaml": {"yaml"},
    "tensorflow-cpu": {"tensorflow"},
    "tensorflow-datasets": {"tensorflow_datasets"},
}
# Imported only by the modules that run inside the environment of `make libero-env`.
SIMULATOR = {"libero", "OpenGL", "robosuite"}


def declared(monkeypatch):
    """The keywords that setup.py gives to `setup`."""
    seen = {}
    monkeypatch.setattr(setuptools, "setup", seen.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return seen


def modules(requirements):
    names = {re.match(r"[A-Za-z0-9_.-]+", text)[0] for text in requirements}
    return set().union(*(MODULES.get(name, {name}) for name in names))


def imported():
    """Top-level names of the third-party modules that files of the package import."""
    found = set()
    for path in [file for folder in ("openvla_jax", "clients", "configs") for file in ROOT.glob(f"{folder}/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"openvla_jax", "openvla_client", "configs"} - SIMULATOR


def test_setup_declares_what_the_package_imports_and_nothing_else(monkeypatch):
    keywords = declared(monkeypatch)
    extras = keywords["extras_require"]
    needed = set(keywords["install_requires"]).union(*(extras[name] for name in extras if name != "dev"))
    assert modules(needed) == imported()


@pytest.mark.long
def test_an_installed_wheel_trains_outside_a_checkout(tmp_path):
    source, site, here = tmp_path / "source", tmp_path / "site", tmp_path / "here"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("openvla_jax", "clients", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    here.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(1)}

    def run(*command, code=0):
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    assert {path.name for path in site.iterdir()} - {"bin", "__pycache__"} == {
        "openvla_jax", "openvla_client", next(site.glob("*.dist-info")).name
    }  # fmt: skip
    asks = "from openvla_jax.inference.client import Client; import openvla_client; print(openvla_client.__file__)"
    assert run(sys.executable, "-c", asks).startswith(str(site))
    openvla = str(site / "bin" / "openvla")
    assert "--config" in run(openvla, "train", "--config", "tabletop", "--help")
    assert "did you mean 'tabletop'?" in run(openvla, "train", "--config", "tabletopp", "--workdir", "W", code=2)
    run(sys.executable, "-m", "openvla_jax.sim.dataset", "--out", "runs/demo/data", "--episodes", "3")
    settings = {"train.steps": 2, "data.shuffle_buffer": 50, "train.eval_every": 0, "optimizer.warmup_steps": 0}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    run(openvla, "train", "--config", "tabletop", "--workdir", "runs/demo", *flags)
    assert (Path(here) / "runs/demo/checkpoints/2/params").is_dir()
