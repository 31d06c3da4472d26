"""benchmarks/gpu.py: every stage runs small on a CPU, and what was measured survives the end of its process."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, golden, shared_dir

sys.path.insert(0, str(ROOT / "benchmarks"))
from measure.child import run_child

SCRIPT = [sys.executable, "benchmarks/gpu.py"]
MISSING = [name for name in ("torch", "peft") if importlib.util.find_spec(name) is None]


def expected_result(stage: str) -> str:
    """`done`, or which of the packages that the stage needs is missing."""
    needed = ["torch", "peft"] if stage.startswith("peft") else ["torch"] if stage.startswith("torch") else []
    return next((f"skipped: no {name}" for name in needed if name in MISSING), "done")


def run_small(out: Path, *arguments: str) -> dict:
    """Runs `--small` as on a machine that lacks packages, and returns its report."""
    env = os.environ | {"OPENVLA_SHARED": str(shared_dir())}
    command = [*SCRIPT, "--small", "--hide-missing", "--out", str(out), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    return json.loads((out / "gpu_ledger.json").read_text())


def test_gpu_script_runs_the_stages_small(tmp_path):
    report = run_small(tmp_path, "--stages", ",".join(STAGES - LONG))
    results = {stage["stage"]: stage["result"] for stage in report["stages"]}
    assert results == {stage: expected_result(stage) for stage in STAGES - LONG}
    rows = [row for stage in report["stages"] for row in stage["rows"]]
    assert not [row for row in rows if row.get("failed", "SkippedError: no CUDA") != "SkippedError: no CUDA"]
    compared = [row for row in rows if row.get("tokens")]
    sides = {(row["side"], row["attention"]) for row in compared}
    assert sides == {("openvla_jax", "jax.nn")} | ({("PyTorch eager", "SDPA")} if "torch" not in MISSING else set())
    assert {row["tokens"].split("/")[0] == row["tokens"].split("/")[1] for row in compared} == {True}, compared
    page = (tmp_path / "gpu_ledger.md").read_text()
    assert all(f"| {stage} | {outcome} |" in page for stage, outcome in results.items())

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


ROW = "open(sys.argv[1], 'a').write(json.dumps({'table': 'x', 'p50 ms': 1.5}) + chr(10))"


@pytest.mark.parametrize(
    ("end", "result"),
    [
        ("time.sleep(60)", "timed out after 3 s"),
        ("os.kill(os.getpid(), 9)", "failed: exit code -9"),
        ("raise ValueError('no memory')", "failed: ValueError: no memory"),
        ("open(sys.argv[1], 'a').write(json.dumps({'ended': 'skipped: no torch'}))", "skipped: no torch"),
    ],
)
def test_run_child_keeps_what_was_measured_before_the_end(tmp_path, end, result):
    rows = tmp_path / "rows.jsonl"
    code = f"import json, os, sys, time\n{ROW}\n{end}"
    child = run_child([sys.executable, "-S", "-c", code, str(rows)], rows, 3, os.environ)
    assert child["result"] == result
    assert child["rows"] == [{"table": "x", "p50 ms": 1.5}]
