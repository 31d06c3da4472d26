"""python train.py --config configs/tabletop_oft.py:l1 --workdir runs/demo-chunks/l1

Chunks at once beside tokens, on the same episodes of the world "wrist", with two cameras and a state: `:l1` predicts
eight actions in one forward pass, `:tokens` one action, token by token. `:parallel_tokens` and `:diffusion` are chunks
of eight too. The data come from `python -m openvla_jax.sim.dataset --world wrist --out runs/demo-chunks/data`.
"""

from configs import tabletop
from openvla_jax.config import HEADS, nearest


def get_config(head: str = "l1"):
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; {nearest(head, HEADS)}")
    config = tabletop.get_config()
    config.data.data_dir = "runs/demo-chunks/data"
    config.data.dataset = "tabletop_wrist"
    config.train.steps = 2000
    config.observation.cameras = ("primary", "wrist")
    config.observation.state = ("x", "y", "z")
    config.action.head = head
    config.action.dim = 7
    if head != "tokens":
        config.action.horizon = config.action.executed = 8
        config.data.text_length += 7 * 7  # seven actions more
    return config
