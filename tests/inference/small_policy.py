"""Policies small enough to be compiled in seconds, shared by the tests of acting and serving."""

import contextlib
import threading
import time

import jax
import pytest

from openvla_jax.checkpoint.contract import Contract
from openvla_jax.config import model_config
from openvla_jax.inference.policy import Policy
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.tokens.tokenizer import load_tokenizer
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing

ROW = {"q01": [-0.1, -2.0, 0.0], "q99": [0.3, 2.0, 1.0], "mask": [True, True, False]}
WIDE = {name: [*values, *values] for name, values in ROW.items()}
STATISTICS = {"arm": {"action": ROW}, "two_arms": {"action": WIDE}}
INSTRUCTIONS = ["pick up the red cube", "Pick up the blue ball", "push the green block to the left of the red block"]


def small_policy(statistics=None, action=None, **preprocessing) -> Policy:
    tokenizer = load_tokenizer("tiny")
    one_tower = {"preset": "tiny", "towers": {"dino": None}}  # compiles faster
    config = model_config({**one_tower, "base_vocab_size": tokenizer.vocab_size})
    model = jax.jit(lambda key: OpenVLA(config, key))(jax.random.key(1))
    # At initialisation all logits are alike; spread out, different inputs choose different tokens.
    for linear in (model.llama.head, model.llama.blocks.attention.v, model.llama.blocks.attention.o):
        linear.kernel[...] = linear.kernel[...] * 4
    settings = {"action": action or ActionSpec(), "preprocessing": Preprocessing(**preprocessing)}
    return Policy(model, Contract(config, tokenizer, statistics or STATISTICS, **settings))


PROPRIO = {"q01": [-1.0, 0.0, -3.0], "q99": [1.0, 2.0, 3.0], "min": [-2.0, 0.0, -4.0], "max": [2.0, 2.0, 4.0]}
CAMERAS, STATE = ("primary", "wrist"), ("x", "y", "gripper")


def chunk_policy(head="l1", cameras=CAMERAS, state=STATE, film=False) -> Policy:
    """A policy that predicts four actions at once, of which two are executed; eight devices can share its layers."""
    tokenizer, continuous = load_tokenizer("tiny"), head != "parallel_tokens"
    config = model_config(
        {
            "preset": "tiny", "towers": {"dino": None, "siglip": {"heads": 8}}, "llama": {"heads": 8, "kv_heads": 8},
            "base_vocab_size": tokenizer.vocab_size, "cameras": len(cameras), "state_dim": len(state), "film": film,
            "head": head, "action_dim": 3 if continuous else 0,
        }
    )  # fmt: skip
    model = jax.jit(lambda key: OpenVLA(config, key))(jax.random.key(2))
    for linear in (model.llama.head, model.llama.blocks.attention.v, model.llama.blocks.attention.o):
        linear.kernel[...] = linear.kernel[...] * 4
    statistics = {"arm": {"action": ROW, "proprio": PROPRIO | {"names": list(STATE)}}}
    action = ActionSpec(dim=3, horizon=4, executed=2, head=head, denoising_steps=5)
    specs = {"observation": ObservationSpec(cameras, 0, state), "action": action, "preprocessing": Preprocessing()}
    return Policy(model, Contract(config, tokenizer, statistics, **specs))


@contextlib.contextmanager
def listening(app):
    """The URL of the app behind a real socket, served by a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
