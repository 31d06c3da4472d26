"""Text of datasets: instructions as other tools store them, what only looks like text, and text in figures."""

import re
from collections.abc import Sequence

import numpy as np

from openvla_jax.data import DataError
from openvla_jax.errors import InputError
from openvla_jax.tokens.prompts import prompt_text

_SHOWN = 60  # characters of a text in a message
# What str() makes of bytes, arrays, other containers and objects, of a missing value and of a number.
_PRINTED = re.compile(
    r"""b(['"]).*\1 | \[.*\] | \(.*,.*\) | \{.*\} | <.+\ at\ 0x[0-9a-f]+> | (np|numpy|tf|jnp|array|tensor)[\w.]*\(.*\)
    | none | null | nan | nat | true | false | [-+]?\d+(\.\d*)?(e[-+]?\d+)?""",
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)


def decode(raw: bytes) -> str:
    """Returns a stored instruction as training reads it.

    Raises DataError if it is not UTF-8, InputError if nothing of it is left in a prompt.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        other = "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "Latin-1 or another encoding"
        raise DataError(
            f"instruction {raw[:_SHOWN]!r} is not UTF-8 but {other} (byte {raw[error.start]:#04x} at {error.start}): "
            f"store it as UTF-8"
        ) from error
    prompt_text(text)
    return text


def suspicion(text: str) -> str:
    """Returns why a text does not look like an instruction, in a few words; "" if it does."""
    if "\0" in text:
        return "holds NUL characters, as UTF-16 read as UTF-8 does"
    if _PRINTED.fullmatch(text.strip()):
        return "looks like a printed Python value, not like text"
    return ""


def instructions(value: object, steps: int, where: str) -> list[str]:
    """Returns the instruction of each step of a demonstration.

    Args:
        value: a text (str, or bytes in UTF-8), or a sequence or array of one text or of one for each step.
        steps: how many steps there are.
        where: begins the message of an error.

    Raises:
        DataError: another type or number, an empty text, another encoding, or the printed form of a Python value.
    """
    if isinstance(value, np.ndarray):
        squeezed = value.squeeze()
        if squeezed.ndim > 1:
            raise DataError(f"{where}: instructions have shape {list(value.shape)}: give one text, or one per step")
        items = squeezed.reshape(-1).tolist()
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        items = list(value)
    else:
        items = [value]
    if len(items) not in (1, steps):
        raise DataError(f"{where}: {len(items)} instructions for {steps} steps: give one text, or one per step")
    texts = [_one(item, where if len(items) == 1 else f"{where}, step {step}") for step, item in enumerate(items)]
    return texts * steps if len(texts) == 1 else texts


def _one(item: object, where: str) -> str:
    if not isinstance(item, str | bytes):
        raise DataError(f"{where}: the instruction is {repr(item)[:_SHOWN]} ({type(item).__name__}), not text")
    try:
        text = decode(item) if isinstance(item, bytes) else item
        prompt_text(text)
    except InputError as error:
        raise DataError(f"{where}: {error}") from error
    if reason := suspicion(text):
        raise DataError(f"{where}: instruction {text[:_SHOWN]!r} {reason}: store the text itself")
    return str(text)


def literal(text: str) -> str:
    """Returns a text for matplotlib that draws every character as it is: a $ begins no formula."""
    return text.replace("$", r"\$")
