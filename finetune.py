"""Fine-tunes a checkpoint: python finetune.py --config configs/finetune/lora.py --config.init_from=CKPT --workdir
runs/mine

The same loop and flags as train.py, started from a checkpoint's weights, model, tokenizer and preprocessing. Configs:
lora, full, frozen_vision, sandwich, last_layer. Of a run that freezes weights the checkpoints hold what was trained;
`convert_weights.py merge BASE CHECKPOINT DST` makes a whole model of them (docs/finetuning.md).
"""

import train

if __name__ == "__main__":
    train.main(needs_init_from=True)
