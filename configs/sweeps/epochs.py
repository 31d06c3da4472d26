"""python -m openvla_jax.sweep --sweep configs/sweeps/epochs.py --workdir runs/sweeps/epochs

How often the data are seen: from half an epoch to two (section 3.4). The schedule ends with each run.
"""

from openvla_jax.sweep import axis


def get_sweep():
    return "configs/ablation.py", axis("train.steps", [250, 500, 1000])
