"""python train.py --config configs/bridge_tiny.py --workdir runs/bridge_tiny

Real BridgeData V2 episodes (a 25-episode sample, 64 px frames) with the real Llama-2 tokenizer and a tiny model: the
whole path of a pretraining run, in about a minute on a laptop CPU. Opt-in: a clone does not have the sample, which is
read from `../shared/data`. `configs/tabletop.py` needs no files from elsewhere.
"""

from configs.common import base


def get_config():
    config = base()
    config.model.preset = "tiny"
    config.tokenizer = "../shared/data/llama2_tokenizer"
    config.data.dataset = "bridge_orig"
    config.data.data_dir = "../shared/data"
    config.data.statistics_dir = "runs/statistics"  # the sample's folder may be read-only
    config.data.shuffle_buffer = 2000
    config.data.text_length = 48
    config.data.num_parallel_reads = 2
    config.train.steps = 200
    config.train.batch_size = 16
    config.train.dtype = "float32"
    config.train.remat = "none"
    config.train.eval_every = 50
    config.train.eval_batches = 4
    config.train.checkpoint_every = 50
    config.optimizer.learning_rate = 1e-3
    return config
