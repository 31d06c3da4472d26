"""Norms with statistics in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from openvla_jax.models.linear import apply_row_parameter, make_param, stack_shape


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, statistics in float32."""

    def __init__(self, width: int, eps: float, *, layers: int | None = None):
        lead, lead_axes = stack_shape(layers)
        self.scale = make_param(None, (*lead, width), (*lead_axes, "norm"), value=1.0)
        self.bias = make_param(None, (*lead, width), (*lead_axes, "norm"), value=0.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        # Kept without the axis of one element, which a TPU would fill up to a whole tile.
        mean = checkpoint_name(x32.mean(axis=-1), "statistics")[..., None]
        variance = checkpoint_name(jnp.square(x32 - mean).mean(axis=-1), "statistics")[..., None]
        normed = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS norm as Llama rounds it: mean square in float32, cast to the activation dtype, *then* times the weight."""

    def __init__(self, width: int, eps: float, *, layers: int | None = None):
        lead, lead_axes = stack_shape(layers)
        self.scale = make_param(None, (*lead, width), (*lead_axes, "norm"), value=1.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        mean_square = checkpoint_name(jnp.square(x32).mean(axis=-1), "statistics")[..., None]
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return apply_row_parameter(jnp.multiply, normed.astype(x.dtype), self.scale)
