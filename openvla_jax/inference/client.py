"""A robot's side of the server: standard library and NumPy only, one connection kept open.

policy = Client("http://127.0.0.1:8000")
action = policy.predict_action(image, "pick up the red cube")
"""

import http.client
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np

from openvla_jax.errors import InputError
from openvla_jax.inference.wire import decode_array, dumps
from openvla_jax.types import Observation


class ServerError(RuntimeError):
    """The server refused or failed; `status` is its HTTP code, or None where it could not be reached."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Client:
    """Acts as `openvla_jax.Policy` does, over HTTP. Use one per thread, or share one: calls take turns.

    `timeout` is in seconds, for each answer. While the server is full (503) a request is repeated for as long.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None, timeout: float = 60.0):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url {url!r}: give http://HOST:PORT")
        connection = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.url, self.timeout, self._prefix = url, timeout, parts.path.rstrip("/")
        self._connection = connection(parts.hostname, parts.port, timeout=timeout)
        self._lock = threading.Lock()
        token = token or os.environ.get("OPENVLA_TOKEN")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def predict_action(self, image: np.ndarray, instruction: str, unnorm_key: str | None = None) -> np.ndarray:
        """Returns the first action, float64 [A], for an image uint8 RGB [height, width, 3]. Raises ServerError."""
        answer = self._call("POST", "/act", dumps(_payload(image, instruction, unnorm_key)))
        return np.array(decode_array(answer, "action"))

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
        return self._act_batch([_payload(*row) for row in zip(images, instructions, keys, strict=True)])

    def predict_chunk(self, observation: Observation) -> np.ndarray:
        """Returns the next K actions, float64 [K, action_dim]. Raises ServerError."""
        return np.array(decode_array(self._call("POST", "/act", dumps(_observed(observation))), "action"))

    def predict_chunks(self, observations: Sequence[Observation]) -> np.ndarray | list[np.ndarray]:
        """Returns a chunk per observation, float64 [B, K, action_dim]; a list if action sizes differ."""
        return self._act_batch([_observed(observation) for observation in observations])

    def _act_batch(self, rows: Sequence[dict[str, Any]]) -> np.ndarray | list[np.ndarray]:
        answers: list[np.ndarray] = []
        for start in range(0, len(rows), 32):
            answer = self._call("POST", "/act_batch", dumps({"requests": rows[start : start + 32]}))
            answers += [np.asarray(action, np.float64) for action in answer["actions"]]
        return np.stack(answers) if len({answer.shape for answer in answers}) == 1 else answers

    def info(self) -> dict[str, Any]:
        """Returns what the server serves: model, observation, action, preprocessing, statistics, device, dtype."""
        return self._call("GET", "/info")

    def wait_until_ready(self, seconds: float = 600.0) -> None:
        """Returns when the server says that it is healthy; raises ServerError after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._call("GET", "/health")
                return
            except ServerError as error:
                if time.monotonic() > deadline:
                    raise ServerError(f"{self.url} was not ready within {seconds:g} s: {error}") from None
                time.sleep(0.2)

    def _call(self, method: str, path: str, body: str | None = None) -> Any:
        deadline = time.monotonic() + self.timeout
        while True:
            with self._lock:
                status, data, retry = self._send(method, path, body)
            if status != 503 or method == "GET" or time.monotonic() > deadline:
                break
            time.sleep(min(float(retry or 1), 1.0))
        try:
            answer = json.loads(data)
        except ValueError:
            raise ServerError(f"{self.url}{path}: status {status}, not JSON: {data[:80]!r}", status) from None
        if status != 200:
            reason = answer.get("error", answer) if isinstance(answer, dict) else answer
            raise ServerError(f"{self.url}{path}: status {status}: {reason}", status)
        return answer

    def _send(self, method: str, path: str, body: str | None) -> tuple[int, bytes, str | None]:
        for last in (False, True):
            try:
                self._connection.request(method, self._prefix + path, body, self._headers)
                response = self._connection.getresponse()
                return response.status, response.read(), response.getheader("Retry-After")
            except (OSError, http.client.HTTPException) as error:
                # A kept connection may have been closed meanwhile: once more on a new one.
                self._connection.close()
                if last or isinstance(error, TimeoutError):
                    raise ServerError(f"{self.url} does not answer: {error or type(error).__name__}") from None
        raise AssertionError


def _observed(observation: Observation) -> dict[str, Any]:
    images = {name: np.asarray(image) for name, image in observation.images.items()}
    payload: dict[str, Any] = {"images": images, "instruction": observation.instruction}
    if observation.state is not None:
        payload["state"] = np.asarray(observation.state, np.float64)
    return payload | ({} if observation.unnorm_key is None else {"unnorm_key": observation.unnorm_key})


def _payload(image: np.ndarray, instruction: str, unnorm_key: str | None) -> dict[str, Any]:
    payload = {"image": np.asarray(image), "instruction": instruction}
    return payload | ({} if unnorm_key is None else {"unnorm_key": unnorm_key})
