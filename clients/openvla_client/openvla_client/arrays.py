"""Arrays in JSON, as the package json-numpy writes them, which OpenVLA's own clients use. No pickle.

An array is {"__numpy__": base64 of its bytes, "dtype": "|u1", "shape": [...]}. It is decoded strictly: json-numpy's own
decoder believes any dtype and shape.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np

from openvla_client.errors import ClientError, reason


def dumps(value: Any) -> str:
    """Returns JSON. Raises ClientError for a NaN or infinity anywhere in it."""
    try:
        return json.dumps(value, default=encode_array, allow_nan=False)
    except ClientError:
        raise
    except ValueError as error:
        raise ClientError(f"a value has no JSON form ({error})") from None


def encode_array(array: Any) -> dict[str, Any]:
    """Returns the json-numpy object of an array. Raises ClientError for a NaN or infinity in it."""
    if not isinstance(array, (np.ndarray, np.generic)):
        raise TypeError(f"{type(array).__name__} has no JSON form")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ClientError(f"an array of shape {array.shape} holds NaN or infinity")
    array = np.ascontiguousarray(array) if array.ndim else np.asarray(array)
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def decode_array(value: dict[str, Any], where: str) -> np.ndarray:
    """Returns the array of a json-numpy object: numbers or booleans only, as many bytes as its shape asks for.

    Raises ClientError that names `where`.
    """
    data, dtype, shape = (value.get(key) for key in ("__numpy__", "dtype", "shape"))
    if set(value) != {"__numpy__", "dtype", "shape"}:
        raise ClientError(
            f"{where}: a json-numpy array has the keys __numpy__, dtype and shape, got {short(sorted(value))}"
        )
    if not isinstance(dtype, str) or len(dtype) > 8:
        raise ClientError(f"{where}: dtype {short(dtype)} is not the name of a number type, as '|u1'")
    try:
        kind = np.dtype(dtype)
    except Exception as error:
        raise ClientError(f"{where}: dtype {short(dtype)}: {reason(error)}; send '|u1' for uint8") from None
    if kind.kind not in "biuf" or kind.shape:
        raise ClientError(f"{where}: dtype {short(dtype)} does not hold plain numbers; send '|u1' for uint8")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise ClientError(f"{where}: shape {short(shape)} is not a list of sizes")
    if not isinstance(data, str):
        raise ClientError(f"{where}: its data are no text: send base64")
    size = math.prod(shape) * kind.itemsize
    fits = len(data) == 4 * -(-size // 3)  # before anything is decoded
    raw = decode_base64(data, where) if fits else b""
    if not fits or len(raw) != size:
        raise ClientError(
            f"{where}: {len(data)} characters of base64 are not an array of shape {short(shape)} and dtype {dtype}"
        )
    return np.frombuffer(raw, kind).reshape(shape)


def decode_base64(data: str, where: str) -> bytes:
    """Returns the bytes. Raises ClientError that names `where`."""
    try:
        return base64.b64decode(data, validate=True)
    except Exception as error:
        raise ClientError(f"{where}: its data are not base64: {reason(error)}; encode them again") from None


def short(value: Any) -> str:
    """Returns the value as it stands in Python, in ASCII, cut for a message."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
