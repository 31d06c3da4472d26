"""Llama-2 family decoder (Llama-2, Vicuna, Mistral): embeddings in, final hidden states out, with a static KV cache.

Numerics follow the transformers implementation that OpenVLA trained with: RMSNorm rounded before its weight, RoPE
angles in float32 and rotate-half layout, softmax in float32, SwiGLU, untied output head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from openvla_jax.config import LlamaConfig
from openvla_jax.models.activations import ACTIVATIONS
from openvla_jax.models.attention import attention, attention_kernel, rope
from openvla_jax.models.linear import Kernel, Linear, make_param
from openvla_jax.models.norms import RMSNorm
from openvla_jax.models.quantize import BlockedQTensor, QTensor
from openvla_jax.models.stack import scan_layers, scan_stack
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.placement import embedding_lookup


class Cache(NamedTuple):
    """Keys and values of all layers at positions 0..S-1; slots beyond a row's last position hold nothing that is
    seen.
    """

    k: Any  # [L, B, S, K, H], or a list of [B, S, K, H] where layers are not stacked
    v: Any  # the same


class Attention(nnx.Module):
    def __init__(self, key, config: LlamaConfig, layers: int):
        keys = jax.random.split(key, 4)
        width, kv_width = config.width, config.kv_heads * config.head_dim
        self.q = Linear(keys[0], width, width, ("embed", "heads"), bias=False, layers=layers)
        self.k = Linear(keys[1], width, kv_width, ("embed", "heads"), bias=False, layers=layers)
        self.v = Linear(keys[2], width, kv_width, ("embed", "heads"), bias=False, layers=layers)
        self.o = Linear(keys[3], width, width, ("heads", "embed"), bias=False, layers=layers)
        self.config = config

    @jax.named_scope("attention")
    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"], execution: Execution
    ) -> tuple[Array, Array, Array]:
        """Returns queries, keys (both rotated) and values: [B, T, heads, H]."""
        shape = (*x.shape[:2], -1, self.config.head_dim)
        q, k = self.q(x, execution), self.k(x, execution)
        q, k = (rope(y.reshape(shape), positions, self.config.rope_theta) for y in (q, k))
        # Named after the reshape and the rotation, so that the backward pass repeats neither.
        q, k = checkpoint_name(q, "q"), checkpoint_name(k, "k")
        return q, k, checkpoint_name(self.v(x, execution).reshape(shape), "v")

    @jax.named_scope("attention")
    def self_attention(
        self,
        x: Float[Array, "B T D"],
        execution: Execution,
        mask: Bool[Array, "#B #T T"],
        causal: bool | None,
        keys: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """Self-attention over the full sequence.

        The kernel may be used if `mask` follows from `causal` and `keys` (positions that no query sees are false); a
        mask that does not has `causal` None.
        """
        config = self.config
        kernel = None
        if causal is not None and config.heads == config.kv_heads:
            kernel = attention_kernel(x, config.heads, execution, causal=causal, theta=config.rope_theta, keys=keys)
        if kernel is None:
            return self.attend(*self.project(x, _positions(x), execution), mask, execution)
        mixed = kernel(*(layer(x, execution) for layer in (self.q, self.k, self.v)))
        return checkpoint_name(self.o(mixed, execution), "o")

    @jax.named_scope("attention")
    def attend(self, q: Array, k: Array, v: Array, mask: Array, execution: Execution) -> Float[Array, "B T D"]:
        mixed = attention(q, k, v, mask)
        return checkpoint_name(self.o(mixed.reshape(*mixed.shape[:2], -1), execution), "o")


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, key, config: LlamaConfig, layers: int):
        keys = jax.random.split(key, 3)
        self.gate = Linear(keys[0], config.width, config.mlp_dim, ("embed", "mlp"), bias=False, layers=layers)
        self.up = Linear(keys[1], config.width, config.mlp_dim, ("embed", "mlp"), bias=False, layers=layers)
        self.down = Linear(keys[2], config.mlp_dim, config.width, ("mlp", "embed"), bias=False, layers=layers)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"], execution: Execution) -> Float[Array, "B T D"]:
        gate, up = checkpoint_name(self.gate(x, execution), "gate"), checkpoint_name(self.up(x, execution), "up")
        return self.down(ACTIVATIONS["silu"](gate) * up, execution)


class LlamaBlock(nnx.Module):
    def __init__(self, key, config: LlamaConfig, layers: int):
        keys = jax.random.split(key)
        self.norm1 = RMSNorm(config.width, config.norm_eps, layers=layers)
        self.attention = Attention(keys[0], config, layers)
        self.norm2 = RMSNorm(config.width, config.norm_eps, layers=layers)
        self.mlp = MLP(keys[1], config, layers)


class Embedding(nnx.Module):
    """Token embedding table [V, D]."""

    table: Kernel

    def __init__(self, key, config: LlamaConfig):
        self.table = make_param(key, (config.vocab_size, config.width), ("vocab", "embed"), scale=0.02)

    def __call__(self, ids: Int[Array | np.ndarray, "B T"], dtype, execution: Execution) -> Float[Array, "B T D"]:
        if isinstance(self.table, QTensor | BlockedQTensor):
            return self.table.rows(ids, dtype)
        return embedding_lookup(self.table[...], jnp.asarray(ids), dtype, execution.mesh)


class Llama(nnx.Module):
    blocks: LlamaBlock | nnx.List  # stacked, or one by one (`OpenVLA.unstack`)
    last: LlamaBlock | None  # the last layer apart, a stack of one, if it alone is trained (`models/tuning.py`)

    def __init__(self, key, config: LlamaConfig):
        keys = jax.random.split(key, 3)
        self.embed = Embedding(keys[0], config)
        self.blocks = LlamaBlock(keys[1], config, config.depth)
        self.last = nnx.data(None)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = Linear(keys[2], config.width, config.vocab_size, ("embed", "vocab"), bias=False)
        self.config = config

    @jax.named_scope("llama")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        execution: Execution,
        keys: Bool[Array, "B T"] | None = None,
        *,
        bidirectional: bool = False,
    ) -> Float[Array, "B T D"]:
        """Normed hidden states of a whole sequence at positions 0..T-1.

        Causal attention needs nothing else: text is padded on the right, so no real token sees a pad, and hiding pads
        changes the outputs at pads only. `bidirectional` attention sees all positions. `keys` hides positions from all
        queries.
        """
        positions, window = _positions(x), self.config.sliding_window
        causal: bool | None = not bidirectional
        if bidirectional:
            mask = jnp.ones((1, 1, x.shape[1]), bool)
        else:
            mask = self._visible(positions, positions[0])
            causal = True if window is None or window >= x.shape[1] else None
        if keys is not None:
            mask = mask & keys[:, None]

        def body(block: LlamaBlock, x: Array, execution: Execution) -> Array:
            x = x + block.attention.self_attention(block.norm1(x), execution, mask, causal, keys)
            return x + block.mlp(block.norm2(x), execution)

        x = scan_layers(body, x, self.blocks, execution)
        return self.norm(x if self.last is None else scan_layers(body, x, self.last, execution))

    @jax.named_scope("llama/head")
    def logits(self, hidden: Float[Array, "... D"], execution: Execution) -> Float[Array, "... V"]:
        """float32 logits over the padded vocabulary."""
        return self.head(hidden, execution, preferred_element_type=jnp.float32)[..., : self.config.vocab_size]

    def prefill(
        self, x: Float[Array, "B T D"], length: int, execution: Execution, last: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """As `__call__`, and the keys and values in a cache of `length` >= T positions.

        With `last` the hidden states of that position of each row only, [B, 1, D].
        """
        positions, slots = _positions(x), jnp.arange(x.shape[1])
        padding = [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)]

        def step(x, scanned, last=None):
            (block,) = scanned
            normed = block.norm1(x)
            q, k, v = block.attention.project(normed, positions, execution)
            queries = positions
            if last is not None:
                x, queries = _pick(x, last), last[:, None]
                q, _, _ = block.attention.project(_pick(normed, last), queries, execution)
            x = x + block.attention.attend(q, k, v, self._visible(queries, slots), execution)
            return x + block.mlp(block.norm2(x), execution), Cache(jnp.pad(k, padding), jnp.pad(v, padding))

        if last is None or not isinstance(self.blocks, nnx.List) or len(self.blocks) == 1:
            x, cache = scan_stack(step, x, self.blocks)
            return self.norm(x if last is None else _pick(x, last)), cache
        # The last layer's outputs at other positions are read by nobody: of these it needs keys and values only.
        x, cache = scan_stack(step, x, self.blocks[:-1])
        x, final = step(x, (self.blocks[-1],), last)
        return self.norm(x), Cache([*cache.k, final.k], [*cache.v, final.v])

    def decode_step(
        self, x: Float[Array, "B 1 D"], positions: Int[Array, "B"], cache: Cache, execution: Execution
    ) -> tuple[Float[Array, "B 1 D"], Cache]:
        """One token per row at its own position; rows of different length share a batch."""
        slots = jnp.arange(jax.tree.leaves(cache)[0].shape[-3])
        mask = self._visible(positions[:, None], slots)
        write = (slots == positions[:, None])[..., None, None]  # [B, S, 1, 1]

        def step(x, scanned):
            block, (k_cache, v_cache) = scanned
            q, k, v = block.attention.project(block.norm1(x), positions[:, None], execution)
            k_cache, v_cache = jnp.where(write, k, k_cache), jnp.where(write, v, v_cache)
            x = x + block.attention.attend(q, k_cache, v_cache, mask, execution)
            return x + block.mlp(block.norm2(x), execution), Cache(k_cache, v_cache)

        x, cache = scan_stack(step, x, self.blocks, cache)
        return self.norm(x), cache

    def _visible(self, positions: Int[Array, "B T"], slots: Int[Array, "S"]) -> Array:
        """[B, T, S]: the keys that each query sees (causal, within the sliding window if there is one)."""
        distance = positions[..., None] - slots
        window = self.config.sliding_window
        return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _positions(x: Float[Array, "B T D"]) -> Int[Array, "1 T"]:
    return jnp.arange(x.shape[1])[None]


def _pick(x: Float[Array, "B T D"], last: Int[Array, "B"]) -> Float[Array, "B 1 D"]:
    """One position of each row."""
    return jnp.take_along_axis(x, last[:, None, None], axis=1)
