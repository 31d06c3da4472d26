"""The simulator's side of the connection: reads requests, has them done, writes answers."""

import os
import sys
import time
import traceback
from typing import Any, BinaryIO

from openvla_jax.errors import InputError, reason
from openvla_jax.sim.libero import messages

REQUESTS = ("hello", "suite", "load", "reset", "step", "render", "fingerprint", "demonstrate")


def take_output() -> BinaryIO:
    """Returns the process's standard output for answers; what libraries print goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def serve(simulator: Any, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests with the methods of `simulator`, until there are no more.

    A method takes the request's values as keywords and returns the answer's. What it raises is the answer's "error".
    """

    def read(count: int) -> bytes:
        data = requests.read(count)
        if len(data) < count:
            raise EOFError
        return data

    while True:
        try:
            request = messages.decode(read)
        except EOFError:
            return
        answers.write(messages.encode({**answer(simulator, request), "cpu": time.process_time()}))
        answers.flush()


def answer(simulator: Any, request: messages.Message) -> messages.Message:
    """Returns the answer to one request."""
    what = request.pop("do", None)
    if what not in REQUESTS:
        return {"error": f"request {what!r}: one of {', '.join(REQUESTS)}", "bug": True}
    try:
        return getattr(simulator, what)(**request)
    except InputError as error:
        return {"error": str(error), "bug": False}
    except Exception as error:
        traceback.print_exc()
        return {"error": reason(error), "bug": True}
