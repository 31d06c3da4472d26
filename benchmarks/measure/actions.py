"""Our model's action as one call, and its parts: vision, prefill and a decode step."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from openvla_jax.models import llama, vit
from openvla_jax.models.heads import Inputs, TokenHead
from openvla_jax.models.quantize import count_bytes
from openvla_jax.types import ActionSpec

Parts = dict[str, Callable[[], Any]]  # by name, functions without arguments that return when the work is done
PARTS = ("action", "vision", "prefill", "decode step")
STEPS = 7  # tokens of an action


def action_parts(model: Any, images: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> Parts:
    """Returns functions for PARTS, which compile at their first call.

    `action` returns (tokens int32 [B, 7], logits float32 [B, V] of the first token).
    """
    leaves, structure = jax.tree.flatten(model)
    unflatten = lambda leaves: jax.tree.unflatten(structure, leaves)
    head = TokenHead(model.config, ActionSpec())

    @jax.jit
    def action(leaves, images, ids, lengths):
        inputs = Inputs(images, ids, lengths)
        decoded = head.predict(unflatten(leaves), inputs, STEPS, constrained=False)
        return decoded.tokens, decoded.logits

    @jax.jit
    def vision(leaves, images):
        model = unflatten(leaves)
        return model.project(model.normalize(images))

    @jax.jit
    def prefill(leaves, patches, ids, lengths):
        return unflatten(leaves).prefill_patches(patches, ids, lengths, STEPS)

    @jax.jit
    def step(leaves, tokens, lengths, cache):
        return unflatten(leaves).decode_step(tokens, lengths, cache)[0]

    made: dict[str, Any] = {}  # inputs of later parts, computed at first use

    def patches() -> jax.Array:
        if "patches" not in made:
            made["patches"] = vision(leaves, images)
        return made["patches"]

    def cache() -> Any:
        if "cache" not in made:
            made["cache"] = jax.block_until_ready(prefill(leaves, patches(), ids, lengths)[1])
        return made["cache"]

    tokens = np.zeros(len(ids), np.int32)
    return {
        "action": lambda: jax.device_get(action(leaves, images, ids, lengths)),
        "decode step": lambda: jax.block_until_ready(step(leaves, tokens, lengths, cache())),
        "prefill": lambda: jax.block_until_ready(prefill(leaves, patches(), ids, lengths)),
        "vision": lambda: jax.block_until_ready(vision(leaves, images)),
    }


@contextlib.contextmanager
def fused_attention(implementation: str) -> Iterator[Callable[[], int]]:
    """Makes programs that are traced inside it attend by `jax.nn.dot_product_attention(implementation=...)`.

    cuDNN's kernel is slower with a mask than with a rule. The masks of `TokenHead.predict` are two rules: a square mask
    is causal, and a mask of a single query shows the first keys. Yields a function that returns how often attention was
    traced.
    """
    traced = 0

    def attention(q, k, v, mask=None):
        nonlocal traced
        traced += 1
        rule: dict[str, Any] = {}
        if mask is not None and mask.shape[-2] == 1:
            rule["key_value_seq_lengths"] = jnp.broadcast_to(mask[:, 0].sum(-1, dtype=jnp.int32), q.shape[:1])
        elif mask is not None:
            assert mask.shape[-2:] == (q.shape[1], q.shape[1]), mask.shape
            rule["is_causal"] = True
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **rule)

    with mock.patch.object(llama, "attention", attention), mock.patch.object(vit, "attention", attention):
        yield lambda: traced


def decode_bytes(model: Any, batch: int, positions: int) -> int:
    """Returns the bytes that a decode step reads: the cache, and the language model without its token table."""
    config = model.config.llama
    cache = 2 * config.depth * batch * positions * config.kv_heads * config.head_dim * jnp.dtype(model.dtype).itemsize
    return count_bytes(model.llama) - count_bytes(model.llama.embed) + cache
