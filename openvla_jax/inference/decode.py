"""Images and prompts to action tokens in one compiled call: vision, prefill and the cached decode steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from openvla_jax.models.openvla import OpenVLA
from openvla_jax.parallel.execution import PLAIN, Execution
from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.types import ActionSpec


class Decoded(NamedTuple):
    tokens: Int[Array, "B A"]
    outside: Bool[Array, "B A"]  # the free argmax would not have been an action token
    logits: Float[Array, "B V"]  # of the first token


class Sampling(NamedTuple):
    """How each row draws its tokens: by its own temperature (0: greedy) and seed, whatever its batch."""

    temperature: Float[Array, "B"]
    seed: Int[Array, "B"]


def decode_actions(
    model: OpenVLA,
    images: UInt8[Array, "B height width 3"],
    input_ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    steps: int,
    constrained: bool = True,
    sampling: Sampling | None = None,
    bins: int = ActionSpec.bins,
    execution: Execution = PLAIN,
) -> Decoded:
    """Action tokens, `steps` per row, greedy or sampled.

    `input_ids` are prompts from BOS to the lone-space token, padded on the right; `lengths` count the real ids of
    each row. Rows do not see each other: a batch equals its rows decoded one by one. `constrained` chooses among the
    `bins` action tokens only; without it, among the whole vocabulary, as the reference does.
    """
    tokenizer = ActionTokenizer(model.config.base_vocab_size, bins)
    vocabulary = jnp.arange(model.config.llama.vocab_size)
    allowed = (vocabulary >= tokenizer.first_token) & (vocabulary <= tokenizer.last_token)

    def choose(logits, index):
        outside = ~allowed[first_largest(logits)]
        if constrained:
            logits = jnp.where(allowed, logits, -jnp.inf)
        if sampling is not None:
            draw = lambda seed: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), vocabulary.shape)
            hot = sampling.temperature[:, None] > 0
            noisy = logits / jnp.where(hot, sampling.temperature[:, None], 1) + jax.vmap(draw)(sampling.seed)
            logits = jnp.where(hot, noisy, logits)
        return first_largest(logits), outside

    def step(carry, index):
        token, cache = carry
        logits, cache = model.decode_step(token, lengths + index - 1, cache, execution)
        token, outside = choose(logits, index)
        return (token, cache), (token, outside)

    first_logits, cache = model.prefill(model.normalize(images), input_ids, lengths, steps, execution)
    first, first_outside = choose(first_logits, 0)
    _, (tokens, outside) = jax.lax.scan(step, (first, cache), jnp.arange(1, steps))
    return Decoded(
        jnp.concatenate([first[:, None], tokens.T], axis=1),
        jnp.concatenate([first_outside[:, None], outside.T], axis=1),
        first_logits,
    )


def first_largest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`argmax` as two passes that CPUs vectorise, which over a vocabulary is several times faster; of NaNs the last."""
    last = logits.shape[-1] - 1
    return jnp.where(logits == logits.max(axis=-1, keepdims=True), jnp.arange(last + 1), last).min(axis=-1)
