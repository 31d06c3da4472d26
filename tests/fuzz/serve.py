"""The server's parsers of requests, and the client's of answers."""

import base64
import io
import json
import struct

import numpy as np
from PIL import Image

from openvla_jax.inference import wire
from openvla_jax.inference.client import Client
from openvla_jax.types import Observation
from tests.fuzz.harness import Target

PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
JSON = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 40,
    b"null",
    b"\\ud800",
    b"base64,",
    b'"encoded":',
)
KEYS = ("left_wrist_image", "right_wrist_image")
TWO, THREE = ("primary", "wrist"), ("primary", "left_wrist", "right_wrist")
OFT = (*JSON, b'"full_image":', b'"wrist', b'"wrist_image":', b'"left_wrist":', b'"images":', b'"image":', b"_image")


def act_body(*cameras: str):
    """Returns a parser of bodies of `/act`, of a policy with these cameras."""
    return lambda data: wire.read_observation(wire.read_payload(wire.loads(data))[0], cameras)


def encoded_images(pixels: np.ndarray = PIXELS) -> list:
    """Returns the pixels in each form of image."""
    return [wire.arrays.encode_array(pixels), base64.b64encode(picture("PNG", pixels)).decode(), pixels.tolist()]


def act_bodies() -> list[bytes]:
    """Returns a body for each form of image, and the encoded one."""
    images = encoded_images()
    bodies = [json.dumps({"image": image, "instruction": "push", "state": [1.5, 2]}) for image in images]
    state = wire.arrays.encode_array(np.arange(3.0))
    named = {"images": {"primary": images[0]}, "instruction": "push", "state": state, "unnorm_key": "arm"}
    return [body.encode() for body in (*bodies, json.dumps({"encoded": bodies[0]}), json.dumps(named))]


def oft_bodies(*wrists: str) -> list[bytes]:
    """Returns bodies of OpenVLA-OFT's clients with these keys for wrist cameras, plain and encoded."""
    rest = {"state": wire.arrays.encode_array(np.arange(8.0)), "instruction": "push"}
    images = encoded_images(PIXELS[:2, :2])
    bodies = [json.dumps({"full_image": image, **dict.fromkeys(wrists, image), **rest}) for image in images]
    return [body.encode() for body in (*bodies, json.dumps({"encoded": bodies[0]}))]


def picture(format: str, pixels: np.ndarray = PIXELS) -> bytes:
    """Returns the pixels as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def declared_pixels(data: bytes) -> int:
    """Returns the bytes of the image that a PNG header declares, with PIL's own copies, up to the parser's limit."""
    at = data.find(b"IHDR")
    if at < 0 or len(data) < at + 12:
        return 16 * 2**20 if b"\xff" in data else 0  # a JPEG, whose sizes stand anywhere
    columns, rows = struct.unpack(">II", data[at + 4 : at + 12])
    return 9 * min(columns * rows, wire.MAX_PIXELS)


class Connection:
    """A connection on which a server has answered."""

    def __init__(self, answer: bytes):
        self.answer = answer

    def makefile(self, *mode: str) -> io.BytesIO:
        return io.BytesIO(self.answer)

    def sendall(self, data: bytes) -> None:
        pass

    def settimeout(self, seconds: float) -> None:
        pass

    def close(self) -> None:
        pass


def answer_to(method: str):
    """Returns a parser of HTTP responses to a client's method."""

    def parse(data: bytes) -> object:
        client = Client("http://127.0.0.1:1", timeout=1e-9)  # nobody is there for a second try
        client.connection.http.sock = Connection(data)
        if method == "info":
            return client.info()
        if method == "chunk":
            return client.predict_chunk(Observation({"primary": PIXELS}, "push", np.arange(3.0)))
        if method == "batch":
            return client.predict_actions([PIXELS], ["push"])
        return client.predict_action(PIXELS, "push")

    return parse


def answers(value: object) -> list[bytes]:
    """Returns responses with a length, in chunks, and up to the end of the connection."""
    body = wire.dumps(value).encode()
    start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
    return [
        start + b"Content-Length: %d\r\n\r\n" % len(body) + body,
        start + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n",
        start + b"Connection: close\r\n\r\n" + body,
    ]


def chunk_answers() -> list[bytes]:
    """Returns chunks as lists of arrays and as one array."""
    chunk = np.arange(6.0).reshape(2, 3)
    return [answer for value in (list(chunk), chunk) for answer in answers(value)]


INFO = {
    "observation": {"cameras": ["primary"], "rotation": 0, "state": []},
    "action": {"dim": 3},
    "statistics": {"arm": {"action_dim": 3, "action": {"q01": [0, 0, 0], "q99": [1, 1, 1]}}},
    "training": {"data": {}},
}
HTTP = (
    b"HTTP/1.1 ", b"503", b"301", b"\r\n", b"\r\nContent-Length: -1\r\n", b"\r\nContent-Length: 99999999999\r\n",
    b"Transfer-Encoding: chunked\r\n", b"FFFFFFFFFF\r\n", b"\r\nRetry-After: nan\r\n", b"HTTP/1.1 100 \r\n\r\n",
)  # fmt: skip

TARGETS = {
    target.name: target
    for target in (
        Target("act_body", act_bodies, act_body("primary"), lambda data: 40 * len(data), JSON),
        Target("oft_body", lambda: oft_bodies("wrist_image"), act_body(*TWO), lambda data: 40 * len(data), OFT),
        Target("oft_body_3", lambda: oft_bodies(*KEYS), act_body(*THREE), lambda data: 40 * len(data), OFT),
        Target(
            "picture",
            lambda: [picture("PNG"), picture("JPEG")],
            lambda data: wire.decode_picture(data, "image"),
            declared_pixels,
            (b"IHDR", b"IDAT", b"IEND", b"zTXt", b"iCCP", b"PLTE", b"\xff\xd8", b"\xff\xc0", b"\xff\xda", b"\xff\xd9"),
        ),
        Target("answer_act", lambda: answers(np.arange(3.0)), answer_to("act"), tokens=JSON + HTTP),
        Target("answer_chunk", chunk_answers, answer_to("chunk"), tokens=JSON + HTTP),
        Target("answer_batch", lambda: answers({"actions": [[1.5, 2.0, 3.0]]}), answer_to("batch"), tokens=JSON + HTTP),
        Target("answer_info", lambda: answers(INFO), answer_to("info"), tokens=JSON + HTTP),
    )
}
