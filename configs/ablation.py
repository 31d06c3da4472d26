"""python train.py --config configs/ablation.py --workdir runs/ablation

The tabletop task with an eighth of the demo's steps: what the sweeps of docs/ablations.md start from, about a minute a
run on two free cores. `configs/ablation.py:siglip` has that tower alone.
"""

from configs.tabletop import get_config as tabletop


def get_config(towers="dino+siglip"):
    config = tabletop(towers)
    config.train.steps = 500
    config.train.log_every = 50
    config.train.eval_every = 125
    config.train.checkpoint_every = 500
    return config
