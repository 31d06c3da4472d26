"""Requests to a server: JSON with arrays as json-numpy writes them, or images as base64 JPEG or PNG. No pickle.

Images come in one of three forms: `image` (OpenVLA's clients), `images` by camera name, or `full_image` and keys with
"wrist" in them (OpenVLA-OFT's clients).
"""

import io
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from openvla_client import ClientError, arrays
from openvla_client.arrays import short
from PIL import Image

from openvla_jax.config import nearest
from openvla_jax.errors import InputError, NonFiniteError, reading
from openvla_jax.types import Observation

MAX_PIXELS = 16 * 2**20  # of one image: a few kilobytes of PNG can declare gigabytes
MAIN = "full_image"  # OpenVLA-OFT's main camera
WRIST = re.compile(r"[\w./-]{0,30}wrist[\w./-]{0,30}", re.ASCII)  # keys of its other cameras
IMAGE_KEYS = ("image", "images", MAIN)  # one per form
REQUEST_KEYS = (*IMAGE_KEYS, "instruction", "state", "unnorm_key")
FORM = "an object with instruction, image, images or full_image, and optionally state and unnorm_key"


class BadRequestError(InputError):
    """A request that cannot be served; the message says what is wrong with it."""


def dumps(value: Any) -> str:
    """JSON with arrays as json-numpy writes them. Raises NonFiniteError for a NaN or infinity anywhere in it."""
    try:
        return arrays.dumps(value)
    except ClientError as error:
        raise NonFiniteError(str(error)) from None


def decode_array(value: dict[str, Any], where: str) -> np.ndarray:
    """The array of a json-numpy object. Raises BadRequestError that names `where`."""
    try:
        return arrays.decode_array(value, where)
    except ClientError as error:
        raise BadRequestError(str(error)) from None


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
            raise BadRequestError(f"'encoded' must be a JSON string and the only key, got {short(sorted(value))}")
        return _checked(loads(value["encoded"])), True
    return _checked(value), False


def _checked(payload: Any) -> dict[str, Any]:
    if not isinstance(payload, dict):
        raise BadRequestError(f"the body is {_kind(payload)}: send {FORM}")
    for key in payload:
        if key not in REQUEST_KEYS and not WRIST.fullmatch(key):
            raise BadRequestError(f"unknown key {short(key)}; {nearest(short(key), REQUEST_KEYS)}")
    wrists = _wrist_keys(payload)
    given = [key for key in IMAGE_KEYS if key in payload]
    if len(given) > 1:
        raise BadRequestError(
            f"{given[0]!r} and {given[1]!r} are both given: send the first camera's 'image', or all of them in "
            f"'images' or beside {MAIN!r}"
        )
    if wrists and given != [MAIN]:
        raise BadRequestError(f"{wrists[0]!r} belongs to {MAIN!r}: send both, or images, {{camera name: image, ...}}")
    for key, there in (("image", given), ("instruction", "instruction" in payload)):
        if not there:
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
    """Returns the observation of a payload that `read_payload` checked, with images by the names of `cameras`.

    `image` and `full_image` are the first camera's. Raises BadRequestError that names the key.
    """
    names = _camera_names(payload, cameras)  # before any pixel is decoded
    images = {names[key]: read_image(value, key) for key, value in image_values(payload).items()}
    state = None if payload.get("state") is None else read_state(payload["state"])
    return Observation(images, payload["instruction"], state, payload.get("unnorm_key"))


def image_values(payload: dict[str, Any]) -> dict[str, Any]:
    """Returns the images of a checked payload as they came, by where they stand in it."""
    if "images" in payload:
        return {f"images.{name}": value for name, value in payload["images"].items()}
    return {key: payload[key] for key in ("image", MAIN, *_wrist_keys(payload)) if key in payload}


def _wrist_keys(payload: dict[str, Any]) -> list[str]:
    return [key for key in payload if WRIST.fullmatch(key)]


def _camera_names(payload: dict[str, Any], cameras: Sequence[str]) -> dict[str, str]:
    """Returns the camera of each of `image_values`. Raises BadRequestError for what is none of them."""
    if "image" in payload:
        return {"image": cameras[0]}
    if MAIN in payload:
        return {MAIN: cameras[0]} | _wrist_cameras(_wrist_keys(payload), cameras)
    for name in payload["images"]:
        if name not in cameras:
            raise BadRequestError(f"images: unknown camera {short(name)}; {nearest(short(name), cameras)}")
    return {f"images.{name}": name for name in payload["images"]}


def _wrist_cameras(keys: Sequence[str], cameras: Sequence[str]) -> dict[str, str]:
    """Returns the camera of each key of OpenVLA-OFT's clients: the only wrist camera, or the one that the key names."""
    wrists = [name for name in cameras[1:] if "wrist" in name]
    if len(keys) == len(wrists) == 1:  # clients call their only one as they like
        return {keys[0]: wrists[0]}
    known = {key: name for name in wrists for key in (name, f"{name}_image")}
    for key in keys:
        if key not in known:
            fix = f"send {', '.join(f'{name}_image' for name in wrists)}" if wrists else "leave it out"
            raise BadRequestError(f"{key!r} is no camera of the policy, which sees {', '.join(cameras)}: {fix}")
    found = {key: known[key] for key in keys}
    if len(set(found.values())) < len(keys):
        raise BadRequestError(f"{', '.join(keys)} name one camera twice: send each once")
    return found


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
    try:
        return arrays.decode_base64(data, where)
    except ClientError as error:
        raise BadRequestError(str(error)) from None


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
