"""python finetune.py --config configs/finetune/full.py --config.init_from=CKPT --config.data.dataset=NAME
--config.data.data_dir=DIR --workdir runs/NAME

Full fine-tuning: all weights, batch 16, image augmentation on. Model, tokenizer and prompt come from the checkpoint.
"""

from configs.common import finetune
from openvla_jax.config import TRAINABLE


def get_config():
    return finetune(trainable=TRAINABLE["full"])
