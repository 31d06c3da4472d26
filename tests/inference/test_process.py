"""The server's process: one per port, 503 while it loads, a quiet end by a signal at any time."""

import concurrent.futures
import contextlib
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("uvicorn")
from conftest import ROOT
from openvla_client import ServerError

from openvla_jax.errors import InputError
from openvla_jax.inference.client import Client
from openvla_jax.inference.process import bind, url_of

# `serve` with another application, which takes no time to import: argv is host, port, and the seconds it loads.
SERVE = """
import asyncio, sys, time
from openvla_jax import cli
from openvla_jax.errors import InputError
from openvla_jax.inference.process import Process, bind, ended_by_signals, url_of
from starlette.responses import JSONResponse

async def app(scope, receive, send):
    if scope["path"] == "/info":
        await asyncio.sleep(0.6)
    await JSONResponse({"status": "ok"})(scope, receive, send)

@cli.command
def main(arguments):
    host, port, seconds = arguments
    with ended_by_signals():
        listener = bind(host, int(port))
        def load():
            print("loading", url_of(listener), flush=True)
            until = time.monotonic() + float(seconds)
            while time.monotonic() < until:
                sum(range(10**5))  # compiling, as far as a signal sees
            if host == "127.0.0.2":
                raise InputError("the checkpoint is damaged")
            if host == "127.0.0.3":
                raise KeyError("a bug")
            return app, f"loaded; {url_of(listener)}"
        Process(load).serve_at(listener)

sys.exit(main())
"""


@contextlib.contextmanager
def serving(host="127.0.0.1", port=0, seconds=0.0):
    """The process and its URL, once it listens."""
    command = [sys.executable, "-c", SERVE, host, str(port), str(seconds)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, process.stdout.readline().rpartition(" ")[2].strip()
        finally:
            process.kill()


def ended(process, seconds=10):
    """The exit code, and what the process wrote on stderr."""
    _, error = process.communicate(timeout=seconds)
    return process.returncode, error


@pytest.mark.parametrize(
    ("phase", "sig", "code"),
    [
        ("loading", signal.SIGINT, 130),
        ("loading", signal.SIGTERM, 0),
        ("serving", signal.SIGINT, 130),
        ("answering", signal.SIGINT, 130),
        ("answering", signal.SIGTERM, 0),
    ],
)
def test_signal_ends_the_process_with_one_line(phase, sig, code):
    with serving(seconds=30 if phase == "loading" else 0) as (process, url), contextlib.ExitStack() as stack:
        client = Client(url)
        if phase == "loading":
            with pytest.raises(ServerError, match="503: the policy is loading"):
                client.connection.ask("GET", "/health", lambda answer: answer, patient=False)
        else:
            client.wait_until_ready(10)  # its connection stays open
        if phase == "answering":
            pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
            answer = pool.submit(client.connection.ask, "GET", "/info", lambda answer: answer)
            time.sleep(0.2)
        process.send_signal(sig)
        if phase == "answering":
            assert answer.result(10) == {"status": "ok"}, "what was taken is answered"
        assert ended(process) == (code, "stopped\n")
        port = int(url.rpartition(":")[2])
        bind("127.0.0.1", port).close()  # free again


def test_second_signal_does_not_wait_for_requests():
    with serving() as (process, url), concurrent.futures.ThreadPoolExecutor(1) as pool:
        Client(url).wait_until_ready(10)
        answer = pool.submit(Client(url).info)
        for sig in (signal.SIGTERM, signal.SIGINT):
            time.sleep(0.2)
            process.send_signal(sig)
        with pytest.raises(ServerError, match="does not answer"):
            answer.result(10)
        assert ended(process) == (130, "stopped\n")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "0.0.0.0"),
        ("0.0.0.0", "127.0.0.1"),
        ("::1", "::"),
        ("::", "127.0.0.1"),
    ],
)
def test_bind_takes_a_port_once(first, second):
    try:
        listener = bind(first, 0)
    except InputError as error:
        pytest.skip(str(error))  # no IPv6 here
    port = listener.getsockname()[1]
    with listener, pytest.raises(InputError, match=f":{port} .*in use.*choose another --port"):
        bind(second, port)
    bind(second, port).close()


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 70000), ("127.0.0.1", -1), ("no.such.invalid", 0), ("a..b", 0)]
)
def test_bind_names_an_address_that_cannot_be(host, port):
    with pytest.raises(InputError, match=rf"cannot serve at {host}:{port} \(.+\): choose another"):
        bind(host, port)


def test_url_of_names_the_real_port():
    with bind("127.0.0.1", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}" and not url_of(listener).endswith(
            ":0"
        )


def test_second_server_ends_in_one_line_while_the_first_loads():
    with serving(seconds=1.5) as (first, url):
        port = int(url.rpartition(":")[2])
        with serving(port=port) as (second, _):
            code, error = ended(second)
        assert code == 2 and error.count("\n") == 1 and "choose another --port" in error, error
        # Not before requests are really answered:
        assert first.stdout.readline() == f"loaded; {url}\n"
        assert Client(url).connection.ask("GET", "/health", lambda answer: answer) == {"status": "ok"}


@pytest.mark.parametrize(
    ("host", "code", "message"), [("127.0.0.2", 2, "error: the checkpoint is damaged"), ("127.0.0.3", 1, "a bug")]
)
def test_failure_while_loading_ends_the_process_in_one_line(host, code, message):
    with serving(host) as (process, _):
        got, error = ended(process)
    assert got == code and message in error and error.count("\n") == 1, error
