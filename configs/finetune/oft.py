"""python finetune.py --config configs/finetune/oft.py:libero --config.init_from=CKPT --config.data.data_dir=DIR
--workdir runs/libero-oft

OpenVLA-OFT's recipe (arXiv 2502.19645): chunks at once, several cameras and the state, LoRA of rank 32 beside a head
that is trained from nothing. `:aloha` is OFT+ with FiLM; `:bridge` has LIBERO's optimiser, as the paper made no such
run. `--config.action.head=diffusion` or `parallel_tokens` trains another head. For data of your own set data.dataset,
data.module, action.horizon, action.dim, observation.cameras and observation.state: all else follows.
`--config.trainable=* --config.lora.rank=0` trains all weights.
"""

from configs.common import finetune
from openvla_jax.config import TRAINABLE, nearest

_ARM = tuple(f"joint_{i}" for i in range(1, 7))
PLATFORMS = {
    "libero": {
        "data.dataset": "libero_spatial_no_noops",
        "observation.cameras": ("primary", "wrist"),
        "observation.state": ("x", "y", "z", "rx", "ry", "rz", "gripper_left", "gripper_right"),
        "action.horizon": 8,
        "train.batch_size": 64,
        "train.steps": 150_000,
        "optimizer.decay_at": 100_000,
    },
    "aloha": {
        "data.dataset": "aloha1_put_X_into_pot_300_demos",
        "observation.cameras": ("primary", "left_wrist", "right_wrist"),
        "observation.state": tuple(f"{side}_{name}" for side in ("left", "right") for name in (*_ARM, "gripper")),
        "action.horizon": 25,
        "action.dim": 14,
        "action.normalization": "bounds",
        "film": True,
        "train.batch_size": 32,
        "train.steps": 100_000,
        "optimizer.decay_at": 50_000,
    },
    "bridge": {
        "data.dataset": "bridge_orig",
        "observation.cameras": ("primary",),
        "observation.state": ("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
        "action.horizon": 5,
        "train.batch_size": 64,
        "train.steps": 150_000,
        "optimizer.decay_at": 100_000,
    },
}


def get_config(platform: str = "libero"):
    if platform not in PLATFORMS:
        raise ValueError(f"unknown platform {platform!r}; {nearest(platform, PLATFORMS)}")
    config = finetune(trainable=f"{TRAINABLE['lora']},added")
    config.lora.rank = 32
    config.lora.targets = "reference"
    config.action.head = "l1"
    config.action.dim = 7
    config.action.normalization = "bounds_q99"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.schedule = "step"
    config.optimizer.weight_decay = 0.01
    config.optimizer.decay_all = True
    config.optimizer.clip_norm = 0.0
    config.train.eval_every = 2500
    config.train.checkpoint_every = 5000
    config.train.keep_every = 50_000
    config.update_from_flattened_dict(PLATFORMS[platform])
    # A chunk is executed whole; the text is 64 tokens for the prompt and the end, and the chunk. Both follow overrides.
    horizon, dim = (config.action.get_ref(name) for name in ("horizon", "dim"))
    config.action.executed = horizon
    config.data.text_length = horizon * dim + 64
    return config
