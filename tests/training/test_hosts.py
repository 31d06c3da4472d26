"""Hosts: joining, agreeing, and naming the one that is lost, with threads for processes and a dict for the store."""

import json
import socket
import threading

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
    """Watches that share a store; the tests look for them, at times of their own."""
    store = Store()
    return [hosts.Watch(store, i, count, on_lost=pytest.fail, **settings) for i in range(count)]


def test_watch_names_a_silent_process_with_its_step():
    a, b, c = watches(3, beat_timeout=30)
    for watch in (a, b, c):
        watch.at(7, "data")
        watch.look(0)
    for now in (10, 20, 29):
        assert a.look(now) == b.look(now) == ""
    for watch in (a, b):
        line = watch.look(45)
        assert "process 2 on host" in line and "at step 7 (data): no sign of life for 30 s" in line
        assert "process 0" not in line and "process 1" not in line


def test_watch_names_a_process_that_never_came():
    a, _ = watches(2, beat_timeout=30)
    assert a.look(100) == a.look(129) == ""
    assert a.look(131).startswith("process 1 on host ?, at step 0 (start): no sign of life")


def test_watch_tells_why_a_process_failed():
    a, b = watches(2)
    with pytest.raises(OSError, match="disk"), b:
        raise OSError("the disk is full")
    assert a.look(0) == f"process 1 on host {socket.gethostname()} failed: the disk is full"


def test_watch_does_not_miss_a_process_that_ended():
    a, b = watches(2, beat_timeout=30)
    with b:
        pass
    assert a.look(0) == a.look(100) == ""


def test_watch_names_the_host_that_the_others_wait_for():
    a, b = watches(2, hang_timeout=600)
    for step in (1, 2):
        a.at(step, "step")
        b.at(step, "step")
    a.at(2, "data")
    a.at(3, "step")  # waits in a collective for b, which reads no data
    b.at(2, "data")
    for now in range(0, 600, 20):  # both are alive all the time
        lines = a.look(now), b.look(now)
    assert lines == ("", "")
    assert a.look(600) == ""  # it saw the others' first posts at 20
    for line in (b.look(600), a.look(620)):
        assert "process 1 on host" in line and "at step 2 (data): hangs" in line


def test_watch_names_nobody_before_the_first_step_or_while_steps_go_on():
    a, b = watches(2, hang_timeout=600)
    for now in range(0, 2000, 20):  # compiling
        assert a.look(now) == b.look(now) == ""
    for step in range(1, 6):
        a.at(step, "step")
        b.at(step, "step")
        for _ in range(28):
            now += 20
            assert a.look(now) == b.look(now) == ""


def test_watch_calls_on_lost_from_its_thread():
    called, lines = threading.Event(), []
    store = Store()
    watch = hosts.Watch(
        store, 0, 2, beat_timeout=0.0, interval=0.01, on_lost=lambda line: (lines.append(line), called.set())
    )
    with watch:
        assert called.wait(60)
    assert lines[0].startswith("process 1 on host ?")


def test_one_process_watches_nobody():
    with hosts.Watch(None, 0, 1) as watch:
        watch.at(1, "step")
    hosts.preflight({"a": 1}, None, 0, 1)
    assert hosts.client() is None
