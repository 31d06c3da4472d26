"""A policy small enough to be compiled in seconds, shared by the tests of decoding and serving."""

import jax

from openvla_jax.checkpoint.contract import Contract
from openvla_jax.config import model_config
from openvla_jax.inference.policy import Policy
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.tokens.tokenizer import load_tokenizer
from openvla_jax.types import ActionSpec, Preprocessing

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
