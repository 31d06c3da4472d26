"""The policy's side of the connection: starts a simulator's process, asks it, notices if it dies or hangs."""

import contextlib
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from openvla_jax.errors import InputError
from openvla_jax.sim.libero import messages

PYTHON_VARIABLE = "OPENVLA_LIBERO_PYTHON"
INSTALL = f"run make libero-env, or set {PYTHON_VARIABLE} to a Python that has LIBERO"
_CHECKOUT = Path(__file__).resolve().parents[3]
TIMEOUT = 300.0  # seconds: building a task takes up to 20 on a loaded machine
START_SECONDS = 120.0  # that the first answer may take at least: the simulator's imports, compiled once
SHOWN = 300  # characters of what a dead process said last


class SimulatorError(RuntimeError):
    """A simulator's process died, hung or failed. A new one may do better."""


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Turns a simulator that fails into an error that a user can fix: at its start its environment is incomplete."""
    try:
        yield
    except SimulatorError as error:
        raise InputError(f"{error}; run the command again, and if it fails again {INSTALL}") from error


def python_path() -> Path:
    """Returns the Python of the simulator's environment. Raises InputError if it is not installed."""
    named = os.environ.get(PYTHON_VARIABLE)
    path = Path(named) if named else _CHECKOUT / ".venv-libero" / "bin" / "python"
    if not path.is_file():
        raise InputError.of(path, "LIBERO's environment is not installed", INSTALL)
    return path


class Simulator:
    """A simulator's process. It starts with the first request, and again with the first after it died.

    After each start a task has to be loaded again. `cpu_seconds` are those of all processes, as of the last answer.
    """

    def __init__(self, timeout: float = TIMEOUT, command: Sequence[str] | None = None):
        """timeout: seconds that an answer may take. command: what to start instead of LIBERO's simulator."""
        launch = Path(__file__).with_name("launch.py")
        self.command = list(command) if command else [str(python_path()), "-P", str(launch)]
        self.timeout, self._earlier, self._now = timeout, 0.0, 0.0
        self._process: subprocess.Popen | None = None
        self._log: IO[bytes] | None = None

    def ask(self, do: str, **values: Any) -> messages.Message:
        """Sends a request and returns its answer.

        Raises InputError for what the simulator says a user can fix, and SimulatorError, after which the process is
        gone, if it dies, does not answer in time, or fails.
        """
        seconds = self.timeout if self._process else max(self.timeout, START_SECONDS)
        process = self._process or self._start()
        try:
            deadline = time.monotonic() + seconds
            assert process.stdin and process.stdout
            process.stdin.write(messages.encode({"do": do, **values}))
            process.stdin.flush()
            answer = messages.decode(_Reader(process.stdout.fileno(), deadline).read)
        except TimeoutError:
            raise self._lost(f"did not answer {do!r} within {seconds:g} s") from None
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            raise self._lost(f"died with code {process.returncode} at {do!r}") from None
        except InputError as error:
            raise self._lost(f"answered {do!r} with no message ({error})") from None
        except BaseException:  # Ctrl-C: the answer would be taken for the next request's
            self.close()
            raise
        if "error" in answer:
            if not answer.get("bug"):
                raise InputError(answer["error"])
            raise self._lost(f"failed at {do!r}: {answer['error']}")
        self._now = answer.pop("cpu", self._now)
        return answer

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the simulator's processes."""
        return self._earlier + self._now

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()  # type: ignore[union-attr]
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _start(self) -> subprocess.Popen:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process runs
        self._earlier, self._now = self.cpu_seconds, 0.0
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for this process, which ends the other
            )
        except OSError as error:
            raise InputError.of(
                self.command[0], f"cannot be started: {error.strerror}", "run make libero-env"
            ) from None
        return self._process

    def _lost(self, what: str) -> SimulatorError:
        """Ends the process; returns the error that says so, with the last line that it wrote."""
        said = ""
        if self._log is not None:
            self._log.seek(0)
            lines = self._log.read()[-10_000:].decode(errors="replace").strip().splitlines()
            said = f": {lines[-1].strip()[:SHOWN]}" if lines else ""
        self.close()
        return SimulatorError(f"the simulator {what}{said}")


class _Reader:
    """Reads a pipe until a deadline."""

    def __init__(self, descriptor: int, deadline: float):
        self.descriptor, self.deadline = descriptor, deadline

    def read(self, count: int) -> bytes:
        """Returns exactly `count` bytes. Raises EOFError at the end, TimeoutError after the deadline."""
        parts = []
        while count:
            left = self.deadline - time.monotonic()
            if left <= 0 or not select.select([self.descriptor], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self.descriptor, min(count, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def _environment() -> dict[str, str]:
    """The environment of a simulator's process.

    Its Python must not find this one's packages, may keep what it compiles of its own, and uses one thread, because
    several simulators share the cores.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {"OMP_NUM_THREADS": "1", **kept, "PYTHONDONTWRITEBYTECODE": ""}
