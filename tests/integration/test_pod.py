"""Runs of two real processes: the curve of one process, a kill that the other names, a stop that both agree on."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, xla_flags
from etils import epath

from openvla_jax.checkpoint import checksums
from openvla_jax.checkpoint.reading import steps_in
from openvla_jax.sim.dataset import write_dataset
from openvla_jax.training.hosts import LOST
from openvla_jax.training.metrics import read_metrics

pytestmark = pytest.mark.long

KEPT = ("train/loss", "train/grad_norm", "val/loss")


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def start(workdir, processes, devices, *arguments, second=()):
    """The processes of a run on `processes` x `devices` fake devices; `second` are arguments of process 1 alone."""
    port, running = free_port(), []
    for index in range(processes):
        command = [sys.executable, "tests/integration/pod_worker.py", str(workdir), *map(str, (processes, index, port))]
        command += second if index == 1 else []
        running.append(
            subprocess.Popen(
                [*command, *arguments], cwd=ROOT, env=os.environ | {"XLA_FLAGS": xla_flags(devices)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    return running


def finish(running, codes):
    outputs = [process.communicate(timeout=500)[0] for process in running]
    assert [process.returncode for process in running] == codes, "\n".join(text[-3000:] for text in outputs)
    return outputs


def curve(workdir):
    return {(line["step"], key): line[key] for line in read_metrics(workdir) for key in KEPT if key in line}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The curve of one process on four devices."""
    workdir = tmp_path_factory.mktemp("whole")
    finish(start(workdir, 1, 4), [0])
    assert sorted(step for step, key in curve(workdir) if key == "train/loss") == list(range(1, 13))
    return curve(workdir)


def test_a_killed_process_is_named_and_one_process_goes_on_with_the_curve_of_two(tmp_path, whole):
    running = start(tmp_path, 2, 2, second=["--die=10"])
    running[1].wait(timeout=500)
    died = time.monotonic()
    first, _ = finish(running, [LOST, -signal.SIGKILL])
    assert time.monotonic() - died < 60
    (line,) = [line for line in first.splitlines() if line.startswith("error: ")]
    assert "process 1 on host" in line and "no sign of life" in line
    assert steps_in(tmp_path / "checkpoints") == [4, 8]
    before = curve(tmp_path)
    assert max(step for step, _ in before) >= 8
    assert before == pytest.approx({key: whole[key] for key in before}, rel=1e-5)

    (output,) = finish(start(tmp_path, 1, 4), [0])
    assert "resumed from step 8" in output
    assert curve(tmp_path) == pytest.approx(whole, rel=1e-5)


def test_a_signal_to_one_stops_both_at_the_same_step(tmp_path):
    running = start(tmp_path, 2, 2, "--set=train.steps=100000", "--set=train.checkpoint_every=50000")
    deadline = time.monotonic() + 500
    while not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path)) < 3:
        assert running[0].poll() is None and time.monotonic() < deadline, running[0].communicate()[0][-3000:]
        time.sleep(0.1)
    running[1].send_signal(signal.SIGTERM)
    first, _ = finish(running, [143, 143])
    (step,) = steps_in(tmp_path / "checkpoints")
    assert f"stopped by a signal at step {step}, saved" in first
    assert read_metrics(tmp_path)[-1]["step"] == step


def train(workdir, data_dir, *overrides):
    """Two processes of train.py on two devices each, with the real data pipeline; what process 0 printed."""
    address = f"localhost:{free_port()}"
    command = [
        sys.executable, "train.py", "--config", "tests/integration/frozen.py", "--workdir", str(workdir),
        f"--config.data.data_dir={data_dir}", "--config.mesh.fsdp=4", f"--coordinator={address}", "--num_processes=2",
        *overrides,
    ]  # fmt: skip
    running = [
        subprocess.Popen(
            [*command, f"--process_id={index}"], cwd=ROOT, env=os.environ | {"XLA_FLAGS": xla_flags(2)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]  # fmt: skip
    return finish(running, [0, 0])[0]


def test_two_processes_resume_each_its_own_data(tmp_path):
    """The curve over a restart is the uninterrupted one: both shuffle buffers are taken up as they were."""
    write_dataset(tmp_path / "data", episodes=16)
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    train(straight, tmp_path / "data")
    train(parted, tmp_path / "data", "--config.train.steps=4")
    states = {path.name: path.read_bytes() for path in (parted / "checkpoints" / "4" / "data").glob("*.data-*")}
    assert len(states) == len(set(states.values())) == 2
    assert "resumed from step 4" in train(parted, tmp_path / "data")
    for step in (4, 8):  # each process notes what it wrote
        saved = parted / "checkpoints" / str(step)
        written = {
            str(p.relative_to(saved)) for p in saved.glob("*/**/*") if p.is_file() and p.name != "commit_success.txt"
        }
        assert set(checksums.stored(epath.Path(saved))) == written
        checksums.verify(saved)
    assert curve(parted) == curve(straight)
    assert sorted(step for step, key in curve(straight) if key == "train/loss") == list(range(1, 9))


def test_processes_that_were_started_unlike_stop_with_the_difference(tmp_path):
    for text in finish(start(tmp_path, 2, 1, second=["--set=seed=8"]), [2, 2]):
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "config.seed is '7' on process 0" in line and "'8' on process 1" in line
    assert not (tmp_path / "metrics.jsonl").exists() and not steps_in(tmp_path / "checkpoints")


def test_a_full_disk_ends_the_run_with_one_line_and_the_last_good_step(tmp_path, whole):
    (output,) = finish(start(tmp_path, 1, 4, "--full=6"), [LOST])
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "saving step" in line and "times in a row" in line and "the last good checkpoint is step 4" in line
    assert steps_in(tmp_path / "checkpoints") == [4]
    before = curve(tmp_path)
    assert max(step for step, _ in before) >= 8 and before == {key: whole[key] for key in before}


def test_a_run_killed_while_it_saves_and_evaluates_has_the_metrics_of_one_that_was_left_alone(tmp_path, whole):
    """Two of the moments of benchmarks/kills.py."""
    for moment in (["checkpoint", "2", "0.05"], ["evaluation", "1", "0.02"]):
        finish(start(tmp_path, 1, 4, "--kill", *moment), [-signal.SIGKILL])
    assert steps_in(tmp_path / "checkpoints")
    finish(start(tmp_path, 1, 4), [0])
    assert curve(tmp_path) == whole
    steps = [line["step"] for line in read_metrics(tmp_path) if "train/loss" in line]
    assert steps == list(range(1, 13))
