"""Action heads: how a model predicts actions, what it is trained on, and what it is measured by.

A head holds no parameters: these are parts of the model. Steps, policy and reports know heads by
`ActionHead` only.
"""

from collections.abc import Callable, Mapping

from jaxtyping import Array

from openvla_jax.config import VLAConfig
from openvla_jax.models.heads.chunks import DiffusionHead, L1Head, ParallelTokenHead
from openvla_jax.models.heads.protocol import ActionHead, Inputs, Metric, Prediction, Sampling
from openvla_jax.models.heads.tokens import TokenHead
from openvla_jax.types import ActionSpec

__all__ = ["ActionHead", "Inputs", "Metric", "Prediction", "Sampling", "TokenHead", "make_head", "summarize"]

HEADS: dict[str, Callable[[VLAConfig, ActionSpec], ActionHead]] = {
    "tokens": TokenHead,
    "parallel_tokens": ParallelTokenHead,
    "l1": L1Head,
    "diffusion": DiffusionHead,
}


def make_head(config: VLAConfig, action: ActionSpec) -> ActionHead:
    """Returns the head that `action.head` names."""
    return HEADS[action.head](config, action)


def summarize(head: ActionHead, sums: Mapping[str, Array]) -> dict[str, Array]:
    """Returns means of sums by dataset: over all, and vectors `*_by_dataset` (NaN for a dataset without rows).

    A metric that a head has for validation only is left out of sums without it.
    """
    total = {name: value.sum() for name, value in sums.items()}
    means = {"loss": total["loss"] / total["targets"]}
    for metric in head.metrics:
        above, below = metric.sums
        if above in sums:
            means[metric.name] = total[above] / total[below]
            means[f"{metric.name}_by_dataset"] = sums[above] / sums[below]
    return means
