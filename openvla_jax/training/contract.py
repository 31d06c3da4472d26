"""The contract of a training run: what its checkpoints tell those who use them."""

import dataclasses
from typing import Any

from openvla_jax.checkpoint.contract import Contract, action_spec
from openvla_jax.config import VLAConfig
from openvla_jax.errors import InputError
from openvla_jax.settings import Settings
from openvla_jax.tokens.actions import NORMALIZATIONS
from openvla_jax.types import ActionSpec, ObservationSpec, Preprocessing


def build_contract(
    config: Settings,
    model: VLAConfig,
    tokenizer: Any,
    base: Contract | None,
    iterator: Any,
    adapter: dict[str, Any] | None,
) -> Contract:
    """Returns the contract of a run's checkpoints.

    Args:
        config: The run's settings.
        model: The model that is trained.
        tokenizer: Its tokenizer.
        base: The contract of the checkpoint that training starts from, or None.
        iterator: The training stream, of which `dataset_names`, `statistics` and `simulators` are read.
        adapter: {base, fingerprint, tuning} if the run saves only what it trains, else None.

    Raises:
        InputError: The config contradicts the checkpoint that training starts from.
    """
    observation, action = choose_specs(config, base)
    statistics = (base.statistics if base and config.statistics == "join" else {}) | iterator.statistics
    conventions = action_spec(statistics)
    rows = NORMALIZATIONS[action.normalization]
    widths = {len(entry["action"][rows[0]]) for entry in iterator.statistics.values()}
    if model.action_dim and widths != {model.action_dim}:
        raise InputError(
            f"action.dim is {model.action_dim}, the head's, but the data have {', '.join(map(str, sorted(widths)))} "
            "action dimensions: set config.action.dim, and give data of one size"
        )
    action = dataclasses.replace(
        action, dim=conventions.dim, gripper=conventions.gripper, frame=conventions.frame, names=()
    )
    # The resize is always the data pipeline's, whichever one served the weights that training started from.
    preprocessing = dataclasses.replace(
        base.preprocessing if base else Preprocessing(),
        resize_kernel="lanczos3",
        crop_area=config.augment.policy_crop_area,
        text_length=config.data.text_length,
    )
    return Contract(
        model=model,
        tokenizer=tokenizer,
        statistics=statistics,
        observation=observation,
        action=action,
        preprocessing=preprocessing,
        training=config.to_dict() | ({"simulators": iterator.simulators} if iterator.simulators else {}),
        default_key=iterator.dataset_names[0] if len(iterator.dataset_names) == 1 else None,
        adapter=adapter,
    )


def choose_specs(config: Settings, base: Contract | None) -> tuple[ObservationSpec, ActionSpec]:
    """Returns what a run's policy is to be shown and to answer: the config's settings, else the checkpoint's.

    The dimension and the conventions of actions follow from the data (see `build_contract`). Raises InputError
    for settings that contradict each other.
    """
    observation, action = (base.observation, base.action) if base else (ObservationSpec(), ActionSpec())
    return replaced(observation, config.observation), replaced(action, config.action)


def shaped(model: VLAConfig, observation: ObservationSpec, action: ActionSpec, film: bool | None = None) -> VLAConfig:
    """Returns the model with the cameras, the state, the head and FiLM (None: as it is) of a policy."""
    return dataclasses.replace(
        model,
        head=action.head,
        action_dim=action.dim if action.is_continuous else 0,
        cameras=len(observation.cameras),
        state_dim=len(observation.state),
        film=model.film if film is None else film,
    )


def replaced(spec: Any, settings: Any) -> Any:
    """Returns `spec` with the settings that are not None."""
    given = {name: value for name, value in vars(settings).items() if value is not None}
    return dataclasses.replace(spec, **given)
