"""Hosts: joining, agreeing, and naming the one that is lost, with threads for processes and a dict for the store."""

import json
import threading
import time

import pytest

from openvla_jax.training import hosts


class Store:
    """What the coordination service's client does, in memory."""

    def __init__(self, parties=1):
        self.values, self.changed, self._barrier = {}, threading.Condition(), threading.Barrier(parties)

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, timeout_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_ms / 1000):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]

    def key_value_dir_get(self, prefix):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def wait_at_barrier(self, name, timeout_ms):
        self._barrier.wait(timeout_ms / 1000)


# ---------------------------------------------------------------------------------------------------------------------
# Joining
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", 2, None), "--process_id missing"),
        ((None, 2, 0), "--coordinator missing"),
        (("localhost", 2, 0), "'localhost': give HOST:PORT"),
        (("localhost:1", 2, 2), "--process_id 2 is not in 0..1"),
    ],
)
def test_flags_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        hosts.initialize(*arguments)


def test_a_machine_by_itself_is_no_cluster(tmp_path):
    assert not hosts.in_cluster({}, tmp_path)
    assert not hosts.in_cluster({"SLURM_NTASKS": "1"}, tmp_path)
    assert hosts.in_cluster({"SLURM_NTASKS": "4"}, tmp_path)
    (tmp_path / "accel0").touch()
    assert hosts.in_cluster({}, tmp_path)
    assert not hosts.in_cluster({"JAX_PLATFORMS": "cpu"}, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Agreeing
# ---------------------------------------------------------------------------------------------------------------------


def preflight(*facts, timeout=10.0):
    """What `hosts.preflight` raises in each of as many threads as there are facts; None in those left out."""
    store, outcomes = Store(sum(one is not None for one in facts)), [None] * len(facts)

    def one(index):
        try:
            hosts.preflight(facts[index], store, index, len(facts), timeout)
        except Exception as error:
            outcomes[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i, fact in enumerate(facts) if fact is not None]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_hosts_that_agree_go_on():
    facts = {"config.train.batch_size": "2048", "stream": {"weights": [0.5, 0.5]}}
    assert preflight(facts, dict(facts), dict(facts)) == [None, None, None]


@pytest.mark.parametrize(
    "name",
    ["config.seed", "code (sha256 of openvla_jax)", "statistics of bridge_orig", "config.train.batch_size", "workdir"],
)
def test_all_hosts_stop_with_the_difference(name):
    facts = {"config.seed": "7", "code (sha256 of openvla_jax)": "ab", "statistics of bridge_orig": "cd",
             "config.train.batch_size": "2048", "workdir": "gs://a/b"}  # fmt: skip
    outcomes = preflight(facts, facts, facts | {name: "other"})
    assert len({str(error) for error in outcomes}) == 1
    assert isinstance(outcomes[0], hosts.DisagreementError) and isinstance(outcomes[0], ValueError)
    text = str(outcomes[0])
    assert f"{name} is {facts[name]!r} on process 0" in text and "'other' on process 2" in text and "\n" not in text
    assert text.count(" on process 0") == 1


def test_a_fact_that_one_host_lacks_is_a_difference():
    assert "extra is None on process 0" in str(preflight({}, {"extra": 1})[0])


def test_a_host_that_does_not_come_to_the_start_is_named():
    store = Store()
    store.key_value_set(hosts._FACTS + "1", json.dumps({"host": "b", "facts": {}}))
    with pytest.raises(hosts.HostError, match="process 2 did not come to the start within 0 s"):
        hosts.preflight({}, store, 0, 3, timeout=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# Watching
# ---------------------------------------------------------------------------------------------------------------------


def watches(count, **settings):
    """Watches that share a store, and the lines with which they name somebody."""
    store, lines = Store(), []
    settings = dict(beat_timeout=0.6, interval=0.02, on_lost=lines.append) | settings
    return [hosts.Watch(store, i, count, **settings) for i in range(count)], lines


def wait_for(lines, count=1, seconds=10.0):
    deadline = time.monotonic() + seconds
    while len(lines) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return lines


def test_a_silent_process_is_named_with_its_step():
    (a, b, c), lines = watches(3)
    with a, b, c:
        for watch in (a, b, c):
            watch.at(7, "data")
        time.sleep(0.1)
        c._stop.set()  # as SIGKILL would: no more posts, no goodbye
        c._thread.join()
        wait_for(lines, 2)
        c._store = None
    assert len(lines) == 2
    assert all("process 2 on host" in line and "at step 7 (data): no sign of life" in line for line in lines)


def test_a_process_that_never_came_is_named():
    (a, _), lines = watches(2, beat_timeout=0.2)
    with a:
        wait_for(lines)
    assert lines[0].startswith("process 1 on host ?, at step 0 (start): no sign of life")


def test_a_process_that_fails_says_why_and_one_that_ends_is_not_missed():
    (a, b), lines = watches(2)
    with a:
        with pytest.raises(OSError, match="disk"), b:
            raise OSError("the disk is full")
        wait_for(lines)
    assert lines == [f"process 1 on host {a._place['host']} failed: the disk is full"]

    (a, b), lines = watches(2, beat_timeout=0.2)
    with a:
        with b:
            pass
        time.sleep(0.5)
    assert lines == []


def test_the_host_that_the_others_wait_for_is_named():
    (a, b), lines = watches(2, hang_timeout=0.3)
    with a, b:
        for step in (1, 2):
            a.at(step, "step")
            b.at(step, "step")
        a.at(2, "data")
        a.at(3, "step")  # waits in a collective for b, which reads no data
        b.at(2, "data")
        wait_for(lines, 2)
    assert len(lines) == 2
    assert all("process 1 on host" in line and "at step 2 (data): hangs" in line for line in lines), lines


def test_nobody_hangs_before_the_first_step_or_while_steps_go_on():
    (a, b), lines = watches(2, hang_timeout=1.0)  # longer than a busy machine keeps a thread waiting
    with a, b:
        time.sleep(1.3)  # compiling
        for step in range(1, 26):
            a.at(step, "step")
            b.at(step, "step")
            time.sleep(0.05)
    assert lines == []


def test_one_process_watches_nobody():
    with hosts.Watch(None, 0, 1) as watch:
        watch.at(1, "step")
    hosts.preflight({"a": 1}, None, 0, 1)
    assert hosts.client() is None
