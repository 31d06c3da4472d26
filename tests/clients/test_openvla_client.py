"""The client package without jax: what it sends, what it reads, and what it does when a server fails."""

import ast
import base64
import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from clients.canned import answering, http, read_request
from conftest import ROOT, golden
from openvla_client import Client, ClientError, Observation, ServerError, connection, messages
from openvla_client.arrays import decode_array, encode_array

PACKAGE = ROOT / "clients" / "openvla_client" / "openvla_client"
PIXELS = np.zeros((4, 4, 3), np.uint8)
SEEN = Observation({"primary": PIXELS, "wrist": PIXELS}, "push", np.arange(3.0))
CHUNK = np.arange(6.0).reshape(3, 2)
ANSWER = json.dumps([encode_array(row) for row in CHUNK])


def refusal(url: str, **settings) -> ServerError:
    with pytest.raises(ServerError) as caught:
        Client(url, **settings).predict_chunk(SEEN)
    assert "\n" not in str(caught.value)
    return caught.value


# ---------------------------------------------------------------------------------------------------------------------
# The package
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_client_is_python_3_9_and_imports_numpy_alone(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    tops = {name.partition(".")[0] for name in imported}
    assert tops <= {*sys.stdlib_module_names, "numpy", "openvla_client"}
    strict = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "strict"]
    assert not strict, "zip(strict=) is of Python 3.10"


def test_client_of_this_package_is_the_same_code():
    from openvla_jax.errors import InputError
    from openvla_jax.inference import client

    assert issubclass(client.Client, Client) and issubclass(client.ServerError, (InputError, ServerError))
    with pytest.raises(InputError, match="give http://HOST:PORT"):
        client.Client("ftp://a")
    with pytest.raises(InputError, match="camera 'side': the form 'oft'"):
        client.Client(form="oft").predict_chunk(Observation({"primary": PIXELS, "side": PIXELS}, "push"))
    with answering(http('{"error": "because"}', "400 No")) as (url, _), pytest.raises(client.ServerError) as caught:
        client.Client(url, form="oft").predict_chunks([SEEN])
    assert caught.value.status == 400 and str(caught.value).endswith("status 400: because")


@pytest.mark.long
def test_client_installs_alone(tmp_path):
    """A wheel of the client's folder, in an interpreter that sees it and numpy only."""
    source = shutil.copytree(PACKAGE.parent, tmp_path / "source")  # building leaves files in it
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = tmp_path.glob("openvla_client-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), wheel], check=True)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import openvla_client as c; print(c.__file__, c.__version__);"
        "assert not {'jax', 'PIL', 'openvla_jax'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.startswith(str(tmp_path)) and wheel.name.split("-")[1] in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------------------------------


def test_request_has_the_form_of_the_reference_s_client():
    exchange = json.loads(golden("oft_tiny/l1_wrist_proprio/server.json").read_text())
    theirs = json.loads(exchange["request"])
    arrays = {key: decode_array(theirs[key], key) for key in ("full_image", "wrist_image", "state")}
    images = {"primary": arrays["full_image"], "wrist": arrays["wrist_image"]}
    seen = Observation(images, theirs["instruction"], arrays["state"])
    assert json.loads(json.dumps(messages.request(seen, "oft"), default=encode_array)) == theirs
    assert set(messages.request(seen)) == {"images", "instruction", "state"}
    rows = [decode_array(row, "action") for row in json.loads(exchange["response"])]
    np.testing.assert_array_equal(messages.read_chunk(json.loads(exchange["response"])), np.stack(rows))
    with answering(http(exchange["response_bad"])) as (url, _), pytest.raises(ServerError, match="'\"error\"' is no"):
        Client(url, form="oft").predict_chunk(seen)


@pytest.mark.parametrize(
    ("cameras", "keys"),
    [
        (("primary",), ["full_image"]),
        (("front", "left_wrist", "right_wrist"), ["full_image", "left_wrist_image", "right_wrist_image"]),
        (("primary", "wrist_image"), ["full_image", "wrist_image"]),
    ],
)
def test_request_names_cameras_as_oft_does(cameras, keys):
    body = messages.request(Observation(dict.fromkeys(cameras, PIXELS), "push", unnorm_key="arm"), "oft")
    assert list(body) == [*keys, "instruction", "unnorm_key"]


@pytest.mark.parametrize("form", ["images", "oft"])
@pytest.mark.parametrize("answer", [ANSWER, json.dumps(encode_array(CHUNK))])
def test_predict_chunk_reads_a_list_and_an_array(answer, form):
    with answering(http(answer)) as (url, _):
        chunk = Client(url, form=form).predict_chunk(SEEN)
    assert chunk.dtype == np.float64
    np.testing.assert_array_equal(chunk, CHUNK)


def test_client_of_oft_s_server_asks_one_by_one():
    with answering(http(ANSWER)) as (url, taken):
        client = Client(url, form="oft")
        np.testing.assert_array_equal(client.predict_chunks([SEEN, SEEN]), [CHUNK, CHUNK])
        np.testing.assert_array_equal(client.predict_action(PIXELS, "push"), CHUNK[0])
        np.testing.assert_array_equal(client.predict_actions([PIXELS], ["push"]), CHUNK[:1])
    assert len(taken) == 4


@pytest.mark.parametrize(
    "answer",
    [
        "[]", "[[]]", "[1.0]", "[[1.0], [2.0]]", "[{}]", "[null]", "{}", "null", '"error"',
        json.dumps(encode_array(CHUNK[0])),
        json.dumps([encode_array(CHUNK)]),
        json.dumps([encode_array(CHUNK[0]), encode_array(CHUNK[0, :1])]),
        '[{"__numpy__": "AAAAAAAA+H8=", "dtype": "<f8", "shape": [1]}]',
    ],
)  # fmt: skip
def test_predict_chunk_refuses_what_is_no_chunk(answer):
    with (
        answering(http(answer)) as (url, _),
        pytest.raises(ServerError, match="is no answer to this request") as caught,
    ):
        Client(url).predict_chunk(SEEN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Client(form="off"), "form 'off': one of 'images', 'oft'"),
        (lambda: Client("http://a:port"), "give http://HOST:PORT"),
        (lambda: Client(token="a\nb"), "the token has characters that no header can hold"),
        (lambda: Client().predict_actions([PIXELS], []), "1 images, 0 instructions, 1 unnorm_keys: as many of each"),
        (lambda: Client(form="oft").predict_chunk(Observation({}, "push")), "no images"),
        (lambda: Client().predict_chunk(Observation({}, "push", np.array([np.nan]))), "the observation is not finite"),
    ],
)
def test_client_names_what_the_caller_can_fix(make, message):
    with pytest.raises(ClientError, match=re.escape(message)) as caught:
        make()
    assert not isinstance(caught.value, ServerError) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Servers that fail
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that a client would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(connection.time, "sleep", slept.append)
    return slept


def busy(reason: str, after: str = "0", status: str = "503 Busy") -> bytes:
    return http(json.dumps({"error": reason}), status, f"Retry-After: {after}")


def test_client_asks_again_when_the_server_says(pauses):
    with answering(busy("loading", "2"), busy("full", "7", "429 Many"), http(ANSWER)) as (url, taken):
        np.testing.assert_array_equal(Client(url).predict_chunk(SEEN), CHUNK)
    assert pauses == [2, 7] and len(taken) == 3


@pytest.mark.parametrize("after", ["0", "30", "Fri, 01 Jan 2100 00:00:00 GMT", "nan", "-1", "9" * 40])
def test_client_stops_asking_after_its_timeout_with_the_server_s_reason(after):
    began = time.monotonic()
    with answering(busy("8 requests wait already: try again", after)) as (url, taken):
        error = refusal(url, timeout=0.3)
    assert time.monotonic() - began < 5 and len(taken) > 1
    assert str(error).endswith("/act: status 503: 8 requests wait already: try again") and error.status == 503


def test_client_keeps_the_reason_of_a_server_that_then_went_away(pauses):
    with answering(busy("the server is stopping"), b"", http(ANSWER)) as (url, _):
        np.testing.assert_array_equal(Client(url).predict_chunk(SEEN), CHUNK)  # it came back
    with answering(busy("the server is stopping"), b"") as (url, _):
        error = refusal(url, timeout=0.3)
    assert "does not answer" in str(error) and "it answered status 503: the server is stopping" in str(error)


@pytest.mark.parametrize("status", ["400 Bad", "401 No", "413 Large", "422 No", "500 Oh", "502 Gateway", "404 None"])
def test_client_does_not_repeat_what_was_refused(status):
    with answering(http('{"error": "state has shape (2,)"}', status), http(ANSWER)) as (url, taken):
        error = refusal(url)
    assert str(error).endswith(f"status {status[:3]}: state has shape (2,)") and error.status == int(status[:3])
    assert len(taken) == 1


@pytest.mark.parametrize("sent", [10, 200, len(http(ANSWER)) - 1])
@pytest.mark.parametrize("kept", [False, True])
def test_client_does_not_repeat_what_a_dying_server_answered_by_half(sent, kept):
    cut = http(ANSWER)[:sent]
    with answering((http(ANSWER), cut) if kept else cut, http(ANSWER)) as (url, taken):
        client = Client(url)
        if kept:
            client.predict_chunk(SEEN)
        with pytest.raises(ServerError, match=r"does not answer|ends \d+ bytes early") as caught:
            client.predict_chunk(SEEN)
        assert caught.value.status is None and len(taken) == 1
        np.testing.assert_array_equal(client.predict_chunk(SEEN), CHUNK)  # a new connection


def test_client_does_not_repeat_what_was_reset_in_mid_answer():
    """The server's process is killed: the operating system resets the connection, which was used before."""
    listener, taken = socket.create_server(("127.0.0.1", 0)), []

    def run():
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                server = listener.accept()[0]
                taken.append(server)
                read_request(server)
                server.sendall(http(ANSWER))
                read_request(server)
                server.sendall(http(ANSWER)[:-40])
                time.sleep(0.2)  # until the client has read the beginning
                server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                server.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}")
    client.predict_chunk(SEEN)
    with pytest.raises(ServerError, match="broke off"):
        client.predict_chunk(SEEN)
    assert len(taken) == 1
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.mark.parametrize("begun", [b"", http(ANSWER)[:60]])
def test_client_gives_up_on_a_silent_server(begun):
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def run():
        taken.append(listener.accept()[0])
        taken[0].sendall(begun)

    threading.Thread(target=run, daemon=True).start()
    client, began = Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3), time.monotonic()
    with pytest.raises(ServerError, match=r"does not answer within 0\.3 s"):
        client.predict_chunk(SEEN)
    assert 0.25 < time.monotonic() - began < 5 and len(taken) == 1
    listener.close()
    taken[0].close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (http("<html>\nhello</html>"), r"status 200, not JSON: '<html>\\nhello"),
        (http("<html>gateway</html>", "502 Bad Gateway"), "status 502, not JSON: '<html>gateway"),
        (http("[[NaN]]"), "status 200, not JSON"),
        (http(b"\xff\xfe\x00"), "status 200, not JSON"),
        (http("", "301 Moved", "Location: https://other/act"), "redirected to 'https://other/act': give that URL"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer: SSH-2.0"),
    ],
)
def test_client_shows_an_answer_that_is_not_json(answer, message):
    with answering(answer) as (url, taken):
        assert re.search(message, str(refusal(url)))
    assert len(taken) == 1


def test_client_says_that_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert "does not answer" in str(refusal(url))
        with pytest.raises(ServerError, match=r"was not ready within 0 s: .* does not answer"):
            Client(url).wait_until_ready(0)


@pytest.mark.parametrize("answer", ["{}", "[]", '{"observation": {"cameras": []}, "action": {"horizon": 8}}'])
def test_info_is_checked(answer):
    with answering(http(answer)) as (url, _), pytest.raises(ServerError, match="is no answer"):
        Client(url).info()
    told = {"observation": {"cameras": ["primary"]}, "action": {"horizon": 8}}
    with answering(http(json.dumps(told))) as (url, _):
        assert Client(url).info() == told


def test_token_is_sent_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENVLA_TOKEN", "secret")
    assert Client().connection._headers["Authorization"] == "Bearer secret"
    assert base64.b64decode(encode_array(PIXELS)["__numpy__"]) == PIXELS.tobytes()
