"""What surrounds the steps: retries, skipped steps, profiles, the metrics file, and where the time went."""

import json
import os

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from openvla_jax import storage
from openvla_jax.settings import WandbSettings
from openvla_jax.training import metrics, progress, runtime

NO_WANDB = WandbSettings()


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that would have been made, in seconds."""
    made = []
    monkeypatch.setattr(storage.time, "sleep", made.append)
    return made


def test_what_fails_for_a_while_is_tried_again_with_longer_pauses(pauses):
    failures = [OSError("503"), RuntimeError("reset by peer")]

    def action():
        if failures:
            raise failures.pop(0)
        return "done"

    assert storage.retry("writing gs://b/x", action) == "done"
    assert pauses == [1, 4]


def test_what_goes_on_failing_is_told_in_one_line(pauses):
    def action():
        raise OSError(28, "No space left on device\nand more")

    with pytest.raises(storage.StorageError) as caught:
        storage.retry("writing gs://b/x", action)
    assert str(caught.value) == "writing gs://b/x failed 4 times: [Errno 28] No space left on device"
    assert pauses == [1, 4, 16]


def test_skipped_steps_are_counted_over_a_hundred_steps():
    skipped = runtime.Skipped(limit=2)
    for step in (1, 50, 150, 160):
        skipped.add(step, lambda: "")
    with pytest.raises(runtime.NonFiniteError, match=r"step 170: loss nan; 3 of the last 100 .*max_skipped allows 2"):
        skipped.add(170, lambda: "loss nan")
    with pytest.raises(runtime.NonFiniteError):
        runtime.Skipped(limit=0).add(1, lambda: "")


def test_a_profile_of_chosen_steps_shows_the_scopes(tmp_path):
    @jax.jit
    def step(x):
        with jax.named_scope("llama"):
            return jnp.sin(x) @ x

    profile = runtime.Profile(epath.Path(tmp_path), first=2, count=2)
    x = jnp.ones((64, 64))
    for i in range(1, 6):
        profile.before(i)
        x = step(x).block_until_ready()
        assert profile.ends(i) == (i == 3)
        if profile.ends(i):
            profile.stop()
    profile.stop()
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    assert b"llama" in trace.read_bytes()
    assert list(tmp_path.iterdir()) == [tmp_path / "profile"]


def test_no_profile_by_default(tmp_path):
    profile = runtime.Profile(epath.Path(tmp_path), first=0, count=3)
    for i in range(5):
        profile.before(i)
        assert not profile.ends(i)
    profile.stop()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The metrics file
# ---------------------------------------------------------------------------------------------------------------------


def steps_of(workdir):
    return [line["step"] for line in metrics.read_metrics(workdir)]


@pytest.mark.parametrize("remote", [False, True])
def test_after_a_resume_no_step_is_doubled_or_missing(tmp_path, monkeypatch, remote):
    monkeypatch.setattr(metrics, "is_remote", lambda path: remote)
    log = metrics.MetricLog(tmp_path, 0, NO_WANDB, {})
    for step in range(1, 5):
        log.write(step, {"train/loss": 1.0 / step})
    log.write(4, {"val/loss": float("nan"), "val/l1": 0.5})
    log.flush()  # as before a checkpoint of step 4
    log.write(5, {"train/loss": 0.0})
    if not remote:  # a kill in the middle of a line
        with open(tmp_path / metrics.METRICS_FILE, "a") as file:
            file.write('{"step": 6, "train/lo')
    del log

    log = metrics.MetricLog(tmp_path, 4, NO_WANDB, {})
    for step in (5, 6):
        log.write(step, {"train/loss": 1.0 / step})
    log.close()
    lines = metrics.read_metrics(tmp_path)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 4, 5, 6]
    assert [line.get("train/loss") for line in lines] == [1.0, 1 / 2, 1 / 3, 1 / 4, None, 1 / 5, 1 / 6]
    assert lines[4].keys() == {"step", "time", "val/l1"}
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_line_that_a_full_disk_cut_is_written_whole_later(tmp_path, pauses):
    log = metrics.MetricLog(tmp_path, 0, NO_WANDB, {})
    log.write(1, {"a": 1.0})

    class Full:
        """A file that takes half a line, once."""

        def __init__(self, file):
            self.file, self.full = file, True

        def write(self, line):
            if self.full:
                self.full = False
                self.file.write(line[: len(line) // 2])
                self.file.flush()
                raise OSError(28, "No space left on device")
            return self.file.write(line)

        def __getattr__(self, name):
            return getattr(self.file, name)

    log._file = Full(log._file)
    log.write(2, {"a": 2.0})
    log.close()
    assert [(line["step"], line["a"]) for line in metrics.read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0)]
    assert pauses == [1]


def test_tensorboard_reads_what_was_written(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    log = metrics.MetricLog(tmp_path, 0, NO_WANDB, {})
    log.write(3, {"train/loss": 0.25})
    log.close()
    (path,) = (tmp_path / "tensorboard").glob("events*")
    data, events = path.read_bytes(), []
    while data:  # TFRecord: length, its checksum, the event, its checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    values = {(event.step, v.tag): v.simple_value for event in events for v in event.summary.value}
    assert values == {(3, "train/loss"): 0.25}


# ---------------------------------------------------------------------------------------------------------------------
# Where the time went
# ---------------------------------------------------------------------------------------------------------------------


def test_goodput_adds_up_over_restarts(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    began = now[0]
    now[0] += 30  # compiling
    run = progress.Progress(0, 100, 8, began, {})
    now[0] += 50
    run.paused("data", 5.0)
    with run.pausing("checkpoint"):
        now[0] += 20
    first = run.goodput()
    assert first == pytest.approx(
        {"compute": 0.45, "data": 0.05, "checkpoint": 0.2, "evaluation": 0.0, "restarts": 0.3, "seconds": 100.0}
    )
    line = {"time": now[0]} | {f"goodput/{name}": value for name, value in first.items()}

    now[0] += 500  # steps that are not in the file any more, standing still
    began = now[0]
    now[0] += 100  # starting
    run = progress.Progress(10, 100, 8, began, json.loads(json.dumps(line)))
    now[0] += 300
    shares = run.goodput()
    assert shares["seconds"] == pytest.approx(1000)
    assert shares["compute"] == pytest.approx(0.345) and shares["restarts"] == pytest.approx(0.63)
    assert sum(value for name, value in shares.items() if name != "seconds") == pytest.approx(1)
    assert run.goodput_line().startswith("goodput 34.5% of 16m40s (data 0.5%, checkpoint 2.0%")


def test_compiled_programs_are_kept_unless_the_environment_decides(monkeypatch, tmp_path):
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    storage.use_compilation_cache(str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    storage.use_compilation_cache("")
    assert changed == {}
    storage.use_compilation_cache("~/x")
    assert changed["jax_compilation_cache_dir"] == os.path.expanduser("~/x")
    assert changed["jax_compilation_cache_max_size"] > 2**30
    changed.clear()
    storage.use_compilation_cache("gs://bucket/x")
    assert changed == {"jax_compilation_cache_dir": "gs://bucket/x"}
    storage.use_compilation_cache("gs://bucket/x", every_program=True)
    assert changed["jax_persistent_cache_min_compile_time_secs"] == 0
