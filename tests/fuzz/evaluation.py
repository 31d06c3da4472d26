"""What evaluations read: lines of episodes, and a simulator's messages."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from openvla_jax.errors import InputError
from openvla_jax.evaluation.benchmarks.results import Outcome, parse
from openvla_jax.sim.libero import messages
from tests.fuzz.harness import Target


def lines() -> list[bytes]:
    rows = [Outcome("policy", task, 0, task == 1, 30 + task, "pick up the milk", cpu_seconds=1.5) for task in range(3)]
    return [b"".join(json.dumps(dataclasses.asdict(row)).encode() + b"\n" for row in rows)]


def sent() -> list[bytes]:
    frames = np.zeros((4, 4, 3), np.uint8)
    return [
        messages.encode({"do": "render", "cameras": ["primary", "wrist"]}),
        messages.encode({"primary": frames, "state": np.arange(8.0), "success": True, "cpu": 1.5}),
    ]


def receive(data: bytes) -> messages.Message:
    """Decodes a message from bytes that end."""
    rest = [data]

    def read(count: int) -> bytes:
        part, rest[0] = rest[0][:count], rest[0][count:]
        if len(part) < count:
            raise InputError("the message ends early")
        return part

    return messages.decode(read)


_TOKENS = (b'"arrays"', b'"<f8"', b"null", b"[", b"{", b"-1", b"1e999", b"NaN", b"true")
TARGETS = {
    target.name: target
    for target in (
        Target("evaluation_outcomes", lines, lambda data: parse(data, Path("episodes.jsonl")), tokens=_TOKENS),
        Target("simulator_message", sent, receive, tokens=_TOKENS),
    )
}
