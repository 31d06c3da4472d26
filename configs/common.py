"""What the other configs start from: every setting with its default, fine-tuning, and the settings of slices."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from openvla_jax.settings import Settings


def base() -> ConfigDict:
    """Returns every setting with its default, as `openvla_jax/settings.py` defines and explains them."""
    return _config_dict(Settings())


def _config_dict(settings: Any) -> ConfigDict:
    kinds, config = typing.get_type_hints(type(settings)), ConfigDict()
    for name, kind in kinds.items():
        value = getattr(settings, name)
        if dataclasses.is_dataclass(value):
            config[name] = _config_dict(value)
        elif isinstance(value, Mapping):
            config[name] = ConfigDict(value)
        elif value is None:  # a setting of a known type without a value
            (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
            config[name] = placeholder(typing.get_origin(kind) or kind)
        else:
            config[name] = value
    return config


def finetune(trainable: str) -> ConfigDict:
    """The reference's settings of fine-tuning: batch 16, image augmentation, 100,000 frames shuffled."""
    config = base()
    config.trainable = trainable
    config.model.preset = ""  # the checkpoint's
    config.data.shuffle_buffer = 100_000
    config.augment.enabled = True
    config.train.batch_size = 16
    config.train.steps = 20_000
    config.train.eval_every = 500
    config.train.checkpoint_every = 1000
    return config


# What a run of batch 2048 needs on a slice, as `configs/openvla_7b.py:v5p-128`: the names are Google's types of slices,
# in which v4 and v5p count two cores a chip. Other slices: --plan_search, and the settings that it proposes.
# `mesh.data` where gradients become real reduce-scatters over 32 chips, but not over more.
SLICES: dict[str, dict[str, Any]] = {
    "v4-128": {"topology": "v4:4x4x4", "train.remat": "attention,gate,up", "mesh.data": 2},
    "v5p-128": {"topology": "v5p:4x4x4", "train.remat": "save_dots"},
    "v5p-256": {"topology": "v5p:4x4x8", "train.remat": "save_dots"},
    "v5e-64": {"topology": "v5e:8x8", "train.remat": "attention", "mesh.data": 2},
    "v5e-256": {
        "topology": "v5e:16x16",
        "train.remat": "q,k,v,attention,o,gate,up,activation",
        "mesh.data": 8,
    },
    "v6e-64": {"topology": "v6e:8x8", "train.remat": "attention,gate,up", "mesh.data": 2},
}


def on_slice(config: ConfigDict, name: str) -> ConfigDict:
    """`config` with the settings of `SLICES[name]`; unchanged without a name."""
    if name:
        if name not in SLICES:
            raise ValueError(f"unknown slice {name!r}: one of {', '.join(SLICES)}")
        settings = {key: value for key, value in SLICES[name].items() if key != "topology"}
        config.update_from_flattened_dict(settings)
    return config
