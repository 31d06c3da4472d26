"""Kills a sweep of real runs in the middle, runs it again, and compares with a sweep that was left alone.

  python benchmarks/sweep.py              # 12 learning rates of configs/debug.py; about ten minutes on two cores
  python benchmarks/sweep.py --points 3   # fewer

The sweep's process is killed with SIGKILL while its fourth point (of twelve) runs. Fails if a finished point is run
again, a point is missing, or any metric of any step differs from the uninterrupted sweep's; and if the sweep itself
takes more than a second per point (`--points 0` measures that alone).
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from openvla_jax.sweep import runner  # noqa: E402
from openvla_jax.sweep.points import Point  # noqa: E402

MAX_OVERHEAD = 1.0  # seconds of a point beyond its run
# A run that is over as soon as it has begun.
EMPTY_RUN = """
import pathlib, sys
work = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
(work / "checkpoints" / "1").mkdir(parents=True)
"""
COMPARED = ("train/loss", "train/grad_norm", "train/action_accuracy", "val/loss", "val/action_accuracy")


def curve(point: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (point / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in ("step", *COMPARED) if key in row} for row in rows]


def ended(point: Path) -> bool:
    """Whether the point's own process has said so: its last checkpoint is there a moment earlier."""
    log = point / "log.txt"
    return log.exists() and "\ndone: step" in log.read_text()


def overhead(folder: Path, points: int = 20) -> float:
    """Seconds that a sweep takes per point beyond its runs: empty runs, against the same commands one by one."""
    (folder / "openvla_jax").mkdir()
    (folder / "openvla_jax" / "__main__.py").write_text(EMPTY_RUN)  # what `python -m openvla_jax` runs in `folder`
    made = [Point(f"seed={seed}", "c.py", {"seed": seed}, steps=1) for seed in range(points)]
    began = time.perf_counter()
    runs = runner.prepare(folder / "sweep", made)
    with contextlib.chdir(folder), runner.only_one(folder / "sweep"), open(os.devnull, "w") as nowhere:
        runner.run_all(runs, 1, (), runner.Table(nowhere))
    swept = time.perf_counter() - began
    began = time.perf_counter()
    for point in made:
        work = folder / "alone" / point.name
        subprocess.run([sys.executable, *point.arguments(str(work))], cwd=folder, check=True)
    return (swept - (time.perf_counter() - began)) / points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = overhead(Path(folder))
    print(f"overhead of a sweep: {seconds:.2f} s a point", flush=True)
    if seconds > MAX_OVERHEAD:
        sys.exit(f"FAILED: more than {MAX_OVERHEAD} s")
    if not options.points:
        return
    place = ROOT / ".cache"
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-sweep-", dir=place) as folder:
        work = Path(folder)
        subprocess.run(
            [sys.executable, "-m", "openvla_jax.sim.dataset", "--out", str(work / "data"), "--episodes", "12"],
            cwd=ROOT, check=True,
        )  # fmt: skip
        (work / "sweep.py").write_text(
            "from openvla_jax.sweep import axis, log_spaced\n"
            f"def get_sweep():\n    return 'configs/debug.py', "
            f"axis('optimizer.learning_rate', log_spaced(1e-5, 1e-2, {options.points}))\n"
        )

        def start(name: str) -> subprocess.Popen:
            command = [
                sys.executable, "-m", "openvla_jax.sweep", "--sweep", str(work / "sweep.py"), "--parallel", "2",
                "--workdir", str(work / name), "--set", f"data.data_dir={work / 'data'}",
                "--set", f"train.steps={options.steps}",
            ]  # fmt: skip
            return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

        began = time.perf_counter()
        if start("whole").wait():
            sys.exit("FAILED: the uninterrupted sweep")
        whole_seconds = time.perf_counter() - began
        names = sorted(path.parent.name for path in (work / "whole").glob("*/metrics.jsonl"))

        process = start("killed")
        enough = max(1, options.points // 4)
        while sum(ended(work / "killed" / name) for name in names) < enough:
            if process.poll() is not None:
                sys.exit("FAILED: the sweep ended before it could be killed")
            time.sleep(0.05)
        process.kill()
        process.wait()
        logs = {
            name: (work / "killed" / name / "log.txt").read_bytes() for name in names if ended(work / "killed" / name)
        }
        if start("killed").wait():
            sys.exit("FAILED: the sweep that was run again")
        again = [name for name, log in logs.items() if (work / "killed" / name / "log.txt").read_bytes() != log]
        different = [name for name in names if curve(work / "killed" / name) != curve(work / "whole" / name)]
        print(
            f"{len(names)} points of {options.steps} steps, {whole_seconds:.0f} s uninterrupted; killed when "
            f"{len(logs)} were finished; run again after that: {len(again)}; lost or different: {len(different)}"
        )
        if again or different or len(names) != options.points:
            sys.exit(f"FAILED: {again + different}")


if __name__ == "__main__":
    main()
