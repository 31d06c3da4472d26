"""python finetune.py --config configs/finetune/tabletop.py:lora --config.init_from=runs/demo --workdir
runs/demo-finetune/lora

The demo's policy on 25 demonstrations in a world that it never saw: `:lora`, `:full`, or `:scratch` (with train.py) for
the same model from nothing, in more steps. The data come from
`python -m openvla_jax.sim.dataset --world changed --episodes 25 --out runs/demo-finetune/data`.
"""

from configs import tabletop
from openvla_jax.config import TRAINABLE, nearest

SETTINGS = {
    "lora": {"trainable": TRAINABLE["lora"], "lora.rank": 16, "optimizer.learning_rate": 1e-3},
    "full": {"optimizer.learning_rate": 3e-4},
    "scratch": {"optimizer.learning_rate": 3e-3, "train.steps": 400},
}


def get_config(mode: str = "lora"):
    if mode not in SETTINGS:
        raise ValueError(f"unknown mode {mode!r}; {nearest(mode, SETTINGS)}")
    config = tabletop.get_config()
    config.data.data_dir = "runs/demo-finetune/data"
    config.train.steps = 150
    config.train.eval_every = 50
    config.train.checkpoint_every = 400
    config.train.log_every = 25
    config.optimizer.warmup_steps = 20
    if mode != "scratch":
        config.model = {"preset": ""}
        config.data.statistics = "base"  # the robot moves as it did
        config.frozen_dtype = "float32"  # a CPU computes in it
    config.update_from_flattened_dict(SETTINGS[mode])
    return config
