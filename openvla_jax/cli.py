"""Command lines: one way to parse arguments, to report bad input, and to exit.

Exit codes: 0 done; 2 bad input, reported in one line on stderr; 130 stopped by Ctrl-C. Commands add their own.
`OPENVLA_TRACEBACK=1` shows the traceback of an error above its line.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

BAD_INPUT, INTERRUPTED = 2, 130
# What a user can fix. Every other exception is a fault of the program and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError)
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

    `run` returns the exit code, or None for 0. Its USER_ERRORS end the process through `bad_input`.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        try:
            return run(sys.argv[1:] if argv is None else argv) or 0
        except USER_ERRORS as error:
            bad_input(error)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return INTERRUPTED

    return main


def bad_input(error: object) -> NoReturn:
    """Reports `error`, an exception or a text, in one line on stderr and exits with code 2."""
    report(error)
    sys.exit(BAD_INPUT)


def report(error: object) -> None:
    """Prints `error` in one line on stderr, below its traceback if OPENVLA_TRACEBACK is set."""
    if isinstance(error, BaseException) and os.environ.get("OPENVLA_TRACEBACK"):
        traceback.print_exception(error)
    print(f"error: {' '.join(_text(error).split())}", file=sys.stderr)


def _text(error: object) -> str:
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(error.name or "")):
        return f"{error}; pip install 'openvla_jax[{extra}]'"
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() of a KeyError adds quotation marks
    return str(error)
