"""python -m openvla_jax.sweep --sweep configs/sweeps/lr.py --workdir runs/sweeps/lr

The learning rate over three orders of magnitude, as the paper searched it (section 3.4).
"""

from openvla_jax.sweep import axis, log_spaced


def get_sweep():
    return "configs/ablation.py", axis("optimizer.learning_rate", log_spaced(1e-5, 1e-2, 4))
