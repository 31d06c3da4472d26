"""Measures openvla-7b on one GPU in at most eight minutes: gpu_ledger.md and gpu_ledger.json in the folder --out.

  python benchmarks/gpu.py --pack        # on a machine with a network: fills .gpu, which travels with the checkout
  python benchmarks/gpu.py               # on the machine with the GPU
  python benchmarks/gpu.py --small       # every stage with tiny models on a CPU: shows that they run

Each stage is a process with its own time. What it measured is kept if its time ends or it crashes, and the next stage
runs. With --small all stages but the smoke test share a process. docs/log/gpu.md describes the stages.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import ROOT, ledger
from measure.child import run_child
from measure.pack import make_pack, missing_wheels
from measure.stages import STAGES, Context, SkippedError, Stage

TOTAL = 8 * 60  # seconds
PATIENCE = 5  # small stages may take so many times their seconds: the CPU may be busy
LEAST = 20  # seconds: with less, a stage measures nothing
# Packages of `pip install openvla_jax[dev]` that the machine with the GPU may lack.
MISSING = frozenset(
    [
        "array_record",
        "av",
        "beartype",
        "dm_tree",
        "fastapi",
        "httptools",
        "json_numpy",
        "keras",
        "libtpu",
        "ml_collections",
        "pydantic",
        "starlette",
        "tensorboardX",
        "tensorflow",
        "tensorflow_datasets",
        "tree",
        "uvicorn",
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES), help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--pack", action="store_true", help="download wheels to the folder .gpu, and exit")
    parser.add_argument("--hide-missing", action="store_true", help=f"hide {', '.join(sorted(MISSING))}")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # in the process of --stages: where rows go
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.rows:
            run_stages(args)
        elif args.pack:
            make_pack()
        else:
            run_all(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_all(args: argparse.Namespace) -> None:
    stages = {stage.name: stage for stage in STAGES}
    chosen = args.stages.split(",")
    if unknown := set(chosen) - set(stages):
        raise ValueError(f"unknown stage {', '.join(sorted(unknown))}: --stages; choose from {', '.join(stages)}")
    if not args.small and shutil.which("nvidia-smi") is None:
        raise ValueError("no NVIDIA GPU: nvidia-smi is not on the PATH; --small runs tiny models on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    report: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "began": datetime.now(UTC).isoformat(" ", "seconds"),
        "seconds": 0.0,
        "small": args.small,
        "machine": ledger.about_machine(not args.small),
        "stages": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for group in grouped([stage for stage in STAGES if stage.name in chosen], args.small):
            left = PATIENCE * TOTAL if args.small else TOTAL - (time.perf_counter() - began)
            ended = start(group, args, Path(folder), left)
            report["stages"] += ended
            report["seconds"] = time.perf_counter() - began
            ledger.write(args.out, report)
            for stage in ended:
                print(f"{stage['stage']}: {stage['result']}", flush=True)
    print((args.out / "gpu_ledger.md").read_text())
    if any(stage["result"].startswith(("failed", "timed out", "not run")) for stage in report["stages"]):
        sys.exit(1)


def grouped(stages: list[Stage], small: bool) -> list[list[Stage]]:
    """The stages of each process: one, or, if small, all after the smoke test, as starting takes most of their time."""
    if not small:
        return [[stage] for stage in stages]
    first = [stage for stage in stages if stage.name == "smoke"]
    return [group for group in (first, [stage for stage in stages if stage not in first]) if group]


def start(group: list[Stage], args: argparse.Namespace, folder: Path, left: float) -> list[dict[str, Any]]:
    """Runs stages in a process of their own. Returns the result, seconds and rows of each."""
    names = [stage.name for stage in group]
    if left < LEAST:
        result = f"skipped: {left:.0f} s left of {TOTAL}"
        return [{"stage": name, "result": result, "seconds": 0.0, "rows": []} for name in names]
    seconds = min(sum(stage.seconds for stage in group) * (PATIENCE if args.small else 1), left)
    rows = folder / f"{names[0]}.jsonl"
    command = [sys.executable, __file__, "--stages", ",".join(names), "--rows", str(rows), "--seconds", str(seconds)]
    command += ["--small"] if args.small else []
    return run_child(command, names, rows, seconds, environment(args, folder, names[0]))


def environment(args: argparse.Namespace, folder: Path, stage: str) -> dict[str, str]:
    hidden = MISSING if args.hide_missing else frozenset()
    path = [str(wheel) for wheel in missing_wheels(hidden)]
    changes = {"JAX_PLATFORMS": "cpu" if args.small else "cuda", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if stage.startswith(("torch", "peft")):  # PyTorch needs the memory that jax has freed
        changes["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
    defaults = {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "HF_HUB_OFFLINE": "1"}
    if args.small:  # compiles faster
        defaults["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if hidden:
        path.insert(0, str(ROOT / "benchmarks" / "measure" / "hide"))
        changes["OPENVLA_HIDDEN"] = ",".join(sorted(hidden))
    changes["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, [os.environ.get("PYTHONPATH")])])
    # Stages share compiled programs, such as those that make weights. Earlier runs leave nothing.
    return defaults | os.environ | changes


def run_stages(args: argparse.Namespace) -> None:
    """Runs --stages in this process, and appends rows to the file --rows as they come."""
    stages = {stage.name: stage for stage in STAGES}
    for name in args.stages.split(","):
        run_stage(stages[name], args)


def run_stage(stage: Stage, args: argparse.Namespace) -> None:
    began = time.perf_counter()

    def append(row: dict[str, Any]) -> None:
        with args.rows.open("a") as file:
            file.write(json.dumps({"stage": stage.name, **row}) + "\n")

    def record(table: str, **cells: Any) -> None:
        append({"table": table, **cells})
        print(table, cells, flush=True)

    result = "done"
    try:
        stage.run(Context(record, args.small, args.rows.parent, args.seconds))
    except SkippedError as error:
        result = f"skipped: {error}"
    except Exception as error:
        result = f"failed: {type(error).__name__}: {error}".splitlines()[0][:300]
        traceback.print_exc()
    append({"ended": result, "seconds": round(time.perf_counter() - began, 1)})


if __name__ == "__main__":
    main()
