"""Attention and rotary embeddings, as XLA compiles them or as a Pallas kernel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from openvla_jax.kernels import flash_attention
from openvla_jax.models.linear import matmul_precision
from openvla_jax.parallel.execution import Execution


def rope(x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], theta: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding in the rotate-half layout (first half paired with second), angles in float32."""
    cos, sin = rope_angles(positions, x.shape[-1], theta, x.dtype)
    return _rotate(x, cos[..., None, :], sin[..., None, :])


def rope_angles(positions: Int[Array, "*B T"], dim: int, theta: float, dtype) -> tuple[Array, Array]:
    """Cosine and sine [*B, T, dim / 2] of the angles by which pairs are rotated."""
    half = dim // 2
    # Made on the host: an accelerator's power function is less exact, and position multiplies the error.
    frequencies = jnp.asarray(theta ** (-np.arange(half) / half), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    # The reference casts cosine and sine to the activation dtype before the products.
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


@jax.custom_vjp
def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [B, T, N, H] turned by angles of cosine and sine [#B, T, 1, H / 2]; the angles get no gradient."""
    return jax.lax.platform_dependent(x, cos, sin, tpu=_rotate_by_product, default=_rotate_halves)


def _rotate_halves(x: Array, cos: Array, sin: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _rotate_by_product(x: Array, cos: Array, sin: Array) -> Array:
    """The same numbers. By the TPU compiler's estimate a product with a signed permutation moves half a lane row across
    faster than a slice and a concatenation.
    """
    half = cos.shape[-1]
    exchange = np.kron([[0, 1], [-1, 0]], np.eye(half))  # (first, second) -> (-second, first)
    exchanged = jnp.matmul(x, jnp.asarray(exchange, x.dtype), precision=matmul_precision(x.dtype))
    return x * jnp.concatenate([cos, cos], axis=-1) + exchanged * jnp.concatenate([sin, sin], axis=-1)


_rotate.defvjp(
    lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)),
    lambda angles, gradient: (_rotate(gradient, angles[0], -angles[1]), None, None),
)


class AttentionKernel(NamedTuple):
    """Attention over a full sequence as a Pallas kernel: queries, keys and values [B, T, D] to outputs [B, T, D].

    If it `takes_merged`, it also accepts the three side by side in one array [B, T, 3 D].
    """

    run: Callable[[tuple[Array, ...]], Array]
    takes_merged: bool

    def __call__(self, *qkv: Array) -> Array:
        if len(qkv) == 3:
            return self.run(tuple(checkpoint_name(x, name) for x, name in zip(qkv, "qkv", strict=True)))
        (x,) = qkv
        for name in "qkv":  # kept as one array if a policy names any of them
            x = checkpoint_name(x, name)
        return self.run((x,))


def attention_kernel(
    x: Float[Array, "B T D"],
    heads: int,
    execution: Execution,
    *,
    causal: bool,
    theta: float | None = None,
    keys: Bool[Array, "B T"] | None = None,
) -> AttentionKernel | None:
    """Returns the Pallas attention for projections like `x`, or None if disabled or unsupported.

    `theta` is the base of the rotary embedding of queries and keys; None leaves them as they are. `keys` are the
    positions that may be attended to; None for all.
    """
    mesh = execution.kernel_mesh
    if mesh is None or not flash_attention.fits(x, heads, theta is not None, keys is not None, mesh):
        return None
    angles = None
    if theta is not None:
        cos, sin = rope_angles(jnp.arange(x.shape[1]), x.shape[-1] // heads, theta, x.dtype)
        angles = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    run = lambda qkv: flash_attention.flash_attention(qkv, angles, keys, heads, causal, mesh)
    return AttentionKernel(run, keys is None and flash_attention.takes_merged(x, heads, mesh))


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Array | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped key/value heads; `mask` broadcasts to [B, T, S], true for keys that are seen.

    Scores, maximum, sum and the value product are float32; the division comes after that product, which is cheaper.
    """
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    return _attention(q, k, v, mask).reshape(batch, length, heads, dim)


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """q [B, T, K, G, H] -> [B, T, K, G, H].

    It has a custom backward pass because derived ones need the exponentials in float32: kept, they are the largest
    activation there is, and recomputed, their products are run twice. This one needs them in the compute dtype.
    """
    return _attention_forward(q, k, v, mask)[0]


def _attention_forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple]:
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    largest = checkpoint_name(scores.max(axis=-1), "statistics")  # [B, K, G, T]
    weights = jnp.exp(scores - largest[..., None])
    total = jnp.moveaxis(checkpoint_name(weights.sum(axis=-1), "statistics"), -1, 1)[..., None]  # [B, T, K, G, 1]
    weights = checkpoint_name(weights.astype(v.dtype), "weights")
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, precision=precision, preferred_element_type=jnp.float32)
    mixed = checkpoint_name((mixed / total).astype(v.dtype), "attention")
    return mixed, (q, k, v, mask, weights, total, mixed)


def _attention_backward(residuals: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, weights, total, mixed = residuals
    options: Any = {"precision": matmul_precision(q.dtype), "preferred_element_type": jnp.float32}
    gradient = gradient.astype(jnp.float32) / total
    through_sum = (gradient * mixed.astype(jnp.float32)).sum(axis=-1)  # [B, T, K, G]
    gradient = gradient.astype(v.dtype)
    to_v = jnp.einsum("BKGTS,BTKGH->BSKH", weights, gradient, **options)
    to_weights = jnp.einsum("BTKGH,BSKH->BKGTS", gradient, v, **options)
    to_scores = weights.astype(jnp.float32) * (to_weights - jnp.moveaxis(through_sum, 1, -1)[..., None])
    if mask is not None:  # matters only if a row sees no key at all; otherwise the weight is 0 already
        to_scores = jnp.where(mask[:, None, None], to_scores, 0.0)
    to_scores = (to_scores * q.shape[-1] ** -0.5).astype(q.dtype)
    to_q = jnp.einsum("BKGTS,BSKH->BTKGH", to_scores, k, **options)
    to_k = jnp.einsum("BKGTS,BTKGH->BSKH", to_scores, q, **options)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)
