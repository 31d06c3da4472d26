"""Requests and answers: an observation to JSON in either form, and what a server says back to arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from openvla_client.arrays import decode_array
from openvla_client.errors import ClientError

# "images": {"images": {camera: image}, ...}, by the names that /info lists. "oft": full_image and *wrist*_image at the
# top, as the server of OpenVLA-OFT reads them; servers of openvla_jax take both.
FORMS = ("images", "oft")


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """What a policy sees at one moment.

    images: uint8 [height, width, 3] RGB by camera name; the first is the main camera. instruction: what to do. state:
    float [S], proprioception in raw units; None if the policy takes none. unnorm_key: the dataset whose statistics
    scale state and action; None for the checkpoint's own.
    """

    images: Mapping[str, np.ndarray]
    instruction: str
    state: np.ndarray | None = None
    unnorm_key: str | None = None


def request(observation: Any, form: str = "images") -> dict[str, Any]:
    """Returns the body of `/act` that asks for a chunk.

    observation: an `Observation`, or anything with its fields. Raises ClientError for a camera that the form "oft" has
    no key for.
    """
    images = {name: np.asarray(image) for name, image in observation.images.items()}
    body: dict[str, Any] = {"images": images} if form == "images" else _oft_images(images)
    body["instruction"] = observation.instruction
    if observation.state is not None:
        body["state"] = np.asarray(observation.state, np.float64)
    if observation.unnorm_key is not None:
        body["unnorm_key"] = observation.unnorm_key
    return body


def _oft_images(images: Mapping[str, np.ndarray]) -> dict[str, Any]:
    names = list(images)
    if not names:
        raise ClientError("the observation has no images: the first one is the main camera's")
    for name in names[1:]:
        if "wrist" not in name:
            raise ClientError(
                f"camera {name!r}: the form 'oft' knows one main camera and wrist cameras; name it so, or use 'images'"
            )
    keys = ["full_image", *(name if name.endswith("_image") else f"{name}_image" for name in names[1:])]
    return dict(zip(keys, images.values()))


def read_action(value: Any) -> np.ndarray:
    """Returns the float64 [A] of an `/act` answer: a json-numpy array, because images were sent as such."""
    return _checked(decode_array(value, "action"), 1)


def read_chunk(value: Any) -> np.ndarray:
    """Returns the float64 [K, A] of an `/act` answer: a list of K actions, or one array."""
    if isinstance(value, list):
        return np.stack([read_action(row) for row in value])
    return _checked(decode_array(value, "chunk"), 2)


def read_batch(value: Any, count: int, rank: int) -> list[np.ndarray]:
    """Returns the `count` actions (rank 1) or chunks (rank 2) of an `/act_batch` answer: lists of numbers."""
    rows = value["actions"]
    if not isinstance(rows, list) or len(rows) != count:
        raise ValueError(f"{count} actions were asked for")
    return [_checked(np.asarray(row), rank) for row in rows]


def _checked(array: np.ndarray, rank: int) -> np.ndarray:
    if array.dtype.kind not in "iuf" or array.ndim != rank or not array.size:
        raise ValueError(f"an action has dtype {array.dtype} and shape {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError("an action is not finite")
    return array
