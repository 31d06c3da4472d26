"""Servers that answer with given bytes, for clients that must make sense of them."""

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence


def http(body: str | bytes, status: str = "200 OK", *headers: str) -> bytes:
    """Returns a whole response."""
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_request(connection: socket.socket) -> None:
    """Reads a request to its end."""
    with connection.makefile("rb") as file:
        lines = list(iter(lambda: file.readline().strip().lower(), b""))
        file.read(sum(int(line.split()[1]) for line in lines if line.startswith(b"content-length")))


@contextlib.contextmanager
def answering(*answers: bytes | Sequence[bytes], early: bool = False) -> Iterator[tuple[str, list[socket.socket]]]:
    """A server that gives one answer per connection, the last one again and again, and closes.

    Yields (URL, list of connections). An answer of several parts is given request by request on one connection.
    `early`: the server reads no more than the first bytes, so that closing resets the connection.
    """
    listener, taken = socket.create_server(("127.0.0.1", 0)), []

    def run():
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                connection = listener.accept()[0]
                taken.append(connection)
                answer = answers[min(len(taken), len(answers)) - 1]
                with connection, contextlib.suppress(OSError):
                    for part in [answer] if isinstance(answer, bytes) else answer:
                        connection.recv(2**16) if early else read_request(connection)
                        connection.sendall(part)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", taken
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
