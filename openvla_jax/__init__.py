"""OpenVLA in JAX: vision-language-action models for TPU pods, one GPU, or a laptop."""

__version__ = "0.1.0"
__all__ = ["Policy", "load_model"]


def __getattr__(name: str):
    # Imported on first use: a data or planning job needs no policy, and a policy no data pipeline.
    if name in __all__:
        from openvla_jax.inference import policy

        return getattr(policy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
