"""python -m openvla_jax.sweep --sweep configs/sweeps/tuning.py --set init_from=runs/demo --workdir runs/sweeps/tuning

What is trained when the demo's policy moves to another robot, from 25 demonstrations (the paper's section 5.3): all of
it, with frozen vision, its ends, its last layer, or LoRA of some ranks. Needs `make demo`, and the demonstrations of
`python -m openvla_jax.sim.dataset --world changed --episodes 25 --out runs/demo-finetune/data`.
"""

from openvla_jax.config import TRAINABLE
from openvla_jax.sweep import axis, chain, product


def get_sweep():
    partial = axis("trainable", [TRAINABLE[name] for name in ("full", "frozen_vision", "sandwich", "last_layer")])
    # Adapters start from a matrix of zeros, which needs larger steps.
    adapters = [{"trainable": TRAINABLE["lora"], "optimizer.learning_rate": 1e-3}]
    points = chain(partial, product(adapters, axis("lora.rank", [4, 16, 32])))
    return "configs/finetune/tabletop.py:full", points
