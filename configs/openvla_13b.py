"""python train.py --config configs/openvla_13b.py:v5p-128 --config.data.data_dir=gs://BUCKET/oxe
--config.init_from=VLM --workdir gs://BUCKET/run

The run of `configs/openvla_7b.py` with Llama-2-13B (VLM is prism-dinosiglip-224px+13b).
"""

from configs.openvla_7b import get_config as pretraining


def get_config(slice_name: str = ""):
    config = pretraining(slice_name)
    config.model.preset = "prism-dinosiglip-224px+13b"
    config.train.remat = "full"
    return config
