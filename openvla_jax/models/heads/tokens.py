"""Actions as tokens, predicted one after the other as OpenVLA does."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from openvla_jax.config import VLAConfig
from openvla_jax.models.heads.protocol import Inputs, Metric, Prediction, Sampling, Sums, camera_mask
from openvla_jax.models.openvla import OpenVLA
from openvla_jax.parallel.execution import PLAIN, Execution
from openvla_jax.tokens.actions import ActionTokenizer
from openvla_jax.types import ActionSpec


class TokenHead:
    """Actions as tokens, one after the other: the last `bins` entries of the vocabulary stand for bins of [-1, 1].

    A chunk of K actions of A dimensions is K * A tokens, action by action.
    """

    metrics: tuple[Metric, ...] = (
        Metric("action_accuracy", "accuracy", ".1%", ("correct", "actions")),
        Metric("action_l1", "L1", ".4f", ("l1", "actions")),
    )

    sequential = True

    def __init__(self, config: VLAConfig, action: ActionSpec):
        self.horizon = action.horizon
        self.tokenizer = ActionTokenizer(config.base_vocab_size, action.bins)

    def loss(
        self, model: OpenVLA, pixels: Float[Array, "*B H W channels"], batch: Any, execution: Execution, keys: Array
    ) -> tuple[Array, Sums]:
        """Cross-entropy over the batch's target tokens: actions and the end token."""
        hidden = model.hidden(pixels, batch.tokens, execution, batch.state, camera_mask(model, batch))
        return self.token_loss(model, hidden, batch, execution)

    def evaluate(
        self, model: OpenVLA, pixels: Float[Array, "*B H W channels"], batch: Any, execution: Execution, keys: Array
    ) -> Sums:
        return self.loss(model, pixels, batch, execution, keys)[1]

    def token_loss(
        self, model: OpenVLA, hidden: Float[Array, "B S D"], batch: Any, execution: Execution
    ) -> tuple[Array, Sums]:
        """Returns the loss and sums given the final hidden states.

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
        return losses.sum(), {"loss": losses.sum(axis=1), "targets": mask.sum(axis=1)} | self.token_sums(
            (predicted == targets) * is_action, jnp.abs(decode(predicted) - decode(targets)) * is_action, is_action
        )

    def token_sums(self, correct: Float[Array, "B N"], l1: Float[Array, "B N"], is_action: Float[Array, "B N"]) -> Sums:
        """Returns the sums of the head's metrics, given those of each target."""
        return {"correct": correct.sum(axis=1), "l1": l1.sum(axis=1), "actions": is_action.sum(axis=1)}

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
        choose = self.chooser(model, constrained, sampling)

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

    def chooser(
        self, model: OpenVLA, constrained: bool, sampling: Sampling | None
    ) -> Callable[[Float[Array, "B V"], Int[Any, ""]], tuple[Int[Array, "B"], Bool[Array, "B"]]]:
        """Returns `(logits, index of the token) -> (tokens, whether the free argmax was no action token)`."""
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

        return choose

    def decode(self, predicted: np.ndarray, dim: int) -> np.ndarray:
        """Returns the bin centres of each row's first K * dim tokens, float64 [B, K, dim]; NaN for the token -1."""
        tokens = predicted[:, : self.horizon * dim]
        return np.where(tokens < 0, np.nan, self.tokenizer.decode(tokens)).reshape(-1, self.horizon, dim)


def first_largest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`argmax` as two passes that CPUs vectorise, which over a vocabulary is several times faster; -1 if any is NaN."""
    size = logits.shape[-1]
    first = jnp.where(logits == logits.max(axis=-1, keepdims=True), jnp.arange(size), size).min(axis=-1)
    return jnp.where(first < size, first, -1)
