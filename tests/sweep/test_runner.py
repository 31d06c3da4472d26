"""The runner's mechanics, with a stand-in for the training command that keeps its promises (resume, SIGTERM, exit
codes) in milliseconds. `benchmarks/sweep.py` kills a sweep of real runs.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, xla_flags

from openvla_jax.sweep import runner
from openvla_jax.sweep.points import Point, SweepError

STAND_IN = """
import json, os, pathlib, signal, sys, time
flags = dict(a.removeprefix("--config.").split("=", 1) for a in sys.argv if a.startswith("--config."))
work = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
seed, steps = int(flags["seed"]), int(flags["train.steps"])
with (work / "starts").open("a") as f: f.write("x")
if seed == 13:
    print("reading\\nerror: unlucky"); sys.exit(2)
start = max([int(p.name) for p in (work / "checkpoints").glob("*") if p.name.isdigit()], default=0)
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
lines = (work / "metrics.jsonl").read_text().splitlines()[:start] if start else []
def save(step):
    (work / "checkpoints").mkdir(exist_ok=True); (work / "checkpoints" / str(step)).mkdir(exist_ok=True)
with (work / "metrics.jsonl").open("w") as f:
    for line in lines: f.write(line + "\\n")
    for step in range(start + 1, steps + 1):
        time.sleep(float(flags.get("sleep", 0.02)))
        row = {"step": step, "train/loss": seed + 1 / step, "train/steps_per_second": 50.0}
        f.write(json.dumps(row) + "\\n"); f.flush()
        if step % 5 == 0 or step == steps or stop: save(step)
        if stop: sys.exit(143)
"""

DRIVER = """
import os, pathlib, sys
from openvla_jax.sweep import runner
from openvla_jax.sweep.points import Point, SweepError
os.chdir(sys.argv[1])
points = [Point(f"seed={s}", "c.py", {"seed": s, "train.steps": 20}, 20) for s in map(int, sys.argv[3].split(","))]
runs = runner.prepare(pathlib.Path(sys.argv[2]), points)
try:
    with runner.only_one(pathlib.Path(sys.argv[2])):
        with runner.Table() as table:
            sys.exit(not runner.run_all(runs, 2, (), table))
except KeyboardInterrupt:
    sys.exit(130)
except SweepError as error:
    print(error); sys.exit(2)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The file that `python -m openvla_jax` runs in the present folder."""
    package = tmp_path / "here" / "openvla_jax"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(STAND_IN)
    monkeypatch.chdir(package.parent)
    return package / "__main__.py"


def points(*seeds, steps=20):
    return [Point(f"seed={s}", "c.py", {"seed": s, "train.steps": steps}, steps) for s in seeds]


def drive(workdir, seeds):
    command = [sys.executable, "-c", DRIVER, os.getcwd(), str(workdir), ",".join(map(str, seeds))]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def curves(workdir):
    return {path.parent.name: path.read_text() for path in workdir.glob("*/metrics.jsonl")}


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def quiet(runs):
    pass


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_a_killed_sweep_goes_on(tmp_path, stand_in, how):
    """No point is run twice from the start, none is lost, and what they write equals an uninterrupted sweep's."""
    seeds = list(range(1, 7))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert runner.run_all(runner.prepare(whole, points(*seeds)), 3, (), quiet)

    process = drive(killed, seeds)
    wait_for(lambda: sum(runner.saved_step(killed / f"seed={s}") for s in seeds) >= 55)
    finished = [s for s in seeds if runner.saved_step(killed / f"seed={s}") == 20]
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == (-9 if how == signal.SIGKILL else 130), output
    assert 0 < len(finished) < len(seeds)
    assert curves(killed) != curves(whole)

    again = drive(killed, seeds)
    output = again.communicate(timeout=60)[0]
    assert again.returncode == 0, output
    assert curves(killed) == curves(whole)
    assert all((killed / f"seed={s}" / "starts").read_text() == "x" for s in finished)


@pytest.mark.long
def test_run_all_trains_a_real_point(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", xla_flags(1))
    data = ROOT / "tests" / "data" / "checkpoint_v1" / "data"
    settings = {
        "data.data_dir": str(data), "data.statistics_dir": str(tmp_path / "statistics"), "train.steps": 3, "seed": 5,
    }  # fmt: skip
    point = Point("seed=5", "tests/integration/frozen.py", settings, 3)
    runs = runner.prepare(tmp_path / "s", [point])
    assert runner.run_all(runs, 1, (), quiet), runner.log_tail(runs[0], 20)
    assert [run.state for run in runs] == ["finished"] and runner.saved_step(tmp_path / "s" / "seed=5") == 3
    rows = [json.loads(line) for line in curves(tmp_path / "s")["seed=5"].splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3]
    assert json.loads((tmp_path / "s" / "seed=5" / "config.json").read_text())["seed"] == 5


def test_failures_are_told_and_do_not_stop_the_rest(tmp_path, stand_in):
    runs = runner.prepare(tmp_path / "s", points(1, 13, 2))
    assert not runner.run_all(runs, 1, (), quiet)
    assert [run.state for run in runs] == ["finished", "failed", "finished"]
    assert runner.log_tail(runs[1], 1) == ["error: unlucky"]
    lines = runner.table(runs)
    assert lines[-1] == "1 failed, 2 finished"
    assert lines[1].split()[:3] == ["seed=1", "finished", "20/20"] and "train/loss 1.05" in lines[1]
    again = runner.prepare(tmp_path / "s", points(1, 13, 2))
    assert [run.state for run in again] == ["finished", "interrupted", "finished"]


def test_table_is_redrawn_in_place_on_a_terminal_and_leaves_the_cursor(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    run = runner.Run(Point("seed=1", "c.py", {}, 20), tmp_path, "running", metrics={"train/loss": 0.5})
    out = (tmp_path / "out").open("w")
    out.isatty = lambda: True
    with runner.Table(out) as table:
        for run.step in (1, 2):
            table([run])
            table._shown = -1e9  # the next one is due at once
    out.flush()
    shown = (tmp_path / "out").read_text()
    assert shown.index("1/20") < shown.index("2/20") and "\x1b[2K" in shown  # the line before is erased
    assert "1 running" in shown and "\u2026" in shown  # a line that is too wide is cut, so that it stays one
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_table_writes_a_line_for_each_change_into_a_file(tmp_path):
    runs = [runner.Run(Point(f"seed={i}", "c.py", {}, 20), tmp_path, "running") for i in (1, 2)]
    with (tmp_path / "out").open("w") as out, runner.Table(out) as table:
        table(runs)
        table(runs)
        runs[1].state = "failed"
        table(runs)
    assert [line.split()[:2] for line in (tmp_path / "out").read_text().splitlines()] == [
        ["seed=1", "running"], ["seed=2", "running"], ["seed=2", "failed"]
    ]  # fmt: skip


def test_a_point_that_still_runs_is_not_started_twice(tmp_path, stand_in):
    """As when a sweep was killed and its run goes on saving."""
    (run,) = runner.prepare(tmp_path / "s", points(1, steps=60))
    runner._start(run, None)
    (other,) = runner.prepare(tmp_path / "s", points(1, steps=60))
    assert runner.run_all([other], 1, (), quiet)
    assert run.process.wait() == 0
    assert (run.directory / "starts").read_text() == "x"


def test_one_sweep_at_a_time(tmp_path, stand_in):
    runner.prepare(tmp_path / "s", points(1))
    with runner.only_one(tmp_path / "s"):
        process = drive(tmp_path / "s", [1])
        assert "another process runs the sweep" in process.communicate(timeout=60)[0]
        assert process.returncode == 2


def test_each_parallel_run_has_its_device(tmp_path, stand_in, monkeypatch):
    stand_in.write_text(STAND_IN + "\n(work / 'device').write_text(os.environ['CUDA_VISIBLE_DEVICES'])")
    runs = runner.prepare(tmp_path / "s", points(1, 2, 3, 4))
    assert runner.run_all(runs, 2, ("5", "7"), quiet)
    assert {(run.directory / "device").read_text() for run in runs} == {"5", "7"}
    with pytest.raises(SweepError, match="2 runs in parallel, but 1 devices"):
        runner.run_all(runs, 2, ("5",), quiet)


def test_a_workdir_of_another_sweep_is_refused(tmp_path):
    runner.prepare(tmp_path / "s", points(1, 2))
    before = (tmp_path / "s" / runner.SWEEP_FILE).read_text()
    with pytest.raises(SweepError, match=r"holds another sweep: its point seed=1 .* \(1 of 2 differ\)"):
        runner.prepare(tmp_path / "s", points(2, 3))
    with pytest.raises(SweepError, match="2 of 2 differ"):
        runner.prepare(tmp_path / "s", points(1, 2, steps=30))
    assert (tmp_path / "s" / runner.SWEEP_FILE).read_text() == before
    assert len(runner.prepare(tmp_path / "s", points(1, 2, 3))) == 3  # it may grow
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.tex").write_text("precious")
    with pytest.raises(SweepError, match="is not empty and holds no sweep"):
        runner.prepare(tmp_path / "t", points(1))


def test_the_command_reports_bad_input_in_one_line(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "openvla_jax.sweep", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)

    bad = tmp_path / "bad.py"
    bad.write_text("def get_sweep():\n    return 'configs/debug.py', [{'trian.steps': 3}]\n")
    result = run("--sweep", bad, "--workdir", tmp_path / "s")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and "'train'" in result.stderr
    assert not (tmp_path / "s").exists()

    result = run("--sweep", "configs/sweeps/lr.py", "--workdir", "gs://b/s", "--launcher", "print")
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 4
    assert lines[0] == (
        "python -m openvla_jax train --config configs/ablation.py --workdir gs://b/s/learning_rate=1e-05 "
        "--config.optimizer.learning_rate=1e-05"
    )


def test_half_written_lines_are_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3}) + "\n" + '{"step": 4, "tra')
    assert runner.tail(tmp_path / "metrics.jsonl") == [{"step": 3}]
    assert runner.tail(tmp_path / "nothing") == []
