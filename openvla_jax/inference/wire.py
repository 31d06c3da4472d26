"""What crosses the network: JSON with arrays as json-numpy writes them, or images as base64 JPEG or PNG. No pickle.

json-numpy (which OpenVLA's clients use) spells an array {"__numpy__": base64 of its bytes, "dtype": "|u1", "shape":
[...]}. It is decoded here strictly: its own decoder believes any dtype and shape.
"""

import base64
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from openvla_jax.config import nearest
from openvla_jax.errors import InputError, NonFiniteError, reading
from openvla_jax.types import Observation

MAX_PIXELS = 16 * 2**20  # of one image: a few kilobytes of PNG can declare gigabytes
REQUEST_KEYS = ("image", "images", "instruction", "state", "unnorm_key")
FORM = "an object with instruction, image or images, and optionally state and unnorm_key"


class BadRequestError(InputError):
    """A request that cannot be served; the message says what is wrong with it."""


def dumps(value: Any) -> str:
    """JSON with arrays as json-numpy writes them. Raises NonFiniteError for a NaN or infinity anywhere in it."""
    try:
        return json.dumps(value, default=encode_array, allow_nan=False)
    except ValueError as error:
        raise NonFiniteError(f"a value has no JSON form ({error})") from None


def encode_array(array: Any) -> dict[str, Any]:
    """Returns the json-numpy object of an array. Raises NonFiniteError for a NaN or infinity in it."""
    if not isinstance(array, np.ndarray | np.generic):
        raise TypeError(f"{type(array).__name__} has no JSON form")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise NonFiniteError(f"an array of shape {array.shape} holds NaN or infinity")
    array = np.ascontiguousarray(array) if array.ndim else np.asarray(array)
    data = base64.b64encode(array.tobytes()).decode()
    return {"__numpy__": data, "dtype": array.dtype.str, "shape": list(array.shape)}


def decode_array(value: dict[str, Any], where: str) -> np.ndarray:
    """The array of a json-numpy object: numbers or booleans only, and as many bytes as its shape asks for."""
    data, dtype, shape = (value.get(key) for key in ("__numpy__", "dtype", "shape"))
    if set(value) != {"__numpy__", "dtype", "shape"}:
        raise BadRequestError(
            f"{where}: a json-numpy array has the keys __numpy__, dtype and shape, got {_keys(value)}"
        )
    if not isinstance(dtype, str) or len(dtype) > 8:
        raise BadRequestError(f"{where}: dtype {_short(dtype)} is not the name of a number type, as '|u1'")
    with reading(f"{where}: dtype {_short(dtype)}", "send '|u1' for uint8", BadRequestError):
        kind = np.dtype(dtype)
    if kind.kind not in "biuf" or kind.shape:
        raise BadRequestError(f"{where}: dtype {_short(dtype)} does not hold plain numbers; send '|u1' for uint8")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise BadRequestError(f"{where}: shape {_short(shape)} is not a list of sizes")
    if not isinstance(data, str):
        raise BadRequestError(f"{where}: its data are {_kind(data)}: send base64 text")
    size = math.prod(shape) * kind.itemsize
    fits = len(data) == 4 * -(-size // 3)  # before anything is decoded
    raw = _base64(data, where) if fits else b""
    if not fits or len(raw) != size:
        raise BadRequestError(
            f"{where}: {len(data)} characters of base64 are not an array of shape {_short(shape)} and dtype {dtype}"
        )
    return np.frombuffer(raw, kind).reshape(shape)


def loads(text: bytes | str) -> Any:
    """JSON of a request; NaN and other non-standard numbers are refused."""

    def refuse(name: str) -> None:
        raise BadRequestError(f"the body holds {name}, which is not JSON")

    with reading("the body is not JSON", kind=BadRequestError, fix=f"send {FORM}"):
        return json.loads(text, parse_constant=refuse)


def read_payload(value: Any) -> tuple[dict[str, Any], bool]:
    """(payload, whether it came "encoded") of an `/act` body.

    A client that cannot patch its JSON library sends {"encoded": the payload as a JSON string}, and is answered with a
    JSON string too.
    """
    if isinstance(value, dict) and "encoded" in value:
        if len(value) != 1 or not isinstance(value["encoded"], str):
            raise BadRequestError(f"'encoded' must be a JSON string and the only key, got {_keys(value)}")
        return _checked(loads(value["encoded"])), True
    return _checked(value), False


def _checked(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict):
        raise BadRequestError(f"the body is {_kind(payload)}: send {FORM}")
    for key in payload:
        if key not in REQUEST_KEYS:
            raise BadRequestError(f"unknown key {_short(key)}; {nearest(_short(key), REQUEST_KEYS)}")
    if "image" in payload and "images" in payload:
        raise BadRequestError("'image' and 'images' are both given: 'image' is the first camera's, send one of the two")
    for key, given in (("image", {"image", "images"} & set(payload)), ("instruction", "instruction" in payload)):
        if not given:
            raise BadRequestError(f"{key!r} is missing: send {FORM}")
    if "images" in payload and not (isinstance(payload["images"], dict) and payload["images"]):
        raise BadRequestError(f"images is {_kind(payload['images'])}: send an object, {{camera name: image, ...}}")
    if not isinstance(payload["instruction"], str):
        raise BadRequestError(f"instruction is {_kind(payload['instruction'])}: send text")
    if not isinstance(payload.get("unnorm_key"), str | None):
        raise BadRequestError(
            f"unnorm_key is {_kind(payload['unnorm_key'])}: send the name of a dataset, or leave it out"
        )
    return payload


def read_observation(payload: dict[str, Any], cameras: Sequence[str]) -> Observation:
    """Returns the observation of a payload that `read_payload` checked; `image` is that of the first of `cameras`.

    Raises BadRequestError that names the key.
    """
    if "image" in payload:
        images = {cameras[0]: read_image(payload["image"])}
    else:
        for name in payload["images"]:  # before its pixels are decoded
            if name not in cameras:
                raise BadRequestError(f"images: unknown camera {_short(name)}; {nearest(_short(name), cameras)}")
        images = {name: read_image(value, f"images.{name}") for name, value in payload["images"].items()}
    state = None if payload.get("state") is None else read_state(payload["state"])
    return Observation(images, payload["instruction"], state, payload.get("unnorm_key"))


def read_state(value: Any) -> np.ndarray:
    """Returns the float64 [columns] of a json-numpy object or a list of numbers."""
    if isinstance(value, dict):
        state = decode_array(value, "state")
    elif isinstance(value, list) and all(type(number) in (int, float) and abs(number) < 1e300 for number in value):
        state = np.asarray(value, np.float64)
    else:
        raise BadRequestError(f"state is {_kind(value)}: send a list of numbers, or a json-numpy array")
    if state.ndim != 1:
        raise BadRequestError(f"state has shape {state.shape}: send a list of numbers")
    return state.astype(np.float64)


def read_image(value: Any, where: str = "image") -> np.ndarray:
    """Returns uint8 [height, width, 3] of a json-numpy object, a base64 JPEG or PNG, or nested lists of 0..255.

    Raises BadRequestError that names the key, `where`.
    """
    if isinstance(value, dict):
        image = decode_array(value, where)
    elif isinstance(value, str):
        image = decode_picture(_base64(value.partition("base64,")[2] or value, where), where)
    elif isinstance(value, list):
        image = _from_lists(value, where)
    else:
        raise BadRequestError(f"{where} is {_kind(value)}: send a json-numpy array, or a JPEG or PNG in base64")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise BadRequestError(
            f"{where} has dtype {image.dtype} and shape {image.shape}; send uint8 RGB [height, width, 3]"
        )
    _check_pixels(image.shape[0], image.shape[1], where)
    return image


def _check_pixels(rows: int, columns: int, where: str) -> None:
    if rows * columns > MAX_PIXELS or 100 * min(rows, columns) < max(rows, columns):
        raise BadRequestError(f"{where} of {rows} x {columns} pixels: at most {MAX_PIXELS}, sides 1:100")


def decode_picture(data: bytes, where: str) -> np.ndarray:
    """Returns uint8 [height, width, 3] of a JPEG or PNG. Raises BadRequestError that names `where`."""
    with (
        reading(f"{where} is no readable JPEG or PNG", "send it as the camera wrote it", BadRequestError),
        Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture,
    ):
        _check_pixels(picture.height, picture.width, where)  # before any of them is decoded
        if picture.mode != "RGB":
            raise BadRequestError(f"{where} has mode {picture.mode}: send RGB")
        return np.asarray(picture)


def _from_lists(value: list[Any], where: str) -> np.ndarray:
    with reading(f"{where} lists differ in length", "send [height][width][3]", BadRequestError):
        numbers = np.asarray(value)
    if numbers.dtype.kind not in "iu" or numbers.size == 0 or numbers.min() < 0 or numbers.max() > 255:
        raise BadRequestError(f"{where} lists must hold whole numbers from 0 to 255")
    return numbers.astype(np.uint8)


def _base64(data: str, where: str) -> bytes:
    with reading(f"{where}: its data are not base64", "encode them again", BadRequestError):
        return base64.b64decode(data, validate=True)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _keys(value: dict[str, Any]) -> str:
    return _short(sorted(value))
