"""Weights between PyTorch (HuggingFace and Prismatic layouts) and Orbax, both ways, bit for bit."""

from openvla_jax.convert.exporter import export_weights
from openvla_jax.convert.importer import import_weights
from openvla_jax.convert.names import ConversionError
from openvla_jax.convert.verify import Report, inspect_weights, verify_weights

__all__ = ["ConversionError", "Report", "export_weights", "import_weights", "inspect_weights", "verify_weights"]
