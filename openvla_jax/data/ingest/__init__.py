"""Converters from other formats to RLDS."""
