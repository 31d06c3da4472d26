"""python train.py --config configs/debug.py --config.data.data_dir=runs/demo/data --workdir runs/debug

A tiny model on the tabletop task for a few steps: the smoke test of everything that trains.
"""

from configs.common import base


def get_config():
    config = base()
    config.model.preset = "tiny"
    config.tokenizer = "tiny"
    config.data.dataset = "tabletop"
    config.data.data_dir = "runs/demo/data"
    config.data.shuffle_buffer = 200
    config.data.text_length = 48
    config.data.num_parallel_reads = 2
    config.train.steps = 40
    config.train.batch_size = 8
    config.train.dtype = "float32"
    config.train.remat = "none"
    config.train.log_every = 1
    config.train.eval_every = 20
    config.train.eval_batches = 1
    config.train.checkpoint_every = 10
    config.optimizer.learning_rate = 1e-3
    return config
