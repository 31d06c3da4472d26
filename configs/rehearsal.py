"""python train.py --config configs/rehearsal.py --workdir runs/rehearsal

The paper's mixture and its schedule, with a tiny model on a laptop: every dataset is opened, standardised, normalised
and trained on. The data are stand-ins: python -m openvla_jax.data stand-ins oxe_magic_soup_plus runs/stand_ins
"""

from configs.openvla_7b import get_config as pretraining


def get_config():
    config = pretraining()
    config.model.preset = "tiny"
    config.tokenizer = "tiny"
    config.data.data_dir = "runs/stand_ins"
    config.data.schedule = (("oxe_magic_soup_plus", 20),)
    config.train.steps = 30
    config.train.batch_size = 64
    config.train.dtype = "float32"
    config.train.log_every = 5
    config.train.eval_every = 0
    config.train.checkpoint_every = 10
    config.optimizer.learning_rate = 1e-3
    return config
