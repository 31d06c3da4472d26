"""Messages between the policy's process and the simulator's: a header in JSON, then arrays as they lie in memory.

    uint32 (big endian)   length of the header in bytes
    header                JSON object in UTF-8; "arrays" lists [name, dtype, shape] in the order of what follows
    bytes                 each array, C order, one after the other

A request has "do", what to do, beside its arguments. The answer has "error", one line, if that failed, and then "bug",
whether the simulator is at fault; "cpu" are the processor seconds of its process so far. Each request has exactly one
answer, in order. A process ends when its input does.
"""

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MAX_HEADER = 2**24  # bytes
MAX_ARRAYS = 2**31  # bytes of all arrays together: a long episode of two cameras is 0.2 GB
_LENGTH = struct.Struct(">I")

Message = dict[str, Any]


def encode(message: Mapping[str, Any]) -> bytes:
    """Returns the bytes of a message; its values are JSON or numpy arrays."""
    arrays = {name: np.ascontiguousarray(value) for name, value in message.items() if isinstance(value, np.ndarray)}
    header = {name: value for name, value in message.items() if name not in arrays}
    header["arrays"] = [[name, value.dtype.str, list(value.shape)] for name, value in arrays.items()]
    text = json.dumps(header).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *(value.tobytes() for value in arrays.values())])


def decode(read: Callable[[int], bytes]) -> Message:
    """Returns the message that `read` gives; `read(n)` returns exactly n bytes.

    Raises EOFError if `read` does, and ValueError if what comes is no message.
    """
    (length,) = _LENGTH.unpack(read(_LENGTH.size))
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes: at most {MAX_HEADER}")
    message = json.loads(read(length))
    if not isinstance(message, dict) or not isinstance(message.get("arrays"), list):
        raise ValueError("a header without a list of arrays")
    described = [(name, np.dtype(dtype), tuple(map(int, shape))) for name, dtype, shape in message.pop("arrays")]
    sizes = [dtype.itemsize * _count(shape) for _, dtype, shape in described]
    if min(sizes, default=0) < 0 or sum(sizes) > MAX_ARRAYS:
        raise ValueError(f"arrays of {sum(sizes)} bytes: from 0 to {MAX_ARRAYS}")
    for (name, dtype, shape), size in zip(described, sizes, strict=True):
        message[name] = np.frombuffer(read(size), dtype).reshape(shape)
    return message


def _count(shape: tuple[int, ...]) -> int:
    """The product of whole numbers of any size; -1 if one is negative."""
    count = 1
    for side in shape:
        if side < 0:
            return -1
        count *= side
    return count
