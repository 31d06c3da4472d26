"""Requests of OpenVLA-OFT's clients: their keys, encodings and answers, and what of them is refused."""

import base64
import io
import json

import numpy as np
import pytest
from openvla_client.arrays import decode_array, dumps
from PIL import Image

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient
from openvla_client import ActionQueue, Client, ServerError
from small_policy import CAMERAS, INSTRUCTIONS, STATE, chunk_policy, listening

from openvla_jax import Observation
from openvla_jax.inference import wire
from openvla_jax.inference.server import Settings, make_app
from openvla_jax.inference.wire import BadRequestError


def image(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)


MAIN, SIDE, POSE = image(0), image(1), np.array([0.5, 1.0, -1.0])
SEEN = Observation({"primary": MAIN, "wrist": SIDE}, INSTRUCTIONS[0], POSE)


def request(**changes):
    """A request of OpenVLA-OFT's client; a change to None leaves a key out."""
    body = {"full_image": MAIN, "wrist_image": SIDE, "state": POSE, "instruction": INSTRUCTIONS[0]} | changes
    return json.loads(dumps({key: value for key, value in body.items() if value is not None}))


# ---------------------------------------------------------------------------------------------------------------------
# Cameras by the contract's names
# ---------------------------------------------------------------------------------------------------------------------

ONE, TWO, THREE = ("primary",), CAMERAS, ("primary", "left_wrist", "right_wrist")


@pytest.mark.parametrize(
    ("cameras", "keys"),
    [
        (ONE, {"full_image": "primary"}),
        (TWO, {"full_image": "primary", "wrist_image": "wrist"}),
        (TWO, {"left_wrist_image": "wrist", "full_image": "primary"}),  # the only one, whatever it is called
        (("front", "eye_wrist"), {"full_image": "front", "wrist": "eye_wrist"}),
        (THREE, {"full_image": "primary", "right_wrist_image": "right_wrist", "left_wrist_image": "left_wrist"}),
        (THREE, {"full_image": "primary", "left_wrist": "left_wrist", "right_wrist": "right_wrist"}),
        (("wrist", "side_wrist"), {"full_image": "wrist", "wrist_image": "side_wrist"}),  # the first is the main one
    ],
)
def test_keys_are_the_contract_s_cameras(cameras, keys):
    pixels = {key: image(number) for number, key in enumerate(keys)}
    payload = json.loads(dumps({**pixels, "instruction": "push"}))
    seen = wire.read_observation(wire.read_payload(payload)[0], cameras)
    assert set(seen.images) == set(keys.values())
    for key, camera in keys.items():
        np.testing.assert_array_equal(seen.images[camera], pixels[key])


@pytest.mark.parametrize(
    ("cameras", "keys", "message"),
    [
        (ONE, ["full_image", "wrist_image"], "is no camera of the policy, which sees primary: leave it out"),
        (TWO, ["full_image", "wrist_image", "wrist_2"], "'wrist_image' is no camera|'wrist_2' is no camera"),
        (THREE, ["full_image", "wrist_image"], "send left_wrist_image, right_wrist_image"),
        (THREE, ["full_image", "wrist_left_image", "right_wrist_image"], "'wrist_left_image' is no camera"),
        (THREE, ["full_image", "left_wrist", "left_wrist_image"], "name one camera twice"),
        (("primary", "side"), ["full_image", "wrist_image"], "'wrist_image' is no camera"),
        (TWO, ["wrist_image"], "'wrist_image' belongs to 'full_image'"),
        (TWO, ["image", "wrist_image"], "'wrist_image' belongs to 'full_image'"),
        (TWO, ["image", "full_image"], "'image' and 'full_image' are both given"),
        (TWO, ["full_image", "images"], "'images' and 'full_image' are both given"),
        (TWO, ["ful_image"], "unknown key 'ful_image'; did you mean 'full_image'"),
        (TWO, [], "'image' is missing"),
        (TWO, ["full_image", "wrist\n"], "unknown key"),
        (TWO, ["full_image", "wrist" + 40 * "x"], "unknown key"),
        (THREE, ["full_image", *(f"wrist_{i}" for i in range(99))], "'wrist_0' is no camera"),
    ],
)  # fmt: skip
def test_keys_that_name_no_camera_are_refused(cameras, keys, message):
    payload = json.loads(dumps({**dict.fromkeys(keys, MAIN), "instruction": "push"}))
    with pytest.raises(BadRequestError, match=message) as caught:
        wire.read_observation(wire.read_payload(payload)[0], cameras)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    return chunk_policy()


@pytest.fixture(scope="module")
def client(policy):
    with TestClient(make_app(policy, Settings(max_batch=1)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def chunk(policy):
    return policy.predict_chunk(SEEN)


def test_oft_s_clients_get_the_list_of_actions_plain_and_encoded(client, chunk):
    json_numpy = pytest.importorskip("json_numpy")
    body = json_numpy.dumps({"full_image": MAIN, "wrist_image": SIDE, "state": POSE, "instruction": INSTRUCTIONS[0]})
    plain = client.post("/act", content=body)
    assert plain.status_code == 200
    actions = json_numpy.loads(plain.text)
    assert isinstance(actions, list) and [action.shape for action in actions] == [(3,)] * 4
    np.testing.assert_array_equal(actions, chunk)
    encoded = client.post("/act", json={"encoded": body}).json()
    assert isinstance(encoded, str)
    np.testing.assert_array_equal(json_numpy.loads(encoded), chunk)


def test_images_by_name_get_the_same_list(client, chunk):
    answer = client.post(
        "/act", json=request(full_image=None, wrist_image=None, images={"primary": MAIN, "wrist": SIDE})
    )
    np.testing.assert_array_equal([decode_array(row, "action") for row in answer.json()], chunk)


def test_pictures_get_plain_numbers(client, chunk):
    def png(pixels):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    body = request(full_image=png(MAIN), wrist_image=png(SIDE), state=POSE.tolist())
    assert client.post("/act", json=body).json() == chunk.tolist()
    batch = client.post("/act_batch", json={"requests": [body, request()]}).json()
    np.testing.assert_allclose(batch["actions"], [chunk, chunk], rtol=0, atol=2e-5)


def test_policy_of_one_camera_answers_image_and_refuses_a_state():
    policy = chunk_policy(cameras=ONE, state=())
    with TestClient(make_app(policy, Settings(max_batch=1))) as client:
        first = client.post("/act", json=request(full_image=None, wrist_image=None, state=None, image=MAIN)).json()
        refused = client.post("/act", json=request(wrist_image=None))
    chunk = policy.predict_chunk(policy.observe(MAIN, INSTRUCTIONS[0]))
    np.testing.assert_array_equal(decode_array(first, "action"), chunk[0])
    np.testing.assert_array_equal(policy.predict_action(MAIN, INSTRUCTIONS[0]), chunk[0])
    assert refused.status_code == 400 and "state is given, but the policy was trained without one" in refused.text


def test_info_states_what_a_client_must_know(client):
    info = client.get("/info").json()
    assert info["observation"] == {"cameras": list(CAMERAS), "rotation": 0, "state": list(STATE)}
    assert (info["action"]["horizon"], info["action"]["executed"], info["action"]["head"]) == (4, 2, "l1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrist_image": None}, "no image of camera 'wrist': the policy sees primary, wrist"),
        ({"wrist_image": None, "left_wrist": SIDE, "right_wrist": SIDE}, "'left_wrist' is no camera of the policy"),
        ({"full_image": None, "wrist_image": None, "image": MAIN}, "no image of camera 'wrist'"),
        ({"full_image": None, "wrist_image": None, "images": {"primary": MAIN}}, "no image of camera 'wrist'"),
        (
            {"full_image": None, "wrist_image": None, "images": {"primary": MAIN, "wirst": SIDE}},
            "images: unknown camera 'wirst'; did you mean 'wrist'",
        ),
        ({"state": None}, "state is missing: give x, y, gripper"),
        ({"state": POSE[:2]}, "state has shape (2,): give 3 numbers, x, y, gripper"),
        ({"state": np.zeros(8)}, "state has shape (8,): give 3 numbers"),
        ({"state": POSE[None]}, "state has shape (1, 3)"),
        ({"state": "home"}, "state is text: send a list of numbers"),
        ({"state": [1e200, 0, 0]}, None),
        ({"full_image": MAIN.astype(np.float32)}, "full_image has dtype float32"),
        ({"wrist_image": MAIN[..., :1]}, "wrist_image has dtype uint8 and shape (40, 50, 1); send uint8 RGB"),
        ({"wrist_image": 3}, "wrist_image is a number"),
        ({"instruction": None}, "'instruction' is missing"),
    ],
)  # fmt: skip
def test_wrong_request_is_400_in_one_line(client, changes, message):
    for body in (request(**changes), {"encoded": json.dumps(request(**changes))}):
        answer = client.post("/act", json=body)
        if message is None:
            assert answer.status_code == 200, "the state is clipped to its bounds"
            continue
        assert answer.status_code == 400 and set(answer.json()) == {"error"}
        assert message in answer.json()["error"] and "\n" not in answer.json()["error"]


@pytest.mark.parametrize("form", ["images", "oft"])
def test_client_and_queue_act_through_a_server(policy, chunk, form):
    with listening(make_app(policy, Settings(max_batch=1))) as url:
        remote = Client(url, form=form)
        np.testing.assert_array_equal(remote.predict_chunk(SEEN), chunk)
        np.testing.assert_allclose(remote.predict_chunks([SEEN, SEEN]), [chunk, chunk], rtol=0, atol=2e-5)
        queue = ActionQueue(remote, remote.info()["action"]["executed"])
        np.testing.assert_array_equal([queue.next(SEEN) for _ in range(3)], [chunk[0], chunk[1], chunk[0]])
        with pytest.raises(ServerError, match="status 400: no image of camera 'wrist'") as caught:
            remote.predict_action(MAIN, "push")
        assert caught.value.status == 400
