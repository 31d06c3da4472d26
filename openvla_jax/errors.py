"""Errors of input: what a user can fix. Commands report them in one line and exit with code 2.

Every other exception is a fault of the program (`openvla_jax.cli`).
"""

import contextlib
import os
from collections.abc import Iterator

MAX_REASON = 300  # characters of another library's message


class InputError(ValueError):
    """An argument, a setting or a file is wrong. The message is one line: what is wrong, where, how to fix it."""

    @classmethod
    def of(cls, path: os.PathLike | str, what: str, fix: str = "") -> "InputError":
        """Returns the error of a file or folder: `<path>: <what>; <fix>`."""
        return cls(f"{os.fspath(path)}: {what}" + (f"; {fix}" if fix else ""))


class NonFiniteError(RuntimeError):
    """A NaN or infinity was about to leave the program. The weights or statistics are at fault, not the request."""


@contextlib.contextmanager
def reading(
    path: os.PathLike | str, fix: str = "download or copy it again", kind: type[InputError] = InputError
) -> Iterator[None]:
    """Turns any failure inside the block into an error that names `path`, a file or folder that others wrote.

    Args:
        path: what is being read.
        fix: what the user can do if the content is damaged or has another form.
        kind: class of the error raised.

    Raises:
        kind: for every exception, with its cause in one line. InputError passes unchanged, because it names its place
            already, and so does ModuleNotFoundError, because a missing package is no fault of the file.
    """
    try:
        yield
    except (InputError, ModuleNotFoundError):
        raise
    except OSError as error:  # permissions, a disk: the content may be fine
        if not error.strerror:  # a decoder's own OSError, as PIL's for a damaged image
            raise kind.of(path, reason(error), fix) from error
        raise kind.of(path, f"cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise kind.of(path, "needs more memory than there is", fix) from error
    except Exception as error:
        raise kind.of(path, reason(error), fix) from error


def reason(error: BaseException) -> str:
    """Returns the cause of an exception of any library, in one short line.

    A KeyError says only its key, an AttributeError or TypeError speaks of Python: the line says what that means for
    the file.
    """
    text = " ".join(str(error).split())[:MAX_REASON]
    name = type(error).__name__
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return f"has no {error.args[0]!r}"
    if isinstance(error, InputError):
        return text
    if isinstance(error, TypeError | AttributeError | LookupError):
        return f"does not have the expected form ({name}: {text})"
    return f"{text} ({name})" if text else name
