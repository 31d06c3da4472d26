"""Fine-tunes a checkpoint: python finetune.py --config configs/finetune/lora.py --config.init_from=CKPT --workdir DIR

The same loop and flags as train.py, started from a checkpoint's weights, model, tokenizer and preprocessing. The
checkpoints of a run that freezes weights hold only what was trained; `convert_weights.py merge BASE CHECKPOINT DST`
makes a whole model of them (docs/finetuning.md).
"""

import sys

from openvla_jax.train import finetune

if __name__ == "__main__":
    sys.exit(finetune())
