"""The contract of a training run: what its checkpoints tell those who use them."""

import dataclasses
import json
from typing import Any

import ml_collections

from openvla_jax.checkpoint.contract import CheckpointError, Contract, action_spec
from openvla_jax.config import VLAConfig
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing
from openvla_jax.vision.augment import AugmentConfig

NORMALIZATION = "bounds_q99"  # what the data pipeline does


def build_contract(
    config: ml_collections.ConfigDict,
    model: VLAConfig,
    tokenizer: Any,
    base: Contract | None,
    iterator: Any,
    adapter: dict[str, Any] | None,
) -> Contract:
    """Returns the contract of a run's checkpoints.

    Args:
        config: The run's config (see `configs/common.py`).
        model: The model that is trained.
        tokenizer: Its tokenizer.
        base: The contract of the checkpoint that training starts from, or None.
        iterator: The training stream, of which `dataset_names` and `statistics` are read.
        adapter: {base, fingerprint, tuning} if the run saves only what it trains, else None.

    Raises:
        ValueError: The config contradicts the checkpoint that training starts from.
    """
    statistics = (base.statistics if base and config.statistics == "join" else {}) | iterator.statistics
    # The resize is always the data pipeline's, whichever one served the weights that training started from.
    preprocessing = dataclasses.replace(
        base.preprocessing if base else Preprocessing(),
        resize_kernel="lanczos3",
        crop_area=policy_crop_area(config.augment),
        text_length=config.data.text_length,
    )
    return Contract(
        model=model,
        tokenizer=tokenizer,
        statistics=statistics,
        observation=base.observation if base else ObservationSpec(),
        action=action_spec(statistics, bins=action_bins(config, base), normalization=NORMALIZATION),
        preprocessing=preprocessing,
        training=json.loads(config.to_json_best_effort()),
        default_key=iterator.dataset_names[0] if len(iterator.dataset_names) == 1 else None,
        adapter=adapter,
    )


def augment_config(settings: ml_collections.ConfigDict) -> AugmentConfig | None:
    """Returns the augmentation of a run, or None if it is off. Raises ValueError for a strength out of range."""
    if not settings["enabled"]:
        return None
    return AugmentConfig(**{key: value for key, value in settings.items() if key != "enabled"})


def policy_crop_area(settings: ml_collections.ConfigDict) -> float | None:
    """Returns the share of an image's area that validation and a policy are shown, or None for the whole image."""
    options = augment_config(settings)
    return None if options is None else options.policy_crop_area


def action_bins(config: ml_collections.ConfigDict, base: Contract | None) -> int:
    """Returns the number of action bins: the checkpoint's if training starts from one, else the config's.

    Raises CheckpointError if the two differ, or the checkpoint normalises actions as the data pipeline does not.
    """
    if base is None:
        return config.action.bins or ActionSpec.bins
    if base.action.normalization != NORMALIZATION:
        raise CheckpointError(
            f"actions of {config.init_from} are normalised by {base.action.normalization!r}, the data pipeline uses "
            f"{NORMALIZATION!r}: start from another checkpoint"
        )
    if config.action.bins not in (None, base.action.bins):
        raise CheckpointError(
            f"config.action.bins is {config.action.bins}, {config.init_from} has {base.action.bins}: leave it out"
        )
    return base.action.bins
