"""An answer that is given before the body of its request was read."""

import asyncio
import contextlib

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DRAIN_SECONDS, DRAIN_BYTES = 10.0, 256 * 2**20


class EarlyResponse(Response):
    """Answers at once, then reads and drops what the client still sends, up to a limit, and closes the connection.

    Most clients read nothing until they have sent everything. Closing earlier would reset the connection, and they
    would report that instead of the reason.
    """

    def __init__(self, content: str, status: int, headers: dict[str, str] | None = None):
        super().__init__(content, status, {"Connection": "close"} | (headers or {}), media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await _drain(receive)
        await send({"type": "http.response.body", "body": b""})


async def _drain(receive: Receive) -> None:
    read = 0
    while read <= DRAIN_BYTES:
        message = await receive()
        read += len(message.get("body", b""))
        if not message.get("more_body"):  # the end of the body, or of the connection
            return
