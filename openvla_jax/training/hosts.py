"""Several processes, one run: joining them, the check that they agree, and the watch that names one that is lost.

Everything goes through the key-value store of jax's coordination service, which process 0 runs, and not through the
accelerators: a collective waits for ever for a host that is gone. With one process all of this does nothing.
"""

import atexit
import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax

from openvla_jax.errors import InputError

LOST = 75  # exit code: another host is lost or failed, or storage does; the same command continues from the last save
_BEATS, _FACTS, _COORDINATOR = "openvla_jax/beat/", "openvla_jax/facts/", "openvla_jax/coordinator"
_INTERVAL = 3.0  # seconds between posts
_PREFLIGHT_TIMEOUT = 1800.0  # hosts open and describe their data first, each at its own pace


class HostError(RuntimeError):
    """Another host is lost, hangs or failed."""


class DisagreementError(InputError):
    """The hosts were started with different settings, code or data."""


# ---------------------------------------------------------------------------------------------------------------------
# Joining
# ---------------------------------------------------------------------------------------------------------------------


def initialize(coordinator: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Joins this process to the others: by the arguments, or by itself on TPU VMs, GKE, Slurm and Open MPI.

    To be called before anything asks jax for devices. On a machine that is part of nothing it does nothing. InputError
    for arguments that are incomplete or impossible; HostError if the others do not arrive.
    """
    given = {"coordinator": coordinator, "num_processes": processes, "process_id": index}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == 3 and not in_cluster(os.environ):
        return
    arguments: dict[str, Any] = {}
    if len(missing) < 3:
        if missing or coordinator is None or processes is None or index is None:
            raise InputError(
                f"{' and '.join(missing)} missing: --coordinator, --num_processes and --process_id belong together"
            )
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"--coordinator {coordinator!r}: give HOST:PORT of process 0")
        if not 0 <= index < processes:
            raise InputError(f"--process_id {index} is not in 0..{processes - 1}, as --num_processes {processes} says")
        arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": index}
    try:
        jax.distributed.initialize(**arguments)
    except ValueError as error:
        if arguments:
            raise InputError(f"--coordinator {coordinator}: {error}") from error
        logging.info("jax finds no other processes here (%s): this one continues alone", error)
    except RuntimeError as error:
        raise HostError(f"the processes did not all come together: {' '.join(str(error).split())[:300]}") from error


def in_cluster(environment: Mapping[str, str], devices: Path = Path("/dev")) -> bool:
    """Whether jax should look for other processes: on a machine with TPU chips, or as one of several tasks.

    Elsewhere it is not asked, because some of its searches wait for answers from the network.
    """
    if any(int(environment.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    if "tpu" not in environment.get("JAX_PLATFORMS", "tpu"):
        return False
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))


def client() -> Any | None:
    """Returns the coordination service's client, or None if there is only one process."""
    from jax._src.distributed import global_state  # no public name; Orbax takes it from here, too

    return global_state.client if jax.process_count() > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# Agreeing
# ---------------------------------------------------------------------------------------------------------------------


def preflight(
    facts: Mapping[str, Any], store: Any, index: int, count: int, timeout: float = _PREFLIGHT_TIMEOUT
) -> None:
    """Compares `facts` (JSON values by name) of all processes; DisagreementError in all of them where any differ.

    Process 0 compares and publishes what it found, so that the work grows with the number of processes alone.
    """
    if store is None:
        return
    store.key_value_set(f"{_FACTS}{index}", json.dumps({"host": socket.gethostname(), "facts": facts}, default=str))
    verdict = f"{_FACTS}verdict"
    if index == 0:
        everyone = {}
        for other in range(count):
            try:
                everyone[other] = json.loads(
                    store.blocking_key_value_get(f"{_FACTS}{other}", max(1, int(1000 * timeout)))
                )
            except Exception as error:  # the store's own types differ between versions of jax
                raise HostError(f"process {other} did not come to the start within {timeout:.0f} s") from error
        store.key_value_set(verdict, differences(everyone))
    found = store.blocking_key_value_get(verdict, int(1000 * (timeout + 60)))
    store.wait_at_barrier("openvla_jax/preflight", 60_000)  # all have read it before any of them ends
    if found:
        raise DisagreementError(found)


def gather(store: Any | None, name: str, timeout: float = 3600.0) -> None:
    """Waits for all processes. Some may be minutes ahead, and collectives on CPUs give up after half a minute."""
    if store is not None:
        store.wait_at_barrier(f"openvla_jax/{name}", int(1000 * timeout))


def differences(everyone: Mapping[int, Mapping[str, Any]]) -> str:
    """One line that says in what processes differ from process 0, each with its value and host; empty if in nothing."""
    first = everyone[0]["facts"]
    found = []
    for name in sorted(set().union(*(one["facts"] for one in everyone.values()))):
        other = [i for i, one in everyone.items() if one["facts"].get(name) != first.get(name)]
        if other:
            i = other[0]
            more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
            found.append(
                f"{name} is {first.get(name)!r} on process 0 ({everyone[0]['host']}), "
                f"{everyone[i]['facts'].get(name)!r} on process {i} ({everyone[i]['host']}){more}"
            )
    more = f"; and {len(found) - 6} more differences" if len(found) > 6 else ""
    return (
        f"the hosts disagree: {'; '.join(found[:6])}{more}: start all with one command, code and data" if found else ""
    )


# ---------------------------------------------------------------------------------------------------------------------
# Watching
# ---------------------------------------------------------------------------------------------------------------------


class Watch(contextlib.AbstractContextManager):
    """Posts every few seconds what this process does, and reads what the others post.

    A process that posts nothing for `beat_timeout` seconds is dead or cut off. One that failed posts that. If no
    process advances for `hang_timeout` seconds (0 disables), the slowest are reported as hung. `on_lost` is then
    called, from a thread, with one line that names them. By default it prints the line and ends this process, because
    its main thread may wait in a collective that will never end.
    """

    def __init__(
        self,
        store: Any | None,
        index: int,
        count: int,
        *,
        hang_timeout: float = 0.0,
        beat_timeout: float = 30.0,
        interval: float = _INTERVAL,
        on_lost: Callable[[str], None] | None = None,
    ):
        self._index, self._count = index, count
        self._store: Any = store
        self._hang_timeout, self._beat_timeout, self._interval = hang_timeout, beat_timeout, interval
        self._on_lost = on_lost or _die
        self._place: dict[str, Any] = {"host": socket.gethostname(), "turn": 0, "step": 0, "doing": "start"}
        self._seen: dict[int, tuple[float, dict[str, Any]]] = {}  # when a process's post last changed, and the post
        self._moved = time.monotonic()  # when the slowest process last came further
        self._behind = -1
        self._posts = 0
        self._stop = threading.Event()

    def at(self, step: int, doing: str) -> None:
        """What the main thread turns to. Every process says the same in the same order."""
        self._place = self._place | {"turn": self._place["turn"] + 1, "step": step, "doing": doing}

    def __enter__(self) -> "Watch":
        if self._store is not None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="watch")
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if self._store is None:
            return
        failed = kind is not None and kind is not SystemExit
        if failed and isinstance(error, jax.errors.JaxRuntimeError):
            # Most likely because another host is gone: the thread finds that out, and ends this process.
            time.sleep(self._beat_timeout + 3 * self._interval)
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # nobody may be left to be told
            self._post(failed=" ".join(str(error).split())[:500] or kind.__name__ if failed and kind else None)
            if failed and self._index == 0:
                time.sleep(2 * self._interval)  # the others read it here

    def _post(self, **more: Any) -> None:
        self._posts += 1
        text = json.dumps(self._place | {"posts": self._posts, "done": self._stop.is_set()} | more)
        self._store.key_value_set(f"{_BEATS}{self._index}", text, allow_overwrite=True)

    def look(self, now: float) -> str:
        """Posts what this process does and returns one line about lost processes, or "" if all is well.

        `now` is the time in seconds, of any clock that never goes back.
        """
        self._post()
        posts = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in self._store.key_value_dir_get(_BEATS)}
        return self._lost(posts, now)

    def _run(self) -> None:
        unreachable = None
        while not self._stop.wait(self._interval):
            try:
                lost = self.look(time.monotonic())
                unreachable = None
            except Exception as error:
                unreachable = unreachable or time.monotonic()
                if time.monotonic() - unreachable > self._beat_timeout:
                    self._on_lost(f"process 0, the coordinator, cannot be reached ({str(error).splitlines()[0]})")
                    return
                continue
            if lost and not self._stop.is_set():
                self._on_lost(lost)
                return

    def _lost(self, posts: Mapping[int, dict[str, Any]], now: float) -> str:
        """The line about processes that are lost, given all posts; empty where all is well."""
        for i in range(self._count):
            before = self._seen.get(i)
            if i in posts and (before is None or before[1] != posts[i]):
                self._seen[i] = (now, posts[i])
            elif before is None:  # not there yet: since this process began to watch
                self._seen[i] = (now, {"host": "?", "turn": 0, "step": 0, "doing": "start"})
        last = {i: post for i, (_, post) in self._seen.items()}
        for i, post in last.items():
            if post.get("failed"):
                return f"{_name(i, post)} failed: {post['failed']}"
        silent = [
            i for i, (when, post) in self._seen.items() if now - when > self._beat_timeout and not post.get("done")
        ]
        if silent:
            who = ", ".join(f"{_name(i, last[i])}, {_where(last[i])}" for i in silent[:4])
            return f"{who}: no sign of life for {self._beat_timeout:.0f} s (killed, frozen or cut off)"
        behind = min(post["turn"] for post in last.values())
        running = any(post["turn"] for post in last.values())
        if behind != self._behind or not running:  # starting takes as long as it takes, while all do
            self._behind, self._moved = behind, now
        if not self._hang_timeout or now - self._moved < self._hang_timeout:
            return ""
        slow = [i for i, post in last.items() if post["turn"] == behind]
        if len(slow) == self._count:
            return f"all hosts hang, {_where(last[0])}: no step came to its end for {self._hang_timeout:.0f} s"
        who = ", ".join(f"{_name(i, last[i])}, {_where(last[i])}" for i in slow[:4])
        return f"{who}: hangs; the other hosts have waited for {self._hang_timeout:.0f} s"


def _name(index: int, post: Mapping[str, Any]) -> str:
    return f"process {index} on host {post['host']}"


def _where(post: Mapping[str, Any]) -> str:
    return f"at step {post['step']} ({post['doing']})"


# ---------------------------------------------------------------------------------------------------------------------
# Ending
# ---------------------------------------------------------------------------------------------------------------------

# What jax does when process 0 is gone is to abort the other processes at once, from C++, with a stack trace and without
# a chance for Python to speak. This child outlives its process and says in one line what happened.
_OBITUARY = """
import signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if not sys.stdin.buffer.read():
    who, address, first = sys.argv[1:]
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), 5).close()
        print(f"error: {who} was killed or crashed", file=sys.stderr)
    except OSError:
        print(f"error: {who} was ended because {first}, the coordinator at {address}, is gone; the same command on all "
              "hosts continues from the last checkpoint", file=sys.stderr)
"""
_children: list[subprocess.Popen] = []


def leave_obituary(store: Any | None) -> None:
    """Starts the child that speaks for this process if it should be aborted."""
    if store is None or _children:
        return
    from jax._src.distributed import global_state

    if jax.process_index() == 0:
        store.key_value_set(_COORDINATOR, socket.gethostname())
    first = f"process 0 on host {store.blocking_key_value_get(_COORDINATOR, 60_000)}"
    who = f"process {jax.process_index()} on host {socket.gethostname()}"
    command = [sys.executable, "-S", "-E", "-c", _OBITUARY, who, str(global_state.coordinator_address), first]
    _children.append(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    )
    atexit.register(_in_order)  # runs before jax's own exit handler, which was registered earlier


def _in_order() -> None:
    """Tells the child that this process ends by itself."""
    while _children:
        with contextlib.suppress(OSError):
            _children.pop().communicate(b"ended in order", timeout=5)


def leave(code: int) -> NoReturn:
    """Ends the process. With several it must not wait for the others at the door, as jax's exit handler does."""
    from jax._src.distributed import global_state

    if global_state.client is None or global_state.num_processes == 1:
        sys.exit(code)
    _in_order()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die(line: str) -> NoReturn:
    print(f"error: {line}; the same command on all hosts continues from the last checkpoint", file=sys.stderr)
    sys.stderr.flush()
    if jax.process_index() == 0:  # with it goes the store, from which the others are about to learn the same
        time.sleep(3 * _INTERVAL)
    leave(LOST)
