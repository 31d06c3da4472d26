"""Environments that policies are rolled out in; each implements `types.Environment`."""
