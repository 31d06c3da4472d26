"""Heads that predict a chunk at once: as tokens, by regression, or by diffusion (OpenVLA-OFT, arXiv 2502.19645)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from openvla_jax.config import VLAConfig
from openvla_jax.models.heads.protocol import Inputs, Metric, Prediction, Sampling, Sums, camera_mask
from openvla_jax.models.heads.tokens import TokenHead
from openvla_jax.models.openvla import OpenVLA, Slots
from openvla_jax.models.regression import NOISE_STEPS, add_noise, denoise, sampling_timesteps
from openvla_jax.models.sequence import put_positions
from openvla_jax.parallel.execution import PLAIN, Execution
from openvla_jax.types import ActionSpec


class ParallelTokenHead(TokenHead):
    """Actions as tokens, all at once: the slot of each has a zero embedding, and attention is bidirectional
    (OpenVLA-OFT, discrete).
    """

    metrics: tuple[Metric, ...] = (
        *TokenHead.metrics,
        Metric("first_action_accuracy", "first", ".1%", ("first_correct", "first")),
        Metric("next_actions_accuracy", "next", ".1%", ("next_correct", "next")),
        Metric("first_action_l1", "first L1", ".4f", ("first_l1", "first")),
        Metric("next_actions_l1", "next L1", ".4f", ("next_l1", "next")),
    )
    sequential = False
    average_pads = False  # FiLM's mean takes pads of a training row too, as the reference's; for comparisons

    def loss(
        self, model: OpenVLA, pixels: Float[Array, "*B H W channels"], batch: Any, execution: Execution, keys: Array
    ) -> tuple[Array, Sums]:
        hidden = chunk_states(model, pixels, batch, execution, average_pads=self.average_pads)
        return self.token_loss(model, hidden, batch, execution)

    def token_sums(self, correct: Float[Array, "B N"], l1: Float[Array, "B N"], is_action: Float[Array, "B N"]) -> Sums:
        first = (is_action.cumsum(axis=1) <= is_action.sum(axis=1, keepdims=True) / self.horizon).astype(jnp.float32)
        return super().token_sums(correct, l1, is_action) | {
            f"{name}{suffix}": (values * part).sum(axis=1)
            for name, part in (("first", first), ("next", 1 - first))
            for suffix, values in (("_correct", correct), ("_l1", l1), ("", is_action))
        }

    def predict(
        self,
        model: OpenVLA,
        inputs: Inputs,
        dim: int,
        constrained: bool = True,
        sampling: Sampling | None = None,
        execution: Execution = PLAIN,
    ) -> Prediction:
        """Predicts all tokens in one forward pass, each the likeliest or drawn on its own."""
        text, slots = chunk_text(model, inputs, self.horizon * dim)
        hidden = model.chunk_hidden(
            see(model, inputs.images, text, slots, execution), text, slots, execution, inputs.state
        )
        logits = model.target_logits(hidden, slots.positions, execution)
        choose = self.chooser(model, constrained, sampling)
        tokens, outside = jax.vmap(choose, in_axes=(1, 0), out_axes=1)(logits, jnp.arange(self.horizon * dim))
        return Prediction(tokens, outside, logits[:, 0])


class L1Head:
    """Actions as numbers: an MLP reads the hidden states of one action's slots, trained on the absolute error
    (OpenVLA-OFT's recipe). One forward pass gives a chunk.
    """

    metrics: tuple[Metric, ...] = (
        Metric("action_l1", "L1", ".4f", ("l1", "actions")),
        Metric("first_action_l1", "first", ".4f", ("first_l1", "first")),
        Metric("next_actions_l1", "next", ".4f", ("next_l1", "next")),
    )

    sequential = False
    average_pads = False  # as `ParallelTokenHead`'s

    def __init__(self, config: VLAConfig, action: ActionSpec):
        self.horizon, self.steps = action.horizon, action.denoising_steps

    def loss(
        self, model: OpenVLA, pixels: Float[Array, "*B H W channels"], batch: Any, execution: Execution, keys: Array
    ) -> tuple[Array, Sums]:
        """The absolute error of normalised actions, summed over chunk and dimensions."""
        hidden = chunk_states(model, pixels, batch, execution, average_pads=self.average_pads)
        predicted = self.read(model, hidden, chunk_positions(batch), execution)
        sums = error_sums(predicted, batch)
        return sums["l1"].sum(), {"loss": sums["l1"], "targets": sums["actions"]} | sums

    def evaluate(
        self, model: OpenVLA, pixels: Float[Array, "*B H W channels"], batch: Any, execution: Execution, keys: Array
    ) -> Sums:
        return self.loss(model, pixels, batch, execution, keys)[1]

    def targets(self, batch: Any) -> Float[Array, ""]:
        """Returns the numbers of a batch's chunks."""
        return batch.action_mask.sum().astype(jnp.float32)

    def predict(
        self,
        model: OpenVLA,
        inputs: Inputs,
        dim: int,
        constrained: bool = True,
        sampling: Sampling | None = None,
        execution: Execution = PLAIN,
    ) -> Prediction:
        """Predicts a chunk in one forward pass; nothing is drawn or constrained."""
        text, slots = chunk_text(model, inputs, self.horizon * dim)
        patches = see(model, inputs.images, text, slots, execution)
        hidden = model.chunk_hidden(patches, text, slots, execution, inputs.state)
        return Prediction(actions=self.read(model, hidden, slots.positions, execution))

    def decode(self, predicted: np.ndarray, dim: int) -> np.ndarray:
        """Returns the actions in float64."""
        return predicted.astype(np.float64)

    def read(
        self, model: OpenVLA, hidden: Float[Array, "B S D"], positions: Int[Any, "B N"], execution: Execution
    ) -> Float[Array, "B K A"]:
        """Returns what the model's MLP makes of the hidden states before the slots, float32."""
        features = model.chunk_features(hidden, positions, model.config.action_dim)
        assert model.action_head is not None
        return model.action_head(features, execution).astype(jnp.float32)


class DiffusionHead(L1Head):
    """Actions as numbers, denoised from noise in `denoising_steps` deterministic steps (DDIM). Each step runs the
    language model once, with the noisy chunk in the slots and a token for the timestep.
    """

    def loss(
        self, model: OpenVLA, pixels: Float[Array, "*B H W channels"], batch: Any, execution: Execution, keys: Array
    ) -> tuple[Array, Sums]:
        """The squared error of the predicted noise, at a timestep drawn per row."""
        keys = jax.vmap(jax.random.split)(keys)
        noise = draw_noise(keys[:, 0], *batch.actions.shape[1:])
        timestep = jax.vmap(lambda key: jax.random.randint(key, (), 0, NOISE_STEPS))(keys[:, 1])
        return self.noise_loss(model, pixels, batch, execution, noise, timestep)

    def noise_loss(
        self,
        model: OpenVLA,
        pixels: Float[Array, "*B H W channels"],
        batch: Any,
        execution: Execution,
        noise: Float[Any, "B K A"],
        timestep: Int[Any, "B"],
    ) -> tuple[Array, Sums]:
        """`loss` for given draws."""
        noisy = add_noise(jnp.asarray(batch.actions), jnp.asarray(noise), jnp.asarray(timestep))
        hidden = chunk_states(model, pixels, batch, execution, noisy, jnp.asarray(timestep), self.average_pads)
        predicted = self.read(model, hidden, chunk_positions(batch), execution)
        mask = batch.action_mask.astype(jnp.float32)
        loss = (jnp.square(predicted - noise) * mask).sum(axis=(1, 2))
        return loss.sum(), {"loss": loss, "targets": mask.sum(axis=(1, 2))}

    def evaluate(
        self, model: OpenVLA, pixels: Float[Array, "*B H W channels"], batch: Any, execution: Execution, keys: Array
    ) -> Sums:
        """The loss, and the error of chunks that are sampled as a policy does."""
        sums = self.loss(model, pixels, batch, execution, keys)[1]
        slots = batch_slots(model, batch)
        patches = model.project(pixels, execution, language_of(model, batch.tokens, slots, execution))
        noise = draw_noise(jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys), *batch.actions.shape[1:])
        mask = camera_mask(model, batch)
        sampled = self.sample(model, patches, batch.tokens, slots, batch.state, noise, execution, mask)
        return sums | error_sums(sampled, batch)

    def predict(
        self,
        model: OpenVLA,
        inputs: Inputs,
        dim: int,
        constrained: bool = True,
        sampling: Sampling | None = None,
        execution: Execution = PLAIN,
    ) -> Prediction:
        """Denoises a chunk from the noise that a row's seed gives."""
        text, slots = chunk_text(model, inputs, self.horizon * dim)
        patches = see(model, inputs.images, text, slots, execution)
        seeds = jnp.zeros(text.shape[0], jnp.int32) if sampling is None else sampling.seed
        noise = draw_noise(jax.vmap(jax.random.key)(seeds), self.horizon, dim)
        return Prediction(actions=self.sample(model, patches, text, slots, inputs.state, noise, execution))

    def sample(
        self,
        model: OpenVLA,
        patches: Float[Array, "B P D"],
        text: Int[Any, "B T"],
        slots: Slots,
        state: Float[Any, "B S"] | None,
        noise: Float[Array, "B K A"],
        execution: Execution,
        image_mask: Bool[Any, "B C"] | None = None,
    ) -> Float[Array, "B K A"]:
        """Returns the chunk that `noise` denoises to."""

        def step(noisy, timestep):
            rows = noisy.shape[0]
            known = slots._replace(noisy=noisy.reshape(rows, -1), timestep=jnp.full(rows, timestep))
            hidden = model.chunk_hidden(patches, text, known, execution, state, image_mask)
            predicted = self.read(model, hidden, slots.positions, execution)
            return denoise(noisy, predicted, timestep, self.steps), None

        return jax.lax.scan(step, noise, jnp.asarray(sampling_timesteps(self.steps)))[0]


def draw_noise(keys: Array, horizon: int, dim: int) -> Float[Array, "B K A"]:
    """Returns a noisy chunk for each of the keys [B], which does not depend on the other rows."""
    return jax.vmap(lambda key: jax.random.normal(key, (horizon, dim)))(keys)


# ---------------------------------------------------------------------------------------------------------------------
# Slots
# ---------------------------------------------------------------------------------------------------------------------


def chunk_text(model: OpenVLA, inputs: Inputs, numbers: int) -> tuple[Int[Array, "B T"], Slots]:
    """Returns each row's prompt followed by `numbers` slots and the end token, and where these are."""
    lengths = jnp.asarray(inputs.lengths)
    prompts = jnp.pad(jnp.asarray(inputs.input_ids), [(0, 0), (0, numbers + 1)])
    index = jnp.arange(prompts.shape[1])
    end = (lengths + numbers)[:, None]
    text = jnp.where(index < lengths[:, None], prompts, model.config.pad_token)
    text = jnp.where(index == end, model.config.end_token, text)
    return text, Slots(lengths[:, None] + jnp.arange(numbers), index <= end)


def chunk_positions(batch: Any) -> Int[Any, "B N"]:
    """Returns the slots of a batch: its targets without the end token."""
    return batch.target_positions[:, :-1]


def batch_slots(model: OpenVLA, batch: Any) -> Slots:
    return Slots(chunk_positions(batch), batch.tokens != model.config.pad_token)


def chunk_states(
    model: OpenVLA,
    pixels: Float[Array, "*B H W channels"],
    batch: Any,
    execution: Execution,
    noisy: Float[Array, "B K A"] | None = None,
    timestep: Int[Array, "B"] | None = None,
    average_pads: bool = False,
) -> Float[Array, "B S D"]:
    """Returns the hidden states of a batch's sequences."""
    slots = batch_slots(model, batch)
    averaged = slots._replace(real=jnp.ones_like(slots.real)) if average_pads else slots
    patches = model.project(pixels, execution, language_of(model, batch.tokens, averaged, execution))
    if noisy is not None:
        slots = slots._replace(noisy=noisy.reshape(noisy.shape[0], -1), timestep=timestep)
    return model.chunk_hidden(patches, batch.tokens, slots, execution, batch.state, camera_mask(model, batch))


def see(
    model: OpenVLA, images: Any, text: Int[Any, "B T"], slots: Slots, execution: Execution
) -> Float[Array, "B P D"]:
    """Returns the patches of uint8 images."""
    return model.project(model.normalize(images), execution, language_of(model, text, slots, execution))


def language_of(
    model: OpenVLA, text: Int[Any, "B T"], slots: Slots, execution: Execution
) -> Float[Array, "B D"] | None:
    """Returns what FiLM takes: the mean embedding of all text but slots and pads."""
    if not model.config.film:
        return None
    shown = (
        put_positions(jnp.asarray(slots.real, jnp.float32)[..., None], jnp.asarray(slots.positions), None)[..., 0] > 0
    )
    return model.language(text, shown, execution)


def error_sums(predicted: Float[Array, "B K A"], batch: Any) -> Sums:
    """Returns the absolute errors of normalised chunks and their counts: of all actions, the first, the others."""
    mask = batch.action_mask.astype(jnp.float32)
    errors = jnp.abs(predicted - batch.actions) * mask
    return {
        "l1": errors.sum(axis=(1, 2)),
        "actions": mask.sum(axis=(1, 2)),
        "first_l1": errors[:, 0].sum(axis=1),
        "first": mask[:, 0].sum(axis=1),
        "next_l1": errors[:, 1:].sum(axis=(1, 2)),
        "next": mask[:, 1:].sum(axis=(1, 2)),
    }
