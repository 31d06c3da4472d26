"""The server as a process: it takes its port, says 503 while the policy loads, and stops if it is told to.

The main thread serves from the beginning, so that clients and signals are answered while another thread loads and
compiles for minutes.
"""

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from openvla_jax.errors import InputError, reason
from openvla_jax.inference.early import EarlyResponse

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 0}
STOP_SECONDS = 60.0  # for requests that were taken; a second signal does not wait for them
LOADING = json.dumps({"error": "the policy is loading: try again", "status": "loading"})


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that listens at the address, which nobody else can take from then on; port 0: any free one.

    Raises InputError if the address cannot be taken.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A port that another server left a moment ago can be taken. Two may bind it, but only one can listen.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except Exception as error:  # OSError, and what odd names and numbers raise
        listener.close()
        why = getattr(error, "strerror", None) or reason(error)
        raise InputError(f"cannot serve at {host}:{port} ({why}): choose another --port or --host") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Returns the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Process(uvicorn.Server):
    """Serves the application that `load` returns, and 503 until it has, then prints the line that it returns too.

    `load` runs in a thread of its own once connections are accepted.
    """

    def __init__(self, load: Callable[[], tuple[ASGIApp, str]]):
        # The process ends without the events of a lifespan: what was taken is answered before. uvicorn's own logging
        # configuration would close the handlers that exist, absl's among them, and their streams.
        super().__init__(
            uvicorn.Config(
                self._respond, interface="asgi3", lifespan="off", ws="none", log_level="warning", log_config=None
            )
        )
        self._load = load
        self._app: ASGIApp | None = None
        self._failure: BaseException | None = None
        self._told: int | None = None

    def serve_at(self, listener: socket.socket) -> None:
        """Serves until a signal ends the process. Raises what `load` raised."""
        self.run(sockets=[listener])
        if self._told is not None:
            end(self._told)
        if self._failure is not None:
            raise self._failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept connections, and to load."""
        await super().startup(sockets)
        threading.Thread(target=self._run_load, name="loader", daemon=True).start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stops accepting, so that `run` returns when what was taken is answered; the second time ends at once."""
        if self._told is not None:
            end(sig)
        self._told, self.should_exit = sig, True
        timer = threading.Timer(STOP_SECONDS, end, [sig])
        timer.daemon = True
        timer.start()

    def _run_load(self) -> None:
        try:
            app, line = self._load()
        except BaseException as error:  # whatever it is, this process serves nothing
            self._failure, self.should_exit = error, True
            return
        self._app = app
        if self._told is None:
            print(line, flush=True)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app or EarlyResponse(LOADING, 503, {"Retry-After": "1"})
        await app(scope, receive, send)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM end the process inside the block as `end` does."""
    before = {sig: signal.signal(sig, end) for sig in EXIT_CODES}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def end(sig: int, frame: FrameType | None = None) -> NoReturn:
    """Ends the process with one line and the exit code of a signal. Works as a signal handler.

    Nothing is waited for: a thread that compiles cannot be interrupted, and Python would join it.
    """
    os.write(2, b"stopped\n")
    os._exit(EXIT_CODES[signal.Signals(sig)])
