"""benchmarks/gpu.py: its stages run small on a CPU, and rows survive the end of a stage's process."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from measure.child import run_child
from measure.stages import STAGES

SCRIPT = [sys.executable, "benchmarks/gpu.py"]
MISSING = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]


def expected_result(stage: str) -> str:
    """`done`, or which of the packages that the stage needs is missing."""
    needed = ["torch", "peft"] if stage.startswith("peft") else ["torch"] if stage.startswith("torch") else []
    return next((f"skipped: no {name}" for name in needed if name in MISSING), "done")


def check_small_run(out: Path, stages: list[str]) -> list[dict]:
    """Runs stages small, checks that all succeed and that all sides choose the same tokens, and returns their rows."""
    command = [*SCRIPT, "--small", "--out", str(out), "--stages", ",".join(stages)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    report = json.loads((out / "gpu_ledger.json").read_text())
    results = {stage["stage"]: stage["result"] for stage in report["stages"]}
    assert results == {stage: expected_result(stage) for stage in stages}
    page = (out / "gpu_ledger.md").read_text()
    assert all(f"| {stage} | {outcome} |" in page for stage, outcome in results.items())
    rows = [row for stage in report["stages"] for row in stage["rows"]]
    assert {row["failed"] for row in rows if "failed" in row} <= {"SkippedError: no CUDA"}
    compared = [row for row in rows if row.get("tokens")]
    sides = {"openvla_jax"} | (set() if "torch" in MISSING else {"PyTorch eager", "PyTorch compiled"})
    assert {row["side"] for row in compared} == sides
    assert all(row["tokens"] == "7/7" or row["tokens"] == "14/14" for row in compared), compared
    assert all(row["logits off"] < 1e-5 for row in compared), compared
    return rows


@pytest.mark.slow
@pytest.mark.long
def test_gpu_script_runs_its_main_stages_small(tmp_path):
    check_small_run(tmp_path, ["bf16", "torch", "torch-compiled", "lora-16", "peft-16"])


@pytest.mark.long
def test_gpu_script_runs_every_stage_small(tmp_path):
    rows = check_small_run(tmp_path, [stage.name for stage in STAGES])
    logits, tokens = (row for row in rows if row["table"] == "golden")
    assert logits["difference"] < 2e-4 and tokens["equal"] == "14/14"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--small", "--stages", "smoke,bf15"], "unknown stage bf15: --stages; choose from smoke, bf16"),
        (["--out", "never"], "no NVIDIA GPU: nvidia-smi is not on the PATH"),
    ],
)
def test_gpu_script_refuses_what_it_cannot_run(arguments, message):
    env = os.environ | {"PATH": "/nowhere"}
    result = subprocess.run(
        [*SCRIPT, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (ROOT / "never").exists()


CHILD = """
import json, os, sys, time
def append(stage, **row):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"stage": stage, **row}) + chr(10))
append("first", ended="skipped: no torch", seconds=0.5)
append("second", p50=1.5)
"""


@pytest.mark.parametrize(
    ("end", "result"),
    [
        ("time.sleep(60)", "timed out after 3 s"),
        ("os.kill(os.getpid(), 9)", "failed: no output (exit code -9)"),
        ("raise ValueError('no memory')", "failed: ValueError: no memory (exit code 1)"),
    ],
)
def test_run_child_keeps_what_was_measured_before_the_end(tmp_path, end, result):
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-S", "-c", CHILD + end, str(rows)]
    first, second, third = run_child(command, ["first", "second", "third"], rows, 3, os.environ)
    assert first == {"stage": "first", "result": "skipped: no torch", "seconds": 0.5, "rows": []}
    assert (second["result"], second["rows"]) == (result, [{"p50": 1.5}])
    assert third == {"stage": "third", "result": "not run: second ended the process", "seconds": 0.0, "rows": []}


def test_hidden_packages_come_from_wheels_alone(tmp_path):
    """As for --hide-missing: `einops` is installed and hidden, `absl` is hidden and in a wheel."""
    with zipfile.ZipFile(tmp_path / "absl.whl", "w") as wheel:
        wheel.writestr("absl.py", "packed = True")
    path = [ROOT / "benchmarks" / "measure" / "hide", tmp_path / "absl.whl"]
    env = os.environ | {"OPENVLA_HIDDEN": "einops,absl", "PYTHONPATH": os.pathsep.join(map(str, path))}
    code = "import absl, importlib.util; print(absl.packed, importlib.util.find_spec('einops'))"
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout == "True None\n"


@pytest.mark.parametrize(("platform", "flags"), [("cuda", "None"), ("cpu", "--xla_force_host_platform_device_count=8")])
def test_conftest_leaves_the_compiler_of_a_gpu_alone(platform, flags):
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": platform}
    code = "import conftest, os; print(os.environ.get('XLA_FLAGS'))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[0] == flags
