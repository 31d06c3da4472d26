"""python -m openvla_jax.sweep --sweep configs/sweeps/towers.py --workdir runs/sweeps/towers

Both vision towers or one (section 3.2): two seeds each.
"""

from openvla_jax.sweep import axis, product, seeds


def get_sweep():
    towers = axis("config", [f"configs/ablation.py:{name}" for name in ("dino+siglip", "dino", "siglip")])
    return "configs/ablation.py", product(seeds(2), towers)
