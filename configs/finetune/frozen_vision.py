"""python finetune.py --config configs/finetune/frozen_vision.py --config.init_from=CKPT --config.data.dataset=NAME
--config.data.data_dir=DIR --workdir runs/NAME

Trains the projector and the language model; the vision towers are frozen.
"""

from configs.common import finetune
from openvla_jax.config import TRAINABLE


def get_config():
    return finetune(trainable=TRAINABLE["frozen_vision"])
