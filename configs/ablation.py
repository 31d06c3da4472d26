"""python train.py --config configs/ablation.py --workdir runs/ablation

The tabletop task with a quarter of the demo's steps, two passes over its data: what the sweeps of docs/ablations.md
start from, about two minutes a run on two free cores. `configs/ablation.py:siglip` has that tower alone.
"""

from configs.tabletop import get_config as tabletop


def get_config(towers="dino+siglip"):
    config = tabletop(towers)
    config.train.steps = 1000
    config.train.log_every = 50
    config.train.eval_every = 250
    config.train.checkpoint_every = 1000
    return config
