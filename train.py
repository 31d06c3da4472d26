"""Trains a policy: python train.py --config configs/tabletop.py --workdir runs/demo (see openvla_jax/train.py)."""

import sys

from openvla_jax.train import main

if __name__ == "__main__":
    sys.exit(main())
