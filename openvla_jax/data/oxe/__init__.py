"""The facts of Open X-Embodiment: datasets, their standardisation, and mixtures of them."""

from openvla_jax.data.oxe.datasets import DATASETS, ActionEncoding, DatasetConfig
from openvla_jax.data.oxe.mixtures import MIXTURES, resolve_mixture
from openvla_jax.data.oxe.state import StateEncoding
from openvla_jax.data.oxe.transforms import TRANSFORMS

__all__ = [
    "DATASETS",
    "MIXTURES",
    "TRANSFORMS",
    "ActionEncoding",
    "DatasetConfig",
    "StateEncoding",
    "resolve_mixture",
]
