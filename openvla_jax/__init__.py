"""OpenVLA in JAX: vision-language-action models for TPU pods, one GPU, or a laptop."""

import importlib

__version__ = "0.1.0"
_PUBLIC = {
    "Observation": "openvla_jax.types",
    "Policy": "openvla_jax.inference.policy",
    "load_model": "openvla_jax.checkpoint.load",
}
__all__ = ["Observation", "Policy", "load_model"]


def __getattr__(name: str):
    # Imported on first use: a data or planning job needs no policy, and a policy no data pipeline.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
