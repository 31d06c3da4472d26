"""python train.py --config configs/openvla_7b_384px.py:v5p-128 --config.data.data_dir=gs://BUCKET/oxe
--config.init_from=VLM --workdir gs://BUCKET/run

The 7B at 384 px (729 patches; VLM is prism-dinosiglip+7b). The paper found it three times as slow and no better.
"""

from configs.openvla_7b import get_config as pretraining


def get_config(slice_name: str = ""):
    config = pretraining(slice_name)
    config.model.preset = "prism-dinosiglip+7b"
    config.train.remat = "full"
    return config
