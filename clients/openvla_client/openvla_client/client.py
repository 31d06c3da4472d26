"""The methods of a policy, answered by a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from openvla_client.arrays import dumps
from openvla_client.connection import Connection, Read
from openvla_client.errors import ClientError, ServerError
from openvla_client.messages import FORMS, Observation, read_action, read_batch, read_chunk, request

ROWS = 32  # observations of one request


class Client:
    """Acts as a policy does, over HTTP. Use one per thread, or share one: calls take turns.

    Args:
        url: http://HOST:PORT of the server.
        token: what it asks for; default: $OPENVLA_TOKEN.
        timeout: seconds that the server may be silent, and that a request is repeated while the server loads or is full
            (429, 503). Nothing else is sent again.
        form: how an observation is written, "images" (servers of openvla_jax) or "oft" (OpenVLA-OFT's own server, too,
            which has no /info, no /health and no batches).

    Raises ClientError for a wrong URL, token or form. All methods raise ServerError, with the server's reason, for
    whatever is no answer.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        timeout: float = 60.0,
        form: str = "images",
    ):
        if form not in FORMS:
            raise ClientError(f"form {form!r}: one of {', '.join(map(repr, FORMS))}")
        self.url, self.timeout, self.form = url, timeout, form
        self.connection = Connection(url, token, timeout)

    def predict_action(self, image: np.ndarray, instruction: str, unnorm_key: str | None = None) -> np.ndarray:
        """Returns the first action, float64 [A], for an image uint8 RGB [height, width, 3] of the main camera."""
        if self.form == "oft":
            return self.predict_chunk(Observation({"primary": image}, instruction, unnorm_key=unnorm_key))[0]
        return self._post("/act", _first(image, instruction, unnorm_key), read_action)

    def predict_actions(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        instructions: Sequence[str],
        unnorm_keys: Sequence[str | None] | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Returns the first action of each row, float64 [B, A]; a list if action sizes differ."""
        keys = [None] * len(images) if unnorm_keys is None else unnorm_keys
        if not len(images) == len(instructions) == len(keys):
            raise ClientError(
                f"{len(images)} images, {len(instructions)} instructions, {len(keys)} unnorm_keys: as many of each"
            )
        rows = zip(images, instructions, keys)
        if self.form == "oft":
            return _stacked([self.predict_action(*row) for row in rows])
        return self._act_batch([_first(*row) for row in rows], 1)

    def predict_chunk(self, observation: Any) -> np.ndarray:
        """Returns the next K actions, float64 [K, A], for an `Observation` or anything with its fields."""
        return self._post("/act", request(observation, self.form), read_chunk)

    def predict_chunks(self, observations: Sequence[Any]) -> np.ndarray | list[np.ndarray]:
        """Returns a chunk per observation, float64 [B, K, A]; a list if action sizes differ."""
        if self.form == "oft":
            return _stacked([self.predict_chunk(observation) for observation in observations])
        return self._act_batch([request(observation) for observation in observations], 2)

    def info(self) -> dict[str, Any]:
        """Returns what the server serves: model, observation, action, preprocessing, statistics, device, dtype."""
        return self.connection.ask("GET", "/info", self._read_info)

    def wait_until_ready(self, seconds: float = 600.0) -> None:
        """Returns when the server says that it is healthy; raises ServerError after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.connection.ask("GET", "/health", lambda answer: None, patient=False)
            except ServerError as error:
                if time.monotonic() > deadline:
                    what = f"{self.url} was not ready within {seconds:g} s: {error}"
                    raise ServerError(what, error.status) from None
                time.sleep(0.2)

    @staticmethod
    def _read_info(value: Any) -> dict[str, Any]:
        """Returns the object of an `/info` answer, if it says what a caller needs to know of a policy."""
        if not value["observation"]["cameras"] or value["action"]["horizon"] < 1:
            raise ValueError("it names no cameras or no actions")
        return value

    def _act_batch(self, rows: Sequence[dict[str, Any]], rank: int) -> np.ndarray | list[np.ndarray]:
        answers: list[np.ndarray] = []
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            answers += self._post("/act_batch", {"requests": part}, partial(read_batch, count=len(part), rank=rank))
        return _stacked(answers)

    def _post(self, path: str, body: dict[str, Any], read: Callable[[Any], Read]) -> Read:
        try:
            text = dumps(body)
        except ClientError as error:
            raise ClientError(f"the observation is not finite: {error}; send numbers") from None
        return self.connection.ask("POST", path, read, text)


def _first(image: np.ndarray, instruction: str, unnorm_key: str | None) -> dict[str, Any]:
    body = {"image": np.asarray(image), "instruction": instruction}
    return body if unnorm_key is None else {**body, "unnorm_key": unnorm_key}


def _stacked(rows: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    return np.stack(rows) if len({row.shape for row in rows}) == 1 else rows
