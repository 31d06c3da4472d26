"""The launch scripts, as far as they can be run without a TPU: what they would do, and the restart loop for real."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT


def script(name, *arguments, **environment):
    command = [str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=120
    )


VM = {"NAME": "openvla", "ZONE": "us-east5-a", "DRY_RUN": "1"}


@pytest.mark.parametrize("kind", ["v4-128", "v5p-128", "v5litepod-256", "v6e-64"])
def test_slices_are_asked_for_with_software_of_their_kind(kind):
    result = script("tpu_vm.sh", "create", TYPE=kind, SPOT="1", **VM)
    words = shlex.split(result.stdout)
    assert words[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"] and "--spot" in words
    assert words[words.index("--accelerator-type") + 1] == kind
    assert words[words.index("--runtime-version") + 1].startswith(("v2-alpha-tpu", "tpu-ubuntu"))


def test_the_command_runs_on_every_worker_of_every_slice():
    flags = ["train.py", "--workdir", "gs://b/it's"]
    result = script("tpu_vm.sh", "start", *flags, SLICES="3", **VM)
    commands = [shlex.split(line) for line in sorted(result.stdout.splitlines())]
    assert [command[5] for command in commands] == ["openvla-0", "openvla-1", "openvla-2"]
    for command in commands:
        assert command[command.index("--worker") + 1] == "all"
        inner = command[command.index("--command") + 1]
        assert shlex.split(inner)[1:5] == ["openvla_jax/scripts/run_host.sh", *flags]


def test_without_a_name_or_a_verb_it_says_what_is_missing():
    bare = {key: value for key, value in os.environ.items() if key not in VM}
    command = [str(ROOT / "scripts" / "tpu_vm.sh")]
    result = subprocess.run([*command, "stop"], env=bare, capture_output=True, text=True, check=False)
    assert result.returncode and "name of the queued resource" in result.stderr
    assert script("tpu_vm.sh", **VM).returncode == 2


@pytest.mark.parametrize(("codes", "end"), [("75 134 0", 0), ("75 2", 2), ("1 1 1 1", 1)])
def test_a_host_is_started_again_until_it_is_done_or_cannot_be(tmp_path, codes, end):
    (tmp_path / "codes").write_text(codes)
    fake = tmp_path / "run.py"
    fake.write_text(
        f"import pathlib, sys\npath = pathlib.Path({str(tmp_path / 'codes')!r})\n"
        "first, *rest = path.read_text().split()\npath.write_text(' '.join(rest))\nsys.exit(int(first))\n"
    )
    result = script("run_host.sh", str(fake), PYTHON=sys.executable, RESTART_SECONDS="0", RESTARTS="3")
    assert result.returncode == end, result.stderr
    assert (tmp_path / "codes").read_text() == ""


def test_a_signal_is_passed_on_and_ends_the_restarts(tmp_path):
    fake = tmp_path / "run.py"
    fake.write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(143)))\n"
        f"open({str(tmp_path / 'ready')!r}, 'a').write('x')\ntime.sleep(60)\n"
    )
    command = [str(ROOT / "scripts" / "run_host.sh"), str(fake)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHON": sys.executable, "RESTART_SECONDS": "0"})
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "ready").read_text() == "x"


def test_a_run_becomes_a_jobset_of_all_hosts():
    words = ["v5e:16x16*2", "image:1", "gs://b/run-3", "configs/openvla_7b.py:v5e-256", "data.data_dir=gs://b/o xe"]
    command = [sys.executable, "scripts/jobset.py", *words]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    spec = yaml.safe_load(result.stdout)["spec"]["replicatedJobs"][0]
    assert spec["replicas"] == 2 and spec["template"]["spec"]["parallelism"] == 64
    (container,) = spec["template"]["spec"]["template"]["spec"]["containers"]
    assert shlex.split(container["command"][2])[2:] == [
        "-m", "openvla_jax", "train", "--config", "configs/openvla_7b.py:v5e-256", "--workdir", "gs://b/run-3",
        "--config.data.data_dir=gs://b/o xe",
    ]  # fmt: skip
    for wrong, message in (("runs/x", "name a bucket"), ("gs://b/r", "unknown TPU 'v9'")):
        topology = "v9:4x4" if wrong.startswith("gs") else "v5e:16x16"
        bad = [sys.executable, "scripts/jobset.py", topology, "image:1", wrong, "configs/debug.py"]
        result = subprocess.run(bad, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
