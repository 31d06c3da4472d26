"""python train.py --config configs/tabletop.py --workdir runs/demo

The simulated task: a tiny dual-tower model learns from scratch, on a laptop CPU, to pick up the named object.
The data come from `python -m openvla_jax.sim.dataset --out runs/demo/data`. `configs/tabletop.py:siglip` has that tower
alone.
"""

from configs.common import base


def get_config(towers="dino+siglip"):
    config = base()
    # Few large patches: where an object lies within one is then a linear function of its pixels, quick to learn.
    tower = {"image_size": 48, "patch_size": 24, "width": 64, "depth": 3, "heads": 4, "mlp_dim": 256}
    config.model.preset = "tiny"
    config.model.name = "tabletop"
    config.model.towers = {name: tower if name in towers.split("+") else None for name in ("dino", "siglip")}
    config.model.llama = {"width": 64, "depth": 2, "heads": 4, "kv_heads": 4, "mlp_dim": 176}
    config.tokenizer = "tiny"
    config.data.dataset = "tabletop"
    config.data.data_dir = "runs/demo/data"
    config.data.shuffle_buffer = 20_000
    config.data.text_length = 28  # 20 tokens of prompt, 7 of action, end of sequence
    config.data.num_parallel_reads = 2
    config.train.steps = 4000
    config.train.batch_size = 32
    config.train.dtype = "float32"
    config.train.remat = "none"
    config.train.log_every = 100
    config.train.eval_every = 1000
    config.train.eval_batches = 8
    config.train.checkpoint_every = 1000
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.95
    return config
