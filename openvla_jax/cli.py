"""Command lines: one way to parse arguments, to report bad input, and to exit.

Exit codes: 0 done; 1 a bug, reported with the place of its traceback; 2 bad input, reported in one line on stderr;
130 stopped by Ctrl-C. Commands add their own. `OPENVLA_TRACEBACK=1` shows the traceback of every error above its line.
"""

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from openvla_jax.errors import InputError, NonFiniteError

BUG, BAD_INPUT, INTERRUPTED = 1, 2, 130
# What a user can fix: arguments and files, damaged weights, the disk and its permissions, a package, memory.
USER_ERRORS = (InputError, NonFiniteError, OSError, ImportError, MemoryError)
# The extra that installs a package which only some commands need.
EXTRAS = {
    "av": "lerobot",
    "fastapi": "serve",
    "matplotlib": "plots",
    "prometheus_client": "serve",
    "pyarrow": "lerobot",
    "tensorflow": "data",
    "tensorflow_datasets": "data",
    "uvicorn": "serve",
}


class Parser(argparse.ArgumentParser):
    """An argument parser that takes flags by their full names and reports errors in one line."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        bad_input(f"{message}; see {self.prog} --help")


def command(run: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """Makes `main(argv=None)` of `run(arguments)`, for use as `sys.exit(main())`.

    `run` returns the exit code, or None for 0. What a user can fix ends the process through `bad_input`; any other
    exception is a bug and ends it through `report_bug`.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        try:
            return run(sys.argv[1:] if argv is None else argv) or 0
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if is_users(error):
                bad_input(error)
            report_bug(error)
            return BUG

    return main


def is_users(error: BaseException) -> bool:
    """Returns whether a user can fix what went wrong, without a change of the program."""
    return isinstance(error, USER_ERRORS) or _out_of_memory(error)


def bad_input(error: object) -> NoReturn:
    """Reports `error`, an exception or a text, in one line on stderr and exits with code 2."""
    report(error)
    sys.exit(BAD_INPUT)


def report(error: object) -> None:
    """Prints `error` in one line on stderr, below its traceback if OPENVLA_TRACEBACK is set."""
    if isinstance(error, BaseException) and os.environ.get("OPENVLA_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {' '.join(_text(error).split())}", file=sys.stderr)


def report_bug(error: BaseException) -> None:
    """Prints on stderr that `error` is a bug, in one line, and where its traceback is: in a temporary file."""
    place = "above"
    if os.environ.get("OPENVLA_TRACEBACK") or (place := _keep_traceback(error)) == "above":
        traceback.print_exception(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    print(f"error: this is a bug in openvla_jax: {text}; its traceback is {place}: please report it", file=sys.stderr)


def _keep_traceback(error: BaseException) -> str:
    try:
        with tempfile.NamedTemporaryFile("w", prefix="openvla_jax_", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
            return f"in {file.name}"
    except OSError:  # a full disk, or no folder that may be written
        return "above"


def _out_of_memory(error: BaseException) -> bool:
    """Returns whether a device or TensorFlow ran out of memory or disk; their errors have no class that tells."""
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError", "ResourceExhaustedError") and (
        "RESOURCE_EXHAUSTED" in str(error) or "No space left on device" in str(error)
    )


def _text(error: object) -> str:
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(error.name or "")):
        return f"{error}; pip install 'openvla_jax[{extra}]'"
    if isinstance(error, MemoryError) or (isinstance(error, BaseException) and "RESOURCE_EXHAUSTED" in str(error)):
        cause = (str(error).splitlines() or ["no more"])[0]
        return f"out of memory ({cause}): take a smaller batch, lower precision, or a machine with more"
    return str(error)
