"""FiLM: vision features modulated by the instruction (OpenVLA-OFT, arXiv 2502.19645, section V)."""

from flax import nnx
from jaxtyping import Array, Float

from openvla_jax.models.linear import Linear
from openvla_jax.parallel.execution import Execution


class FiLM(nnx.Module):
    """Scales and shifts features of width D by an embedding of the instruction [B, L]; zero at first, so a new one
    changes nothing.
    """

    def __init__(self, key, language_width: int, width: int, layers: int | None):
        sizes = (language_width, width, ("embed", "mlp"))
        self.scale = Linear(key, *sizes, bias=True, layers=layers, init_scale=0.0)
        self.shift = Linear(key, *sizes, bias=True, layers=layers, init_scale=0.0)

    def __call__(
        self, x: Float[Array, "B T D"], language: Float[Array, "B L"], execution: Execution
    ) -> Float[Array, "B T D"]:
        scale, shift = (layer(language, execution)[:, None] for layer in (self.scale, self.shift))
        return x * (1 + scale) + shift
