"""What steps, policies and reports need of an action head, and the types that cross it."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from openvla_jax.models.openvla import OpenVLA
from openvla_jax.parallel.execution import PLAIN, Execution

Sums = dict[str, Array]


class Metric(NamedTuple):
    """A number that a head is measured by, beside its loss."""

    name: str  # its key, as "action_accuracy"
    label: str  # on a progress line
    format: str  # of its value there
    sums: tuple[str, str]  # it is the first of these sums divided by the second


class Inputs(NamedTuple):
    """What a model acts on: B rows, prompts from BOS to the lone-space token."""

    images: Any  # uint8 [B, C, H, W, 3], or [B, H, W, 3] of one camera
    input_ids: Any  # int32 [B, T], padded on the right
    lengths: Any  # int32 [B], the real ids of each row
    state: Any = None  # float32 [B, S], normalised


class Sampling(NamedTuple):
    """How each row draws what it draws, whatever its batch."""

    temperature: Float[Array, "B"]  # of its tokens; 0: greedy
    seed: Int[Array, "B"]


class Prediction(NamedTuple):
    """What `ActionHead.predict` returns, on the device: tokens, or the chunk itself; the other fields are None."""

    tokens: Int[Array, "B N"] | None = None
    outside: Bool[Array, "B N"] | None = None  # the free argmax would not have been an action token
    logits: Float[Array, "B V"] | None = None  # of the first token
    actions: Float[Array, "B K A"] | None = None  # normalised


@runtime_checkable
class ActionHead(Protocol):
    """What a step, a policy and a report need of a head."""

    metrics: tuple[Metric, ...]
    sequential: bool  # whether tokens are predicted one after the other

    def loss(
        self, model: OpenVLA, pixels: Float[Array, "B C H W channels"], batch: Any, execution: Execution, keys: Array
    ) -> tuple[Array, Sums]:
        """Returns the summed loss and, by row, the sums [B] that metrics are made of ("loss" and "targets" among
        them: the mean loss is their ratio). `pixels` are normalised; `keys` [B] are for what a head draws
        for each row.
        """
        ...

    def evaluate(
        self, model: OpenVLA, pixels: Float[Array, "B C H W channels"], batch: Any, execution: Execution, keys: Array
    ) -> Sums:
        """Returns the sums of `loss` for validation, of a chunk that is predicted as a policy does."""
        ...

    def targets(self, batch: Any) -> Float[Array, ""]:
        """Returns how many terms the loss of a batch sums."""
        ...

    def predict(
        self,
        model: OpenVLA,
        inputs: Inputs,
        dim: int,
        constrained: bool = True,
        sampling: Sampling | None = None,
        execution: Execution = PLAIN,
    ) -> Prediction:
        """Predicts a chunk of `dim`-dimensional actions per row, inside a compiled function."""
        ...

    def decode(self, predicted: np.ndarray, dim: int) -> np.ndarray:
        """Returns normalised actions, float64 [B, K, dim], of the tokens or actions of a `Prediction`."""
        ...


def camera_mask(model: OpenVLA, batch: Any) -> Any | None:
    """Returns which cameras each row has; None for a model with one camera, which every row has."""
    return batch.image_mask if model.config.cameras > 1 else None
