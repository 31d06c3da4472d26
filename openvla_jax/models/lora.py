"""Low-rank adapters (LoRA, arXiv 2106.09685): `y = x W + scale * dropout(x) A B` beside a frozen kernel.

An adapter is part of the layer that it adapts (`Linear.lora`), stacked where the layer is. A is drawn from a normal of
standard deviation 1 / rank, B is zero, as PEFT's "gaussian" initialisation: at first nothing changes. Both are float32,
whatever the base is stored as.
"""

import contextlib
import zlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from openvla_jax.config import LoRAConfig
from openvla_jax.parallel.placement import gathered

_DROPOUT: ContextVar[Array | None] = ContextVar("dropout", default=None)


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

    def __call__(self, x: Float[Array, "... i"], precision=None) -> Float[Array, "... o"]:
        """The adapter's part of the output, in the dtype of `x`."""
        key = _DROPOUT.get()
        if self.dropout and key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, self.salt), 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        a, b = (gathered(factor[...].astype(x.dtype)) for factor in (self.a, self.b))
        return jnp.matmul(jnp.matmul(x, a, precision=precision), b, precision=precision) * self.scale

    def delta(self) -> Float[Array, "*lead i o"]:
        """What the adapter adds to its kernel, float32; of an adapter of one layer only, or of a small one."""
        product = jnp.matmul(self.a[...], self.b[...], precision=jax.lax.Precision.HIGHEST)
        return product * self.scale


@contextlib.contextmanager
def dropout_key(key: Array | None) -> Iterator[None]:
    """While a model is traced in here its adapters drop inputs, drawn from `key`; without a key nothing is dropped."""
    token = _DROPOUT.set(key)
    try:
        yield
    finally:
        _DROPOUT.reset(token)


def layer_keys(layers: int) -> Array | None:
    """A key for each layer of a stack, or None outside `dropout_key`."""
    key = _DROPOUT.get()
    return None if key is None else jax.random.split(key, layers)
