"""Low-rank adapters (LoRA, arXiv 2106.09685): `y = x W + scale * dropout(x) A B` beside a frozen kernel.

An adapter is part of the layer that it adapts (`Linear.lora`), stacked if the layer is. A is drawn from a normal of
standard deviation 1 / rank, B is zero, as PEFT's "gaussian" initialisation: at first nothing changes. Both are float32,
whatever the base is stored as.
"""

import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from openvla_jax.config import LoRAConfig
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.placement import all_gather_weights


class LoRAParam(nnx.Param):
    """A factor of an adapter."""


class LoRA(nnx.Module):
    """The adapter of a kernel [*lead, in, out]; `path` is its place in the model, which seeds it."""

    def __init__(self, key, config: LoRAConfig, path: str, shape: tuple[int, ...]):
        *lead, rows, columns = shape
        axes = ("layers",) * len(lead)
        self.salt = zlib.crc32(path.encode())
        a = jax.random.normal(jax.random.fold_in(key, self.salt), (*lead, rows, config.rank)) / config.rank
        self.a = LoRAParam(a, axes=(*axes, "adapter", "rank"))
        self.b = LoRAParam(jnp.zeros((*lead, config.rank, columns)), axes=(*axes, "rank", "adapter"))
        self.scale, self.dropout = config.scale, config.dropout

    def __call__(self, x: Float[Array, "... i"], execution: Execution, precision=None) -> Float[Array, "... o"]:
        """Returns the adapter's part of the output, in the dtype of `x`."""
        key = execution.dropout_key
        if self.dropout and key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, self.salt), 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        a, b = (all_gather_weights(factor[...].astype(x.dtype), execution.mesh) for factor in (self.a, self.b))
        return jnp.matmul(jnp.matmul(x, a, precision=precision), b, precision=precision) * self.scale

    def delta(self) -> Float[Array, "*lead i o"]:
        """What the adapter adds to its kernel, float32; of an adapter of one layer only, or of a small one."""
        product = jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)
        return product * self.scale
