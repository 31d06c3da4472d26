"""Action heads: how a model predicts actions, what it is trained on, and what it is measured by.

A head has no parameters of its own: these are parts of the model. Steps, policy and reports know heads by
`ActionHead` only.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from openvla_jax.config import VLAConfig
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.parallel.execution import PLAIN, Execution
from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.types import ActionSpec


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
    """How each row draws its tokens: by its own temperature (0: greedy) and seed, whatever its batch."""

    temperature: Float[Array, "B"]
    seed: Int[Array, "B"]


class Prediction(NamedTuple):
    """What `ActionHead.predict` returns, on the device. A head without tokens leaves those fields None."""

    tokens: Int[Array, "B N"]
    outside: Bool[Array, "B N"]  # the free argmax would not have been an action token
    logits: Float[Array, "B V"]  # of the first token


@runtime_checkable
class ActionHead(Protocol):
    """What a step, a policy and a report need of a head."""

    metrics: tuple[Metric, ...]

    def loss(
        self, model: OpenVLA, hidden: Float[Array, "B S D"], batch: Any, execution: Execution
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the summed loss and, by row, the sums [B] that metrics are made of ("loss" and "targets" among
        them: the mean loss is their ratio).
        """
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

    def decode(self, tokens: np.ndarray, dim: int) -> np.ndarray:
        """Returns normalised actions, float64 [B, K, dim], of what was predicted."""
        ...


class TokenHead:
    """Actions as tokens, one after the other: the last `bins` entries of the vocabulary stand for bins of [-1, 1].

    A chunk of K actions of A dimensions is K * A tokens, action by action.
    """

    metrics: tuple[Metric, ...] = (
        Metric("action_accuracy", "accuracy", ".1%", ("correct", "actions")),
        Metric("action_l1", "L1", ".4f", ("l1", "actions")),
    )

    def __init__(self, config: VLAConfig, action: ActionSpec):
        self.horizon = action.horizon
        self.tokenizer = ActionTokenizer(config.base_vocab_size, action.bins)

    def loss(
        self, model: OpenVLA, hidden: Float[Array, "B S D"], batch: Any, execution: Execution = PLAIN
    ) -> tuple[Array, dict[str, Array]]:
        """Cross-entropy over the batch's target tokens: actions and the end token.

        Logits are computed at the target positions only (section 2.3 of the reference behaviour). Accuracy and L1 are
        over action tokens, from the argmax over the whole vocabulary; L1 is between bin centres of normalised actions.
        """
        logits = model.target_logits(hidden, batch.target_positions, execution)
        targets = jnp.take_along_axis(batch.tokens, batch.target_positions, axis=1)
        mask = batch.target_mask.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets) * mask

        tokenizer = self.tokenizer
        centers = jnp.asarray(tokenizer.bin_centers, jnp.float32)
        decode = lambda ids: centers[jnp.clip(model.config.base_vocab_size - ids - 1, 0, len(centers) - 1)]
        predicted = logits.argmax(axis=-1)
        is_action = mask * ((targets >= tokenizer.first_token) & (targets <= tokenizer.last_token))
        return losses.sum(), {
            "loss": losses.sum(axis=1),
            "targets": mask.sum(axis=1),
            "correct": ((predicted == targets) * is_action).sum(axis=1),
            "l1": (jnp.abs(decode(predicted) - decode(targets)) * is_action).sum(axis=1),
            "actions": is_action.sum(axis=1),
        }

    def targets(self, batch: Any) -> Float[Array, ""]:
        """Returns the target tokens of a batch."""
        return batch.target_mask.sum().astype(jnp.float32)

    def predict(
        self,
        model: OpenVLA,
        inputs: Inputs,
        dim: int,
        constrained: bool = True,
        sampling: Sampling | None = None,
        execution: Execution = PLAIN,
    ) -> Prediction:
        """Decodes K * dim tokens per row, greedy or sampled: vision, prefill and cached steps.

        Rows do not see each other: a batch equals its rows decoded one by one. `constrained` chooses among the action
        tokens only; without it, among the whole vocabulary, as the reference does.
        """
        steps, lengths = self.horizon * dim, jnp.asarray(inputs.lengths)
        vocabulary = jnp.arange(model.config.llama.vocab_size)
        allowed = (vocabulary >= self.tokenizer.first_token) & (vocabulary <= self.tokenizer.last_token)

        def choose(logits, index):
            outside = ~allowed[first_largest(logits)]
            if constrained:
                logits = jnp.where(allowed, logits, -jnp.inf)
            if sampling is not None:
                draw = lambda seed: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), vocabulary.shape)
                hot = sampling.temperature[:, None] > 0
                noisy = logits / jnp.where(hot, sampling.temperature[:, None], 1) + jax.vmap(draw)(sampling.seed)
                logits = jnp.where(hot, noisy, logits)
            return first_largest(logits), outside

        def step(carry, index):
            token, cache = carry
            logits, cache = model.decode_step(token, lengths + index - 1, cache, execution)
            token, outside = choose(logits, index)
            return (token, cache), (token, outside)

        pixels = model.normalize(inputs.images)
        first_logits, cache = model.prefill(pixels, inputs.input_ids, lengths, steps, execution, inputs.state)
        first, first_outside = choose(first_logits, 0)
        _, (tokens, outside) = jax.lax.scan(step, (first, cache), jnp.arange(1, steps))
        return Prediction(
            jnp.concatenate([first[:, None], tokens.T], axis=1),
            jnp.concatenate([first_outside[:, None], outside.T], axis=1),
            first_logits,
        )

    def decode(self, tokens: np.ndarray, dim: int) -> np.ndarray:
        """Returns the bin centres of int [B, K * dim] tokens, float64 [B, K, dim]; NaN for the token -1."""
        return np.where(tokens < 0, np.nan, self.tokenizer.decode(tokens)).reshape(-1, self.horizon, dim)


def make_head(config: VLAConfig, action: ActionSpec) -> ActionHead:
    """Returns the head that `action.head` names."""
    return {"tokens": TokenHead}[action.head](config, action)


def summarize(head: ActionHead, sums: Mapping[str, Array]) -> dict[str, Array]:
    """Returns means of sums by dataset: over all, and vectors `*_by_dataset` (NaN for a dataset without rows)."""
    total = {name: value.sum() for name, value in sums.items()}
    means = {"loss": total["loss"] / total["targets"]}
    for metric in head.metrics:
        above, below = metric.sums
        means[metric.name] = total[above] / total[below]
        means[f"{metric.name}_by_dataset"] = sums[above] / sums[below]
    return means


def first_largest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`argmax` as two passes that CPUs vectorise, which over a vocabulary is several times faster; -1 if any is NaN."""
    size = logits.shape[-1]
    first = jnp.where(logits == logits.max(axis=-1, keepdims=True), jnp.arange(size), size).min(axis=-1)
    return jnp.where(first < size, first, -1)
