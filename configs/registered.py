"""python train.py --config configs/registered.py:siglip-224px+mx-bridge --config.data.data_dir=DIR
--config.init_from=VLM --workdir DIR

The runs that the reference registers, by its own names, with model, mixture, batch and frozen parts of each; the
settings of a slice after a comma: `configs/registered.py:siglip-224px+mx-oxe-magic-soup,v5e-256`. The reference states
no number of steps (its limit is 1000 epochs): set `--config.train.steps`.
"""

from configs.common import base, on_slice
from configs.openvla_7b import get_config as pretraining
from openvla_jax.config import TRAINABLE

# Name: mixture, global batch, what is trained ("icy": all but the vision towers).
RUNS = {
    "siglip-224px+mx-bridge": ("bridge", 256, "*"),
    "siglip-224px-icy+mx-bridge": ("bridge", 256, TRAINABLE["frozen_vision"]),
    "prism-dinosiglip-224px+mx-bridge": ("bridge", 256, "*"),
    "siglip-224px+mx-oxe-magic-soup": ("oxe_magic_soup", 2048, "*"),
    "prism-dinosiglip-224px+mx-oxe-magic-soup-plus": ("oxe_magic_soup_plus_minus", 2048, "*"),
    "siglip-224px+mx-tdroid_carrot_in_bowl": ("tdroid_carrot_in_bowl", 256, "*"),
    "siglip-224px+mx-tdroid_pour_corn_in_pot": ("tdroid_pour_corn_in_pot", 256, "*"),
    "siglip-224px-icy+mx-tdroid_carrot_in_bowl": ("tdroid_carrot_in_bowl", 256, TRAINABLE["frozen_vision"]),
    "siglip-224px-last_layer+mx-tdroid_carrot_in_bowl": ("tdroid_carrot_in_bowl", 256, TRAINABLE["last_layer"]),
    "siglip-224px-sandwich+mx-tdroid_carrot_in_bowl": ("tdroid_carrot_in_bowl", 256, TRAINABLE["sandwich"]),
    "siglip-224px+mx-droid_wipe": ("droid_wipe", 256, "*"),
}


def get_config(argument: str = ""):
    name, _, slice_name = argument.partition(",")
    if name not in RUNS:
        raise ValueError(f"unknown run {name!r}: one of {', '.join(RUNS)}")
    mixture, batch_size, trainable = RUNS[name]
    config = base() if mixture != "oxe_magic_soup_plus_minus" else pretraining()
    config.tokenizer = "llama2_tokenizer"
    config.model.preset = name
    config.data.dataset = mixture
    config.train.batch_size = batch_size
    config.trainable = trainable
    return on_slice(config, slice_name)
