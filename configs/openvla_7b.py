"""python train.py --config configs/openvla_7b.py --config.data.data_dir=gs://BUCKET/oxe --config.init_from=VLM
--workdir gs://BUCKET/run

Pretraining as in the paper: batch 2048, constant 2e-5, all weights trained, 224 px, Open X-Embodiment. VLM is the
imported prism-dinosiglip-224px+7b. `configs/openvla_7b.py:v5p-128` has the settings of a slice, see `configs.common`.
"""

from configs.common import base, on_slice


def get_config(slice_name: str = ""):
    config = base()
    config.model.preset = "openvla-7b"
    config.tokenizer = "llama2_tokenizer"
    # The paper took DROID out for the last third of the run, as its actions were not learned well.
    config.data.schedule = (("oxe_magic_soup_plus", 200_000),)
    config.data.dataset = "oxe_magic_soup_plus_minus"
    config.data.bad_images = "skip"
    config.train.steps = 300_000
    return on_slice(config, slice_name)
