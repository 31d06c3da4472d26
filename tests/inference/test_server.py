"""The server: its protocol, what it refuses, batching, overload, shutdown; and one real process."""

import base64
import concurrent.futures
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
from conftest import xla_flags
from fastapi.testclient import TestClient
from small_policy import INSTRUCTIONS, STATISTICS, listening, small_policy

from openvla_jax.checkpoint.load import save_model
from openvla_jax.evaluate import main as evaluate_command
from openvla_jax.evaluation import figures
from openvla_jax.evaluation.rollouts import evaluate
from openvla_jax.inference import wire
from openvla_jax.inference.batcher import Batcher, QueueFullError, StoppedError
from openvla_jax.inference.client import Client, ServerError
from openvla_jax.inference.policy import Policy
from openvla_jax.inference.server import Settings, make_app, warm_up
from openvla_jax.models.quantize import count_bytes

ARM = {"arm": STATISTICS["arm"]}
MAX_BATCH = 4


@pytest.fixture(scope="module")
def policy():
    policy = small_policy(ARM, text_length=36)
    warm_up(policy, MAX_BATCH, log=lambda line: None)
    return policy


@pytest.fixture(scope="module")
def client(policy):
    with TestClient(
        make_app(policy, Settings(max_batch=MAX_BATCH, max_body_mb=1.0)), raise_server_exceptions=False
    ) as c:
        yield c


def image(seed=0, size=56):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def array(value, **changes):
    return {
        "__numpy__": base64.b64encode(value.tobytes()).decode(),
        "dtype": "|u1",
        "shape": list(value.shape),
    } | changes


def good(**changes):
    return {"image": array(image()), "instruction": INSTRUCTIONS[0], "unnorm_key": "arm"} | changes


def decoded(answer):
    assert set(answer) == {"__numpy__", "dtype", "shape"}
    return np.frombuffer(base64.b64decode(answer["__numpy__"]), answer["dtype"]).reshape(answer["shape"])


# ---------------------------------------------------------------------------------------------------------------------
# Protocol
# ---------------------------------------------------------------------------------------------------------------------


def test_openvla_s_clients_are_answered_plain_and_encoded(client, policy):
    json_numpy = pytest.importorskip("json_numpy")
    expected = policy.predict_action(image(), INSTRUCTIONS[0])
    body = json_numpy.dumps({"image": image(), "instruction": INSTRUCTIONS[0]})
    plain = client.post("/act", content=body)
    assert plain.status_code == 200 and plain.headers["content-type"] == "application/json"
    np.testing.assert_array_equal(json_numpy.loads(plain.text), expected)
    np.testing.assert_array_equal(decoded(plain.json()), expected)
    encoded = client.post("/act", json={"encoded": body}).json()
    assert isinstance(encoded, str)
    np.testing.assert_array_equal(json_numpy.loads(encoded), expected)
    assert json_numpy.loads(plain.text).dtype == np.float64


def test_pictures_and_lists_are_answered_with_plain_numbers(client, policy):
    buffer = io.BytesIO()
    Image.fromarray(image()).save(buffer, "PNG")
    expected = policy.predict_action(image(), INSTRUCTIONS[0]).tolist()
    picture = base64.b64encode(buffer.getvalue()).decode()
    for value in (picture, f"data:image/png;base64,{picture}", image().tolist()):
        assert client.post("/act", json=good(image=value)).json() == expected
    buffer = io.BytesIO()
    Image.fromarray(image()).save(buffer, "JPEG")
    seen = np.asarray(Image.open(buffer))
    answer = client.post("/act", json=good(image=base64.b64encode(buffer.getvalue()).decode()))
    assert answer.json() == policy.predict_action(seen, INSTRUCTIONS[0]).tolist()


def test_a_batch_in_one_body(client, policy):
    requests = [good(image=array(image(i)), instruction=text) for i, text in enumerate(INSTRUCTIONS[:2] * 3)]
    answer = client.post("/act_batch", json={"requests": requests}).json()["actions"]
    expected = [policy.predict_action(image(i), text).tolist() for i, text in enumerate(INSTRUCTIONS[:2] * 3)]
    assert answer == expected
    requests[2]["instruction"] = ""
    wrong = client.post("/act_batch", json={"requests": requests})
    assert wrong.status_code == 400 and "request 2: instruction '' is empty" in wrong.json()["error"]


def test_act_answers_images_with_the_whole_chunk(client, policy):
    images = {"primary": array(image())}
    answer = client.post("/act", json={"images": images, "instruction": INSTRUCTIONS[0]}).json()
    chunk = np.stack([decoded(row) for row in answer])
    np.testing.assert_array_equal(chunk, policy.predict_chunk(policy.observe(image(), INSTRUCTIONS[0])))
    rows = [good(), {"images": images, "instruction": INSTRUCTIONS[0]}]
    first, whole = client.post("/act_batch", json={"requests": rows}).json()["actions"]
    assert whole == [first] and first == chunk[0].tolist()
    listed = {"images": {"primary": image().tolist()}, "instruction": INSTRUCTIONS[0]}
    assert client.post("/act", json=listed).json() == chunk.tolist(), "plain numbers for plain numbers"


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"images": {"primry": array(image())}}, 400, "images: unknown camera 'primry'; did you mean 'primary'"),
        ({"images": {}}, 400, "images is an object: send an object, {camera name: image, ...}"),
        ({"images": {"primary": 3}}, 400, "images.primary is a number"),
        ({"images": {"primary": array(image()), "wrist": array(image())}}, 400, "unknown camera"),
        ({"images": {"primary": array(image())}, "image": array(image())}, 400, "'image' and 'images' are both given"),
        ({"images": {"primary": array(image())}, "state": "x"}, 400, "state is text: send a list of numbers"),
        ({"images": {"primary": array(image())}, "state": [1, None]}, 400, "state is a list"),
        ({"images": {"primary": array(image())}, "state": [10**400]}, 400, "state is a list"),
        ({"images": {"primary": array(image())}, "state": [1.0]}, 400, "state is given, but the policy was trained"),
        ({}, 400, "'image' is missing"),
    ],
)
def test_act_names_the_key_of_a_wrong_observation(client, changes, status, message):
    response = client.post("/act", json={"instruction": "push"} | changes)
    assert response.status_code == status and message in response.json()["error"], response.json()


def test_what_it_says_of_itself(client, policy):
    assert client.get("/health").json() == {"status": "ok"}
    info = client.get("/info").json()
    assert info["model"] == json.loads(json.dumps(policy.contract.model.to_dict()))
    assert info["preprocessing"]["resize_kernel"] == "lanczos3" and info["dtype"] == "float32"
    assert info["observation"] == {"cameras": ["primary"], "rotation": 0, "state": []}
    assert (info["action"]["horizon"], info["action"]["executed"], info["action"]["bins"]) == (1, 1, 256)
    assert info["statistics"]["arm"]["action_dim"] == 3 and info["constrained"] is True
    assert info["devices"] == 1 and info["quantization"] is None
    before = policy.decoded_tokens
    client.post("/act", json=good())
    text = client.get("/metrics").text
    assert f"openvla_action_tokens_total {before + 3:.1f}" in text
    assert 'openvla_requests_total{path="/act",status="200"}' in text and "openvla_batch_size_bucket" in text


def test_a_token_is_asked_for_and_errors_can_be_the_reference_s(policy):
    settings = Settings(max_batch=MAX_BATCH, token="secret", reference_errors=True)
    with TestClient(make_app(policy, settings)) as client:
        assert client.get("/health").status_code == 200
        for path in ("/info", "/metrics"):
            assert client.get(path).status_code == 401
        for header in ({}, {"Authorization": "Bearer secreT"}, {"Authorization": b"Bearer secr\xe9t"}):
            assert client.post("/act", json=good(), headers=header).status_code == 401
        allowed = {"Authorization": "Bearer secret"}
        assert client.post("/act", json=good(), headers=allowed).status_code == 200
        bad = client.post("/act", json={}, headers=allowed)
        assert (bad.status_code, bad.json()) == (200, "error")


# ---------------------------------------------------------------------------------------------------------------------
# Hostile requests
# ---------------------------------------------------------------------------------------------------------------------


def png(size, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


PIXELS = image()
BAD_VALUES = {
    "image": [
        None, 7, True, {}, [], [1, 2], [[1, 2], [3]], [[["a"]]], [[[300, 0, 0]]], [[[-1, 0, 0]]], [[[0.5, 0, 0]]], "",
        "no base64!", "AAAA", png((4, 4), "L"), png((4, 4), "RGBA"), png((5000, 4000)), png((1000, 2)),
        array(PIXELS, dtype="|O"), array(PIXELS, dtype="O"), array(PIXELS, dtype="object"), array(PIXELS, dtype="<f4"),
        array(PIXELS, dtype="|i1"), array(PIXELS, dtype="|b1"), array(PIXELS, dtype="<U9"), array(PIXELS, dtype="|V3"),
        array(PIXELS, dtype="(9,)u1"), array(PIXELS, dtype="u1,u1"), array(PIXELS, dtype=[["a", "|u1"]]),
        array(PIXELS, dtype="M8[s]"), array(PIXELS, dtype=3), array(PIXELS, dtype=None), array(PIXELS, dtype="nope"),
        array(PIXELS, shape=[56, 56, 4]), array(PIXELS, shape=[56, -56, 3]), array(PIXELS, shape=[10**18, 10**18, 3]),
        array(PIXELS, shape=[9408]), array(PIXELS, shape=[1, 56, 56, 3]), array(PIXELS, shape=[56.0, 56, 3]),
        array(PIXELS, shape="56"), array(PIXELS, shape=None), array(PIXELS, shape=[True, 56, 168]),
        array(PIXELS, shape=[0, 56, 3], __numpy__=""), array(PIXELS, shape=[], __numpy__="AA=="),
        array(PIXELS, shape=[3136, 1, 3]), array(PIXELS, __numpy__="****"), array(PIXELS, __numpy__=3),
        array(PIXELS, __numpy__=None), array(PIXELS, extra=1), {"__numpy__": "AAAA"},
    ],
    "instruction": [None, 3, True, [], {}, ["pick"], "", "   ", "\ud800", "<image>"],
    "unnorm_key": [3, True, [], {}, "", "arms", "two_arms", "\ud800", "x" * 1000],
}  # fmt: skip
BAD_BODIES = [
    b"", b"{", b"null", b"[]", b"3", b'"text"', b"\xff\xfe", b"NaN", b'{"a": Infinity}', b"[" * 200_000,
    b'{"a":' * 50_000, b"9" * 10_000, b'{"encoded": 3}', b'{"encoded": "{"}', b'{"encoded": "[]"}',
    b'{"encoded": "{}", "image": 1}', b"{}", b'{"image": 1}', b'{"__reduce__": "os.system"}', b"\x00" * 100,
    b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00.",
]  # fmt: skip


def hostile_requests():
    """500 requests: every bad value in an otherwise good one, every bad body, cut bodies, unknown keys."""
    whole = json.dumps(good()).encode()
    requests = [json.dumps(good(**{key: value})).encode() for key, values in BAD_VALUES.items() for value in values]
    requests += [json.dumps({"encoded": json.dumps(good(image=value))}).encode() for value in BAD_VALUES["image"]]
    requests += BAD_BODIES
    requests += [
        json.dumps(good(**{key: 1})).encode() for key in ("imge", "do_sample", "__class__", "encoded", "\ud800")
    ]
    rng = np.random.default_rng(0)
    while len(requests) < 500:
        cut = whole[: rng.integers(len(whole))]
        spoiled = bytearray(whole)
        start = int(rng.integers(60))  # before the pixels, where any byte is a valid pixel
        spoiled[start] = (spoiled[start] + int(rng.integers(1, 255))) % 256
        requests += [cut, b"".join([whole, b","]), whole.replace(b'"image"', b'"image%d"' % rng.integers(100))]
        try:
            wire.read_payload(json.loads(bytes(spoiled)))
        except (ValueError, AssertionError):
            requests.append(bytes(spoiled))
    return requests[:500]


def test_500_hostile_requests_get_a_reason_and_do_no_harm(client, policy):
    requests = hostile_requests()
    assert len(requests) == 500
    expected = policy.predict_action(image(), INSTRUCTIONS[0])
    programs = set(policy.programs)
    for number, body in enumerate(requests):
        response = client.post("/act", content=body)
        assert 400 <= response.status_code < 500, (number, body[:200], response.text)
        reason = response.json()["error"]
        assert reason and len(reason) < 700 and "Traceback" not in response.text and "\n" not in reason, (
            number,
            reason,
        )
        if number % 50 == 0:
            np.testing.assert_array_equal(decoded(client.post("/act", json=good()).json()), expected)
    np.testing.assert_array_equal(decoded(client.post("/act", json=good()).json()), expected)
    assert policy.programs == programs, "a hostile request made it compile"


def test_bodies_that_are_too_large_or_slow_are_refused(client):
    assert client.post("/act", content=b" " * (2**20 + 1)).status_code == 413
    assert client.post("/act", content=iter([b" " * 2**19] * 3)).status_code == 413  # no length declared
    assert client.post("/act", content=b"{}", headers={"Content-Length": "9" * 30}).status_code == 413
    assert client.post("/nothing", json=good()).status_code == 404
    assert client.get("/act").status_code == 405


# ---------------------------------------------------------------------------------------------------------------------
# Batching
# ---------------------------------------------------------------------------------------------------------------------


def test_concurrent_requests_share_batches_and_each_gets_its_own_answer(policy):
    sizes = []
    batcher = Batcher(policy, MAX_BATCH, 0.05, observe=lambda size, waited, took: sizes.append(size))
    requests = [policy.prepare(policy.observe(image(i), INSTRUCTIONS[i % 2])) for i in range(10)]
    futures = [future for request in requests for future in batcher.submit([request])]
    for future, request in zip(futures, requests, strict=True):
        np.testing.assert_array_equal(future.result(60), policy.act([request])[0])
    assert sum(sizes) == 10 and max(sizes) == MAX_BATCH
    last = batcher.submit(requests)
    batcher.stop()
    assert all(future.done() for future in last), "what was taken is answered before it stops"
    with pytest.raises(StoppedError):
        batcher.submit(requests[:1])


def test_a_full_queue_refuses_and_a_failing_batch_fails_alone(policy, monkeypatch):
    go, act = threading.Event(), policy.act

    def slow(requests, size=None):
        assert go.wait(20)
        if requests[0].seed == 13:
            raise RuntimeError("boom")
        return act(requests, size)

    monkeypatch.setattr(policy, "act", slow)
    batcher = Batcher(policy, 1, 0.0, max_queue=2)
    request = policy.prepare(policy.observe(image(), INSTRUCTIONS[0]))
    bad = policy.prepare(policy.observe(image(), INSTRUCTIONS[0]), seed=13)
    futures = batcher.submit([bad])
    while batcher.waiting:
        time.sleep(0.01)
    futures += batcher.submit([request])
    with pytest.raises(QueueFullError, match="1 requests wait"):
        batcher.submit([request, request])
    futures += batcher.submit([request])  # of the two that were refused, none was taken
    with pytest.raises(QueueFullError, match="2 requests wait"):
        batcher.submit([request])
    go.set()
    with pytest.raises(RuntimeError, match="boom"):
        futures[0].result(20)
    np.testing.assert_array_equal(futures[1].result(20), futures[2].result(20))
    batcher.stop()


def test_overload_is_503_with_retry_after(policy, monkeypatch):
    go, act = threading.Event(), policy.act
    monkeypatch.setattr(policy, "act", lambda requests, size=None: go.wait(20) and act(requests, size))
    settings = Settings(max_batch=1, max_queue=1, wait_ms=0)
    with TestClient(make_app(policy, settings)) as client, concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(client.post, "/act", json=good()) for _ in range(6)]
        done, _ = concurrent.futures.wait(answers, 20, concurrent.futures.FIRST_COMPLETED)
        full = next(iter(done)).result()
        assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1 and "wait" in full.json()["error"]
        go.set()
        codes = [answer.result(20).status_code for answer in answers]
        assert set(codes) == {200, 503} and codes.count(200) >= 2
        monkeypatch.setattr(policy, "act", lambda requests, size=None: 1 / 0)
        broken = client.post("/act", json=good())
        assert broken.status_code == 500 and "ZeroDivision" not in broken.text


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation through it
# ---------------------------------------------------------------------------------------------------------------------


def test_rollouts_through_a_server_are_those_of_the_policy_itself(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    row = {"q01": [-0.1] * 7, "q99": [0.1] * 7, "mask": [True] * 6 + [False]}
    policy = small_policy({"tabletop": {"action": row}}, text_length=36)
    local = evaluate(policy, 2)["policy"]
    with listening(make_app(policy, Settings(max_batch=2, wait_ms=500))) as url:
        evaluate_command(["rollout", "--url", url, "--episodes", "2", "--out", str(tmp_path)])
    assert "| policy | 0 / 2 |" in capsys.readouterr().out
    assert f"Tabletop: {url} on 2 unseen scenes" in (tmp_path / "report.md").read_text()
    expected = figures.rollout_strip(local, tmp_path / "local.png")  # what every action led to
    assert (tmp_path / "rollouts.png").read_bytes() == expected.read_bytes()
    assert len({frame.tobytes() for frame in local.frames[0]}) > 3, "the gripper moves"
    with pytest.raises(SystemExit) as caught:
        evaluate_command(["rollout", "--url", url, "--episodes", "2", "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "does not answer" in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# A real process
# ---------------------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_a_real_server_answers_the_client_and_finishes_what_it_took(policy, tmp_path):
    pytest.importorskip("uvicorn")
    save_model(policy.model, policy.contract, tmp_path / "checkpoint")
    (tmp_path / "token").write_text("secret\n")
    port = free_port()
    command = [sys.executable, "-m", "openvla_jax.serve", "--checkpoint", str(tmp_path / "checkpoint")]
    command += ["--port", str(port), "--max_batch", "2", "--wait_ms", "300", "--token_file", str(tmp_path / "token")]
    environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            client = Client(f"http://127.0.0.1:{port}", token="secret")
            client.wait_until_ready(240)
            expected = policy.predict_actions([image(1), image(2)], INSTRUCTIONS[:2])
            got = client.predict_actions([image(1), image(2)], INSTRUCTIONS[:2])
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(client.predict_action(image(1), INSTRUCTIONS[0], "arm"), got[0])
            assert client.info()["statistics"]["arm"]["action_dim"] == 3
            with pytest.raises(ServerError, match=r"status 422.*did you mean 'arm'") as caught:
                client.predict_action(image(), INSTRUCTIONS[0], "arms")
            assert caught.value.status == 422
            with pytest.raises(ServerError, match="status 401"):
                Client(f"http://127.0.0.1:{port}", token="other").predict_action(image(), INSTRUCTIONS[0])
            # Asked to stop while a request waits for company in its batch: it is answered, then the process ends.
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                answer = pool.submit(client.predict_action, image(1), INSTRUCTIONS[0])
                time.sleep(0.1)
                server.send_signal(signal.SIGTERM)
                np.testing.assert_array_equal(answer.result(20), got[0])
            output, _ = server.communicate(timeout=30)
            assert server.returncode == 0 and output.endswith("stopped\n") and "Traceback" not in output, output
            with pytest.raises(ServerError, match="does not answer"):
                client.predict_action(image(1), INSTRUCTIONS[0])
        finally:
            server.kill()


def test_the_command_line_decides_what_is_served(policy, tmp_path, monkeypatch):
    pytest.importorskip("uvicorn")
    from openvla_jax.inference.process import Process
    from openvla_jax.serve import main

    checkpoint = tmp_path / "checkpoint"
    save_model(policy.model, policy.contract, checkpoint)
    served = []
    monkeypatch.setattr(Process, "run", lambda process, sockets: served.append((process._load()[0], sockets)))
    options = ["--checkpoint", str(checkpoint), "--port", "0", "--max_batch", "1", "--compilation_cache", ""]
    main([*options, "--quantize", "int8", "--exclude", "vision", "--tensor", "2"])
    ((app, (listener,)),) = served
    listener.close()
    with TestClient(app) as client:
        info = client.get("/info").json()
        assert (info["devices"], info["quantization"], info["max_batch"]) == (2, "int8", 1)
        local = Policy.from_checkpoint(checkpoint, quantize="int8", exclude=["vision"], tensor=2)
        assert info["weight_bytes"] == count_bytes(local.model) < count_bytes(policy.model)
        np.testing.assert_allclose(
            decoded(client.post("/act", json=good()).json()), local.predict_action(image(), INSTRUCTIONS[0])
        )


def test_a_wrong_command_line_says_so_in_one_line(tmp_path, capsys):
    from openvla_jax.serve import main

    (tmp_path / "token").write_text(" \n")
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    for arguments, message in (
        (["--checkpoint", str(tmp_path / "none")], "does not exist"),
        (["--checkpoint", str(tmp_path), "--token_file", str(tmp_path / "token")], "is empty: put the token"),
        (["--checkpoint", "x", "--port", str(taken.getsockname()[1])], "choose another --port"),
        (["--checkpoint", "x", "--exclude", "vision"], "give --quantize"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--compilation_cache", ""] + ([] if "--port" in arguments else ["--port", "0"]))
        error = capsys.readouterr().err
        assert caught.value.code == 2 and message in error and error.count("\n") == 1, error
