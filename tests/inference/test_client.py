"""The client: it shows what a server says, whatever it says and whenever."""

import json
import re
import socket
import threading

import numpy as np
import pytest
from clients.canned import answering, http
from openvla_client import connection as connection_module

from openvla_jax.evaluate import main as evaluate_command
from openvla_jax.inference.client import Client, ServerError

PIXELS = np.zeros((4, 4, 3), np.uint8)
LARGE = {"17 MB": (2100, 2100, 3), "60 MB": (4000, 3750, 3)}  # of the bodies, in base64


def refusal(url: str, image: np.ndarray = PIXELS, **settings) -> str:
    with pytest.raises(ServerError) as caught:
        Client(url, **settings).predict_action(image, "push")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("status", "size"),
    [("413 Too Large", "17 MB"), ("413 Too Large", "60 MB"), ("401 Unauthorized", "17 MB"), ("408 Timeout", "17 MB")],
)
def test_client_shows_a_reason_given_before_the_body_was_read(status, size):
    with answering(http('{"error": "because"}', status, "Connection: close"), early=True) as (url, taken):
        message = refusal(url, np.zeros(LARGE[size], np.uint8))
    assert message.endswith(f"/act: status {status[:3]}: because")
    assert len(taken) == 1, "the body is not sent twice"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (http("<html>\nhello</html>"), r"status 200, not JSON: '<html>\\nhello"),
        (http("<html>gateway</html>", "502 Bad Gateway"), "status 502, not JSON: '<html>gateway"),
        (http("", "301 Moved", "Location: https://other/act"), "redirected to 'https://other/act': give that URL"),
        (http('{"__numpy__": "AAAA'), "status 200, not JSON"),
        (http("[1, NaN]"), "status 200, not JSON"),
        (http("[1, 2]"), "no answer to this request"),
        (http("{}"), "no answer to this request"),
        (http('{"__numpy__": "AAAAAAAA+H8=", "dtype": "<f8", "shape": [1]}'), "an action is not finite"),
        (http('{"__numpy__": "AAAAAAAA8D8=", "dtype": "<f8", "shape": []}'), r"shape \(\)"),
        (http('{"__numpy__": "AAAAAAAA8D8=", "dtype": "<f8", "shape": [1, 1]}'), r"shape \(1, 1\)"),
        (http('{"error": "two\\nlines"}', "500 Oh"), "status 500: two lines"),
        (http('"error"'), "'\"error\"' is no answer"),  # --reference_errors
        (http("[1]")[:-1], "ends 1 bytes early"),
        (http("x" * 100), "not JSON: 'xxx"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer: SSH-2.0"),
        (b"", "does not answer"),
    ],
)
def test_client_says_in_one_line_what_is_wrong_with_an_answer(answer, message):
    with answering(answer) as (url, taken):
        assert re.search(message, refusal(url)), refusal(url)
    assert len(taken) in (1, 2)


def test_client_refuses_an_answer_without_end(monkeypatch):
    monkeypatch.setattr(connection_module, "MAX_ANSWER", 2**16)
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 2**18) as (url, _):
        assert "longer than 65536 bytes" in refusal(url)


def test_client_sends_again_only_if_a_kept_connection_was_closed():
    action = '{"__numpy__": "AAAAAAAA8D8=", "dtype": "<f8", "shape": [1]}'
    with answering(http(action)) as (url, taken):
        client = Client(url)
        for _ in range(3):  # the server closes without a word, as one that was restarted
            assert client.predict_action(PIXELS, "push") == [1.0]
    assert len(taken) == 3
    with answering(b"") as (url, taken):
        refusal(url)
    assert len(taken) == 1


def test_client_waits_for_a_server_that_loads():
    loading = http('{"error": "the policy is loading: try again"}', "503 Unavailable", "Retry-After: 0")
    action = http('{"__numpy__": "AAAAAAAA8D8=", "dtype": "<f8", "shape": [1]}')
    with answering(loading, loading, action) as (url, _):
        assert Client(url).predict_action(PIXELS, "push") == [1.0]
    with answering(loading) as (url, _):
        assert refusal(url, timeout=0.1).endswith("status 503: the policy is loading: try again")
    dated = http('{"error": "full"}', "503 Unavailable", "Retry-After: Fri, 01 Jan 2100 00:00:00 GMT")
    with answering(dated) as (url, _):
        assert refusal(url, timeout=0.1).endswith("status 503: full")


@pytest.mark.parametrize("row", [None, "x", [], [[1.0], [1.0, 2.0]], [float("1e999")], [True], {}, [[[1.0]]]])
def test_client_checks_every_row_of_a_batch(row):
    for actions in ([row], [[1.0], row], row):
        with answering(http(json.dumps({"actions": actions}))) as (url, _), pytest.raises(ServerError):
            Client(url).predict_actions([PIXELS], ["push"])


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "http://", "http://a:port", "http://a:99999", "http://[::1", "ftp://a"]
)
def test_client_names_a_wrong_url(url):
    with pytest.raises(ValueError, match="give http://HOST:PORT"):
        Client(url)


INFO = {
    "observation": {"cameras": ["primary"], "rotation": 0, "state": []},
    "action": {"dim": 7},
    "statistics": {"arm": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}},
    "training": {},
}


@pytest.mark.parametrize(
    "answer",
    [
        "<html></html>", "[]", "{}", '{"status": "ok"}', json.dumps(INFO)[:-9], json.dumps(INFO | {"statistics": {}}),
        json.dumps(INFO | {"statistics": {"arm": {"action": {}}}}), json.dumps(INFO | {"action": {"dim": "7"}}),
        json.dumps(INFO | {"statistics": {"arm": {"action": {"q01": [float("nan")] * 7, "q99": [1.0] * 7}}}}),
        json.dumps(INFO | {"training": []}),
    ],
)  # fmt: skip
def test_evaluate_ends_in_one_line_for_what_is_no_policy(answer, tmp_path, capsys):
    with answering(http(answer)) as (url, _), pytest.raises(SystemExit) as caught:
        evaluate_command(["rollout", "--url", url, "--episodes", "1", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and url in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "does not answer"),
        (http('{"actions": [[[0, 0, 0]]]}'), "action"),
        (http('{"actions": [[[0, 0, 0, 0, 0, 0, NaN]]]}'), "not JSON"),
        (
            http('{"error": "dimension 0 of the action is nan"}', "500 Oh"),
            "500: dimension 0 of the action is nan",
        ),
    ],
)
def test_evaluate_ends_in_one_line_if_the_server_fails_in_a_rollout(answer, message, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with answering(http(json.dumps(INFO)), answer) as (url, _), pytest.raises(SystemExit) as caught:
        evaluate_command(["rollout", "--url", url, "--episodes", "1", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1, error


# ---------------------------------------------------------------------------------------------------------------------
# The server's side of a refusal
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["h11", "httptools"])
def refusing(request):
    """The URL of a server with a token that reads bodies of 1 MB within 0.3 s, by either of uvicorn's parsers."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip(request.param)
    from openvla_jax.inference.policy import Policy
    from openvla_jax.inference.server import Settings, make_app

    # No request gets as far as the policy.
    app = make_app(object.__new__(Policy), Settings(max_body_mb=1.0, body_seconds=0.3, token="secret"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, http=request.param))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("size", ["17 MB", pytest.param("60 MB", marks=pytest.mark.long)])
def test_server_gives_its_reason_before_it_closes(refusing, size):
    url, large = f"http://127.0.0.1:{refusing}", np.zeros(LARGE[size], np.uint8)
    assert "413: the body is larger than 1048576 bytes" in refusal(url, large, token="secret")
    assert refusal(url, large, token="other").endswith("status 401: a bearer token is needed")


@pytest.mark.parametrize("declared", [b"Content-Length: 100000", b"Transfer-Encoding: chunked"])
def test_server_answers_a_slow_body(refusing, declared):
    with socket.create_connection(("127.0.0.1", refusing), timeout=10) as connection:
        start = b"POST /act HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n" + declared + b"\r\n\r\n"
        connection.sendall(start + (b"1\r\n{\r\n" if b"chunked" in declared else b"{"))
        answer = b""
        while b"}" not in answer:
            answer += connection.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 0.3 s" in answer


def test_server_ends_the_refusal_of_a_body_that_was_read_to_its_end(refusing):
    with socket.create_connection(("127.0.0.1", refusing), timeout=5) as connection:
        connection.sendall(b"POST /act HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n")
        connection.sendall(b"Authorization: Bearer secret\r\n\r\n" + b"180000\r\n" + b" " * 0x180000 + b"\r\n0\r\n\r\n")
        answer = b""
        while b"1048576" not in answer:
            answer += connection.recv(2**16)
    assert answer.startswith(b"HTTP/1.1 413")
