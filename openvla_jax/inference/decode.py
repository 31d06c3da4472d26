"""Images and prompts to action tokens in one compiled call: vision, prefill and the cached decode steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt8

from openvla_jax.models.openvla import OpenVLA
from openvla_jax.tokens import ActionTokenizer


class Decoded(NamedTuple):
    tokens: Int[Array, "B A"]  # greedy
    outside: Bool[Array, "B A"]  # the free argmax would not have been an action token


def decode_actions(
    model: OpenVLA,
    images: UInt8[Array, "B height width 3"],
    input_ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    steps: int,
    constrained: bool = True,
) -> Decoded:
    """Greedy action tokens, `steps` per row.

    `input_ids` are prompts from BOS to the lone-space token, padded on the right; `lengths` count the real ids of
    each row. Rows do not see each other: a batch equals its rows decoded one by one. `constrained` takes the argmax
    over the action tokens only; without it, the argmax over the whole vocabulary, as the reference does.
    """
    tokenizer = ActionTokenizer(model.config.base_vocab_size, model.config.action_bins)
    vocabulary = jnp.arange(model.config.llama.vocab_size)
    allowed = (vocabulary >= tokenizer.first_token) & (vocabulary <= tokenizer.last_token)

    def choose(logits: Array) -> tuple[Array, Array]:
        free = logits.argmax(axis=-1).astype(jnp.int32)
        outside = ~allowed[free]
        if not constrained:
            return free, outside
        return jnp.where(allowed, logits, -jnp.inf).argmax(axis=-1).astype(jnp.int32), outside

    def step(carry, _):
        token, position, cache = carry
        logits, cache = model.decode(token, position, cache)
        token, outside = choose(logits)
        return (token, position + 1, cache), (token, outside)

    logits, cache = model.prefill(model.normalize(images), input_ids, lengths, steps)
    first, first_outside = choose(logits)
    _, (tokens, outside) = jax.lax.scan(step, (first, lengths, cache), length=steps - 1)
    return Decoded(
        jnp.concatenate([first[:, None], tokens.T], axis=1),
        jnp.concatenate([first_outside[:, None], outside.T], axis=1),
    )
