"""python finetune.py --config configs/finetune/lora.py --config.init_from=CKPT --config.data.dataset=NAME
--config.data.data_dir=DIR --workdir runs/NAME

LoRA as the reference fine-tunes: rank 32, constant 5e-4, batch 16, image augmentation on. `lora.py:int4` (or `:int8`)
keeps the frozen base as integers (QLoRA); `--config.lora.targets=reference` adapts what PEFT's all-linear does.
"""

from configs.common import finetune
from openvla_jax.config import TRAINABLE


def get_config(quantize: str = ""):
    config = finetune(trainable=TRAINABLE["lora"])
    config.quantize = quantize
    config.lora.rank = 32
    config.optimizer.learning_rate = 5e-4
    return config
