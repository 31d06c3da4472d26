"""Four real processes, one killed, restarted on two: named in time, and the curve of one process throughout.

  python benchmarks/pod.py                # about two minutes on two cores
  python benchmarks/pod.py --victim 0     # the coordinator's process

The processes run tests/integration/pod_worker.py: the real loop, step, checkpoints and `jax.distributed`, on a
stream of random batches that is the same for any number of processes. Fails if the others do not end within 60 s with a
line that names the killed one, or if any loss differs from that of one process by more than 1e-5.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, DIES = 12, 10
KEPT = ("train/loss", "train/grad_norm", "val/loss")


def start(workdir: Path, processes: int, devices: int, victim: int | None = None) -> list[subprocess.Popen]:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = os.environ | {
        "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PJRT_NPROC": "64",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "xla"), "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**31),
    }  # fmt: skip
    worker = [sys.executable, str(ROOT / "tests" / "integration" / "pod_worker.py"), str(workdir), str(processes)]
    return [
        subprocess.Popen(
            [*worker, str(index), str(port), *([f"--die={DIES}"] if index == victim else [])],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(processes)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    outputs = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, outputs, strict=True):
        if process.returncode:
            sys.exit(f"FAILED with {process.returncode}:\n{text[-3000:]}")
    return outputs


def curve(workdir: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], key): row[key] for row in rows for key in KEPT if key in row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victim", type=int, default=2, help="the process that is killed")
    victim = parser.parse_args().victim
    with tempfile.TemporaryDirectory() as folder:
        one, many = Path(folder) / "one", Path(folder) / "many"
        finish(start(one, 1, 4))
        processes = start(many, 4, 1, victim)
        processes[victim].wait()
        died = time.monotonic()
        if processes[victim].returncode != -signal.SIGKILL:
            sys.exit(f"FAILED: process {victim} ended by itself:\n{processes[victim].communicate()[0][-3000:]}")
        others = [process for index, process in enumerate(processes) if index != victim]
        texts = [process.communicate()[0] for process in others]
        seconds = time.monotonic() - died
        silent = [text for text in texts if f"process {victim} on host" not in text]
        text = finish(start(many, 2, 2))[0]
        expected, got = curve(one), curve(many)
    resumed = text.partition("resumed from step ")[2].split()[0]
    worst = max(abs(got.get(key, float("inf")) / value - 1) for key, value in expected.items())
    codes = sorted({process.returncode for process in others})
    print(
        f"process {victim} of 4 killed: the other three ended {seconds:.0f} s later with code {codes}, "
        f"{3 - len(silent)} of 3 named it; two processes went on from step {resumed} of {STEPS}; largest relative "
        f"difference of {len(expected)} losses and gradient norms from one process's: {worst:.1e}"
    )
    if silent or seconds > 60 or worst > 1e-5 or expected.keys() != got.keys():
        sys.exit("FAILED")


if __name__ == "__main__":
    main()
