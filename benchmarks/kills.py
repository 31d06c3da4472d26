"""Kills a run twenty times at random moments and compares its metrics with an undisturbed run's.

  python benchmarks/kills.py                  # configs/debug.py, 20 kills; about six minutes on two cores
  python benchmarks/kills.py --kills 4 --seed 1

Each start is killed with SIGKILL at a moment drawn from the seed: in reading data, in a step, while a checkpoint is
being written, or in an evaluation. Fails if any line of metrics.jsonl of any step is missing, doubled or different, or
if a start fails.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What may come out otherwise in a run that was interrupted: times, and the memory of a process.
VARYING = re.compile(
    r"time|goodput/.*|train/(steps_per_second|examples_per_second|data_wait_fraction|resident_memory_gb|device_peak_gb)"
)
# Seconds that each lasts on a laptop: the kill comes at a random time within it.
MOMENTS = {"data": 0.02, "step": 0.08, "checkpoint": 1.0, "evaluation": 0.2}


def arm(moment: str, count: int, delay: float) -> None:
    """Kills this process `delay` seconds after the run turns to `moment` for the `count`-th time."""
    from openvla_jax.training.hosts import Watch

    at, left = Watch.at, [count]

    def counted(self, step: int, doing: str) -> None:
        left[0] -= doing == moment
        if doing == moment and left[0] == 0:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        at(self, step, doing)

    Watch.at = counted  # type: ignore[method-assign]


def lines(workdir: Path) -> list[dict[str, float]]:
    path = workdir / "metrics.jsonl"
    # A kill may have cut the last line: the next start drops it.
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in whole]
    return [{key: value for key, value in row.items() if not VARYING.fullmatch(key)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options, rng = parser.parse_args(), random.Random()
    rng.seed(options.seed)
    place = ROOT / ".cache"
    place.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-kills-", dir=place) as folder:
        work = Path(folder)
        subprocess.run(
            [sys.executable, "-m", "openvla_jax.sim.dataset", "--out", str(work / "data"), "--episodes", "12"],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip

        def start(name: str, *moment: str) -> tuple[int, str]:
            command = [
                sys.executable, __file__, "--worker", *moment, "--", "--config", "configs/debug.py",
                "--workdir", str(work / name), f"--config.data.data_dir={work / 'data'}",
                f"--config.train.steps={options.steps}", "--config.train.checkpoint_every=4",
                "--config.train.eval_every=6", f"--config.train.compilation_cache={place / 'xla'}",
            ]  # fmt: skip
            done = subprocess.run(
                command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            return done.returncode, done.stdout

        code, text = start("whole")
        if code:
            sys.exit(f"FAILED: the uninterrupted run\n{text[-2000:]}")
        began, kills, resumed = time.monotonic(), Counter[str](), []
        while kills.total() < options.kills:
            moment = rng.choice(list(MOMENTS))
            count = rng.randint(1, 2 if moment in ("checkpoint", "evaluation") else 9)
            code, text = start("killed", moment, str(count), f"{rng.uniform(0, MOMENTS[moment]):.4f}")
            if code != -signal.SIGKILL:
                sys.exit(
                    f"FAILED: start {kills.total() + 1} ended by itself with {code}: more --steps?\n{text[-2000:]}"
                )
            kills[moment] += 1
            resumed += re.findall(r"resumed from step (\d+)", text)
            written = [line["step"] for line in lines(work / "killed")]
            print(f"kill {kills.total()}: in {moment}, after step {max(written, default=0):.0f}", flush=True)
        code, text = start("killed")
        if code:
            sys.exit(f"FAILED: the last start\n{text[-2000:]}")
        whole, killed = lines(work / "whole"), lines(work / "killed")
        seconds = time.monotonic() - began
    different = sum(a != b for a, b in zip(whole, killed, strict=False)) + abs(len(whole) - len(killed))
    print(
        f"{kills.total()} kills ({', '.join(f'{n} in {moment}' for moment, n in sorted(kills.items()))}), resumed from "
        f"{len(set(resumed))} different steps, {seconds:.0f} s; of {len(whole)} metrics lines {different} differ"
    )
    if different:
        sys.exit("FAILED")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        split = sys.argv.index("--")
        if split > 2:
            arm(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
        from openvla_jax.train import main as train

        sys.exit(train(sys.argv[split + 1 :]))
    else:
        main()
