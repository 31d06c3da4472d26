"""Weights between PyTorch (HuggingFace and Prismatic layouts) and Orbax, both ways, bit for bit; and adapters."""

from openvla_jax.convert.adapters import export_adapter, import_adapter, is_adapter, merge_weights
from openvla_jax.convert.exporter import export_weights
from openvla_jax.convert.importer import import_weights
from openvla_jax.convert.names import ConversionError
from openvla_jax.convert.oft import OftOptions
from openvla_jax.convert.verify import Report, inspect_weights, verify_checksums, verify_weights

__all__ = [
    "ConversionError",
    "OftOptions",
    "Report",
    "export_adapter",
    "export_weights",
    "import_adapter",
    "import_weights",
    "inspect_weights",
    "is_adapter",
    "merge_weights",
    "verify_checksums",
    "verify_weights",
]
