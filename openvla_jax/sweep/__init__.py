"""Sweeps: many runs from one base config. The helpers that sweep files are written with."""

from openvla_jax.sweep.points import axis, chain, log_spaced, product, seeds, zipped

__all__ = ["axis", "chain", "log_spaced", "product", "seeds", "zipped"]
