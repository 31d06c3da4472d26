"""Messages between the policy's process and the simulator's: a header in JSON, then arrays as they lie in memory.

    uint32 (big endian)   length of the header in bytes
    header                JSON object in UTF-8; "arrays" lists [name, dtype, shape] in the order of what follows
    bytes                 each array, C order, one after the other

A request has "do", what to do, beside its arguments. The answer has "error", one line, if that failed, and then "bug",
whether the simulator is at fault; "cpu" are the processor seconds of its process so far. Each request has exactly one
answer, in order. A process ends when its input does.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from openvla_jax.errors import InputError, reading

MAX_HEADER = 2**24  # bytes
MAX_ARRAYS = 2**31  # bytes of all arrays together: a long episode of two cameras is 0.2 GB
_LENGTH = struct.Struct(">I")

Message = dict[str, Any]


def encode(message: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a message; its values are JSON or numpy arrays."""
    arrays = {name: value for name, value in message.items() if isinstance(value, np.ndarray)}
    header = {name: value for name, value in message.items() if name not in arrays}
    header["arrays"] = [[name, value.dtype.str, list(value.shape)] for name, value in arrays.items()]
    text = json.dumps(header).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *(value.tobytes() for value in arrays.values())])


def decode(read: Callable[[int], bytes]) -> Message:
    """Returns the message that `read` gives; `read(n)` returns exactly n bytes, or raises.

    Raises InputError if what comes is no message.
    """
    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    if length > MAX_HEADER:
        raise InputError(f"a message with a header of {length} bytes: at most {MAX_HEADER}")
    message, described = _header(read(length))
    for name, dtype, shape in described:
        data = read(dtype.itemsize * math.prod(shape))
        with reading(f"array {name!r} of a message", ""):
            message[name] = np.frombuffer(data, dtype).reshape(shape)
    return message


def _header(text: bytes) -> tuple[Message, list[tuple[str, np.dtype, tuple[int, ...]]]]:
    """The values of a header, and the name, dtype and shape of each array that follows it."""
    with reading("the header of a message", ""):
        message = json.loads(text)
        described = [
            (str(name), np.dtype(str(kind)), tuple(map(int, shape))) for name, kind, shape in message.pop("arrays")
        ]
        if any(side < 0 for _, _, shape in described for side in shape):
            raise ValueError("an array has a negative size")
        if (size := sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in described)) > MAX_ARRAYS:
            raise ValueError(f"arrays of {size} bytes: at most {MAX_ARRAYS}")
        return message, described
