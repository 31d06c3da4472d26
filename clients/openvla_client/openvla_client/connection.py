"""HTTP to one server: one connection that is kept open, and what is sent again if it fails."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from openvla_client.errors import ClientError, ServerError, reason

MAX_ANSWER = 64 * 2**20  # bytes
EARLY_SECONDS = 2.0  # for an answer that was given before the server had the whole body
SHOWN = 80  # bytes of an answer that is not understood
BUSY = (429, 503)  # the server asks to try again
Read = TypeVar("Read")


class Answer(NamedTuple):
    """A whole response."""

    status: int
    data: bytes
    retry_after: str | None = None
    location: str | None = None


class Connection:
    """Sends requests to a server, one at a time.

    A request is sent again if the server asks for it (429, 503), for `timeout` seconds in all, also if the server is
    away meanwhile; and if the connection was kept and the server had closed it. Nothing else is: not what the server
    refused, failed at, answered by half or left unanswered.

    Raises ClientError for a wrong URL or token.
    """

    def __init__(self, url: str, token: str | None, timeout: float):
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ClientError(f"url {url!r}: {reason(error)}; give http://HOST:PORT") from None
        if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable():
            raise ClientError(f"url {url!r}: give http://HOST:PORT")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.url, self.timeout, self._prefix = url, timeout, parts.path.rstrip("/")
        self.http = kind(host, port, timeout=timeout)
        self._lock = threading.Lock()
        token = token or os.environ.get("OPENVLA_TOKEN")
        if token and not (token.isascii() and token.isprintable()):
            raise ClientError("the token has characters that no header can hold, as a line break: give it again")
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"

    def ask(
        self, method: str, path: str, read: Callable[[Any], Read], body: str | None = None, patient: bool = True
    ) -> Read:
        """Returns what `read` makes of the answer's JSON; `patient` sends again while the server is busy.

        Raises ServerError for any other answer, with the server's reason, and if there is no answer.
        """
        deadline, busy = time.monotonic() + self.timeout, ""
        while True:
            try:
                with self._lock:
                    answer = self._send(method, path, body)
            except ServerError as error:  # a server that said why it is busy may be on its way down, and up again
                if not busy or time.monotonic() > deadline:
                    raise ServerError(f"{error}; before, it answered {busy}" if busy else str(error)) from None
                pause = 1.0
            else:
                left = deadline - time.monotonic()
                if answer.status not in BUSY or not patient or left <= 0:
                    return read_answer(answer, read, f"{self.url}{path}")
                busy, pause = said(answer), min(retry_seconds(answer.retry_after), left)
            time.sleep(pause)

    def _send(self, method: str, path: str, body: str | None) -> Answer:
        """Returns the answer. Sends twice only if the connection was kept, and closed by the server meanwhile."""
        while True:
            kept = self.http.sock is not None
            try:
                return self._exchange(method, path, body)
            except BaseException as error:
                self.http.close()
                if not isinstance(error, Exception):  # Ctrl-C: what arrives late is no answer to the next request
                    raise
                if isinstance(error, socket.timeout):
                    raise ServerError(f"{self.url} does not answer within {self.timeout:g} s") from None
                if not kept or not isinstance(error, ConnectionError):
                    raise ServerError(f"{self.url} does not answer: {reason(error)}") from None

    def _exchange(self, method: str, path: str, body: str | None) -> Answer:
        try:
            self.http.request(method, self._prefix + path, body, self._headers)
        except OSError:
            if self.http.sock is not None:  # perhaps the server refused before it had the body, and said why
                self.http.sock.settimeout(EARLY_SECONDS)
                with contextlib.suppress(Exception):
                    answer = read_response(self.http.getresponse())
                    self.http.close()
                    return answer
            raise
        response = self.http.getresponse()
        try:
            return read_response(response)
        except ConnectionError as error:  # a part came: the request is not sent again
            raise ValueError(f"the answer broke off: {reason(error)}") from None


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
        raise ServerError(f"{url}: {said(answer)}", status)
    try:
        return read(value)
    except Exception as error:
        what = f"status {status}, but {shown} is no answer to this request: {reason(error)}"
        raise ServerError(f"{url}: {what}", status) from None


def said(answer: Answer) -> str:
    """Returns the status of a refusal and its reason, in one line."""
    try:
        value = json.loads(answer.data)
    except Exception:
        value = ascii(answer.data[:SHOWN])[1:]
    text = value.get("error", value) if isinstance(value, dict) else value
    return f"status {answer.status}: {' '.join(str(text).split())[:1000]}"


def retry_seconds(text: str | None) -> float:
    """Returns how long to wait after a 503: as long as Retry-After says, or a second; the header may hold a date."""
    return float(text[:9]) if text and text.isdecimal() else 1.0


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
