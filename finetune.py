"""Fine-tunes a checkpoint: python finetune.py --config configs/finetune/full.py --config.init_from=CKPT --workdir
runs/mine

The same loop and flags as train.py, started from a checkpoint's weights, model, tokenizer and preprocessing.
"""

import train

if __name__ == "__main__":
    train.main(needs_init_from=True)
