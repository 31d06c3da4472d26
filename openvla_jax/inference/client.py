"""The client of `openvla_client` as this package uses it: its errors are InputError, and it checks specs.

policy = Client("http://127.0.0.1:8000")
action = policy.predict_action(image, "pick up the red cube")

Robots install `clients/openvla_client` alone, which needs neither jax nor this package.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import openvla_client
from openvla_client import ActionQueue

from openvla_jax.errors import InputError
from openvla_jax.types import ActionSpec, ObservationSpec

__all__ = ["ActionQueue", "Client", "ServerError"]


class ServerError(InputError, openvla_client.ServerError):
    """The server refused or failed; `status` is its HTTP code, or None if it could not be reached."""


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raises the client's errors as InputError and ServerError, which commands report in one line."""
    try:
        yield
    except openvla_client.ServerError as error:
        raise ServerError(str(error), error.status) from None
    except openvla_client.ClientError as error:
        raise InputError(str(error)) from None


def read_info(value: Any) -> dict[str, Any]:
    """Returns the object of an `/info` answer, with the parts that others build on checked."""
    ObservationSpec.from_dict(value["observation"])
    ActionSpec.from_dict(value["action"])
    for name in ("statistics", "training"):
        if not isinstance(value[name], dict):
            raise ValueError(f"{name} is no object")
    if not value["statistics"]:
        raise ValueError("there are no statistics")
    for dataset, entry in value["statistics"].items():
        if not isinstance(entry["action"], dict):
            raise ValueError(f"statistics of {dataset!r} are no object")
    return value


class Client(openvla_client.Client):
    """Acts as `openvla_jax.Policy` does, over HTTP: see `openvla_client.Client`. Takes `openvla_jax.Observation`.

    Raises InputError for a wrong URL, token or observation, ServerError for whatever is no answer.
    """

    __init__ = _own_errors()(openvla_client.Client.__init__)
    predict_action = _own_errors()(openvla_client.Client.predict_action)
    predict_actions = _own_errors()(openvla_client.Client.predict_actions)
    predict_chunk = _own_errors()(openvla_client.Client.predict_chunk)
    predict_chunks = _own_errors()(openvla_client.Client.predict_chunks)
    info = _own_errors()(openvla_client.Client.info)
    wait_until_ready = _own_errors()(openvla_client.Client.wait_until_ready)
    _read_info = staticmethod(read_info)
