"""A robot's side of the server: standard library and NumPy only, one connection kept open.

policy = Client("http://127.0.0.1:8000")
action = policy.predict_action(image, "pick up the red cube")
"""

import contextlib
import http.client
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from openvla_jax.errors import InputError, NonFiniteError, reading, reason
from openvla_jax.inference.wire import decode_array, dumps
from openvla_jax.types import ActionSpec, Observation, ObservationSpec

MAX_ANSWER = 64 * 2**20  # bytes
EARLY_SECONDS = 2.0  # for an answer that was given before the server had the whole body
SHOWN = 80  # bytes of an answer that is not understood
Read = TypeVar("Read")


class ServerError(InputError):
    """The server refused or failed; `status` is its HTTP code, or None if it could not be reached."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Client:
    """Acts as `openvla_jax.Policy` does, over HTTP. Use one per thread, or share one: calls take turns.

    `timeout` is in seconds, for each answer. While the server loads or is full (503) a request is repeated for as long.
    Anything else that goes wrong is a ServerError with the server's reason. Raises InputError for a wrong URL or token.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None, timeout: float = 60.0):
        with reading(f"url {url!r}", "give http://HOST:PORT"):
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable():
            raise InputError(f"url {url!r}: give http://HOST:PORT")
        connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.url, self.timeout, self._prefix = url, timeout, parts.path.rstrip("/")
        self._connection = connection(host, port, timeout=timeout)
        self._lock = threading.Lock()
        token = token or os.environ.get("OPENVLA_TOKEN")
        if token and not (token.isascii() and token.isprintable()):
            raise InputError("the token has characters that no header can hold, as a line break: give it again")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def predict_action(self, image: np.ndarray, instruction: str, unnorm_key: str | None = None) -> np.ndarray:
        """Returns the first action, float64 [A], for an image uint8 RGB [height, width, 3]. Raises ServerError."""
        return self._post("/act", _payload(image, instruction, unnorm_key), partial(read_array, rank=1))

    def predict_actions(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        instructions: Sequence[str],
        unnorm_keys: Sequence[str | None] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Returns the first action of each row, float64 [B, action_dim]; a list if action sizes differ.

        They are sent in parts of 32 rows.
        """
        keys = [None] * len(images) if unnorm_keys is None else unnorm_keys
        return self._act_batch([_payload(*row) for row in zip(images, instructions, keys, strict=True)], 1)

    def predict_chunk(self, observation: Observation) -> np.ndarray:
        """Returns the next K actions, float64 [K, action_dim]. Raises ServerError."""
        return self._post("/act", _observed(observation), partial(read_array, rank=2))

    def predict_chunks(self, observations: Sequence[Observation]) -> np.ndarray | list[np.ndarray]:
        """Returns a chunk per observation, float64 [B, K, action_dim]; a list if action sizes differ."""
        return self._act_batch([_observed(observation) for observation in observations], 2)

    def _act_batch(self, rows: Sequence[dict[str, Any]], rank: int) -> np.ndarray | list[np.ndarray]:
        answers: list[np.ndarray] = []
        for start in range(0, len(rows), 32):
            part = rows[start : start + 32]
            read = partial(read_arrays, count=len(part), rank=rank)
            answers += self._post("/act_batch", {"requests": part}, read)
        return np.stack(answers) if len({answer.shape for answer in answers}) == 1 else answers

    def info(self) -> dict[str, Any]:
        """Returns what the server serves: model, observation, action, preprocessing, statistics, device, dtype."""
        return self._call("GET", "/info", read_info)

    def wait_until_ready(self, seconds: float = 600.0) -> None:
        """Returns when the server says that it is healthy; raises ServerError after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self._call("GET", "/health", lambda answer: None)
            except ServerError as error:
                if time.monotonic() > deadline:
                    raise ServerError(f"{self.url} was not ready within {seconds:g} s: {error}", error.status) from None
                time.sleep(0.2)

    def _post(self, path: str, payload: dict[str, Any], read: Callable[[Any], Read]) -> Read:
        try:
            body = dumps(payload)
        except NonFiniteError as error:
            raise InputError(f"the observation is not finite: {error}; send numbers") from None
        return self._call("POST", path, read, body)

    def _call(self, method: str, path: str, read: Callable[[Any], Read], body: str | None = None) -> Read:
        deadline = time.monotonic() + self.timeout
        while True:
            with self._lock:
                answer = self._send(method, path, body)
            if answer.status != 503 or path == "/health" or time.monotonic() > deadline:
                return read_answer(answer, read, f"{self.url}{path}")
            time.sleep(retry_seconds(answer.retry_after))

    def _send(self, method: str, path: str, body: str | None) -> "Answer":
        """Returns the answer. Sends twice only if the connection was kept, and closed by the server meanwhile."""
        while True:
            kept = self._connection.sock is not None
            try:
                return self._exchange(method, path, body)
            except BaseException as error:
                self._connection.close()
                if not isinstance(error, Exception):  # Ctrl-C: what arrives late is no answer to the next request
                    raise
                if not kept or not isinstance(error, ConnectionError):
                    raise ServerError(f"{self.url} does not answer: {reason(error)}") from None

    def _exchange(self, method: str, path: str, body: str | None) -> "Answer":
        connection = self._connection
        try:
            connection.request(method, self._prefix + path, body, self._headers)
        except OSError:
            if connection.sock is not None:  # perhaps the server refused before it had the body, and said why
                connection.sock.settimeout(EARLY_SECONDS)
                with contextlib.suppress(Exception):
                    answer = read_response(connection.getresponse())
                    connection.close()
                    return answer
            raise
        return read_response(connection.getresponse())


# ---------------------------------------------------------------------------------------------------------------------
# What a server says
# ---------------------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """A whole response."""

    status: int
    data: bytes
    retry_after: str | None = None
    location: str | None = None


def read_response(response: http.client.HTTPResponse) -> Answer:
    """Returns the whole response. Raises ValueError if it is too long or cut, and what http.client raises."""
    data = b""
    while part := response.read(2**16):
        data += part
        if len(data) > MAX_ANSWER:
            raise ValueError(f"the answer is longer than {MAX_ANSWER} bytes")
    if response.length:
        raise ValueError(f"the answer ends {response.length} bytes early")
    return Answer(response.status, data, response.getheader("Retry-After"), response.getheader("Location"))


def read_answer(answer: Answer, read: Callable[[Any], Read], url: str) -> Read:
    """Returns what `read` makes of the answer's JSON. Raises ServerError for any other answer, with its reason."""
    status, shown = answer.status, ascii(answer.data[:SHOWN])[1:]
    if 300 <= status < 400:
        raise ServerError(f"{url}: status {status}, redirected to {answer.location!r}: give that URL", status)
    try:
        value = json.loads(answer.data, parse_constant=_refuse)
    except Exception:
        raise ServerError(f"{url}: status {status}, not JSON: {shown}", status) from None
    if status != 200:
        said = value.get("error", value) if isinstance(value, dict) else value
        raise ServerError(f"{url}: status {status}: {' '.join(str(said).split())[:1000]}", status)
    try:
        return read(value)
    except Exception as error:
        what = f"status {status}, but {shown} is no answer to this request: {reason(error)}"
        raise ServerError(f"{url}: {what}", status) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def read_array(value: Any, rank: int) -> np.ndarray:
    """Returns the float64 array of an `/act` answer: an action (rank 1) or a chunk (rank 2)."""
    return _finite(decode_array(value, "action"), rank)


def read_arrays(value: Any, count: int, rank: int) -> list[np.ndarray]:
    """Returns the `count` float64 arrays of an `/act_batch` answer."""
    rows = value["actions"]
    if not isinstance(rows, list) or len(rows) != count:
        raise ValueError(f"{count} actions were asked for")
    return [_finite(np.asarray(row), rank) for row in rows]


def _finite(array: np.ndarray, rank: int) -> np.ndarray:
    if array.dtype.kind not in "iuf" or array.ndim != rank or not array.size:
        raise ValueError(f"an action has dtype {array.dtype} and shape {array.shape}")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError("an action is not finite")
    return array


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


def retry_seconds(text: str | None) -> float:
    """Returns how long to wait after a 503, at most a second; the header may also hold a date."""
    return min(float(text), 1.0) if text and text.isdecimal() else 1.0


def _observed(observation: Observation) -> dict[str, Any]:
    images = {name: np.asarray(image) for name, image in observation.images.items()}
    payload: dict[str, Any] = {"images": images, "instruction": observation.instruction}
    if observation.state is not None:
        payload["state"] = np.asarray(observation.state, np.float64)
    return payload | ({} if observation.unnorm_key is None else {"unnorm_key": observation.unnorm_key})


def _payload(image: np.ndarray, instruction: str, unnorm_key: str | None) -> dict[str, Any]:
    payload = {"image": np.asarray(image), "instruction": instruction}
    return payload | ({} if unnorm_key is None else {"unnorm_key": unnorm_key})
