"""Converts weights between PyTorch and this project's checkpoints (see openvla_jax/convert_weights.py)."""

import sys

from openvla_jax.convert_weights import main

if __name__ == "__main__":
    sys.exit(main())
