"""python finetune.py --config configs/finetune/full.py --config.init_from=CKPT --config.data.dataset=NAME
--config.data.data_dir=DIR --workdir runs/NAME

Full fine-tuning: all weights, batch 16, image augmentation on. Model, tokenizer and prompt come from the checkpoint.
"""

from configs.common import base


def get_config():
    config = base()
    config.model.preset = ""
    config.data.shuffle_buffer = 100_000
    config.augment.enabled = True
    config.train.batch_size = 16
    config.train.steps = 20_000
    config.train.eval_every = 500
    config.train.checkpoint_every = 1000
    return config
