"""python finetune.py --config configs/finetune/last_layer.py --config.init_from=CKPT --config.data.dataset=NAME
--config.data.data_dir=DIR --workdir runs/NAME

Trains the token embeddings, the last decoder layer and the output head; all else is frozen.
"""

from configs.common import finetune
from openvla_jax.config import TRAINABLE


def get_config():
    return finetune(trainable=TRAINABLE["last_layer"])
