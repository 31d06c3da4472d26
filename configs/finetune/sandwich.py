"""python finetune.py --config configs/finetune/sandwich.py --config.init_from=CKPT --config.data.dataset=NAME
--config.data.data_dir=DIR --workdir runs/NAME

Trains the two ends: vision towers, projector and token embeddings, the last decoder layer and the output head.
"""

from configs.common import finetune
from openvla_jax.config import TRAINABLE


def get_config():
    return finetune(trainable=TRAINABLE["sandwich"])
