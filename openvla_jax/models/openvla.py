"""OpenVLA: vision towers, projector, language model; and its parameter counts (arXiv 2406.09246, section 3)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from openvla_jax.config import VLAConfig
from openvla_jax.models.activations import ACTIVATIONS
from openvla_jax.models.linear import Linear
from openvla_jax.models.llama import Cache, Embedding, Llama
from openvla_jax.models.quantize import QTensor
from openvla_jax.models.regression import MLPResNet, NoisyActionProjector, embed_timestep
from openvla_jax.models.sequence import SequenceLayout, put_positions, take_positions
from openvla_jax.models.stack import unstack
from openvla_jax.models.vit import UnusedViT, ViT
from openvla_jax.parallel.execution import PLAIN, Execution

HostOrDevice = Array | np.ndarray


class Projector(nnx.Module):
    """Patch features [B, P, sum of tower widths] to the language model's width; exact GELU between layers."""

    def __init__(self, key, config: VLAConfig):
        keys = jax.random.split(key, 3)
        vision, width = config.vision_width, config.llama.width
        sizes = {
            "linear": [vision, width],
            "gelu-mlp": [vision, width, width],
            "fused-gelu-mlp": [vision, 4 * vision, width, width],
        }[config.projector.kind]
        for i, (key, size_in, size_out) in enumerate(zip(keys, sizes, sizes[1:], strict=False), start=1):
            setattr(
                self,
                f"fc{i}",
                Linear(key, size_in, size_out, ("embed", "mlp") if i % 2 else ("mlp", "embed"), bias=True),
            )
        self.layers = len(sizes) - 1

    def __call__(self, x: Float[Array, "B P D_in"], execution: Execution) -> Float[Array, "B P D_out"]:
        for i in range(1, self.layers + 1):
            x = getattr(self, f"fc{i}")(x, execution)
            if i < self.layers:
                x = ACTIVATIONS["gelu"](x)
        return x


class StateProjector(nnx.Module):
    """The state [B, columns] as one token [B, D] of the sequence: two layers with exact GELU between them."""

    def __init__(self, key, columns: int, width: int):
        keys = jax.random.split(key)
        self.fc1 = Linear(keys[0], columns, width, ("state", "embed"), bias=True)
        self.fc2 = Linear(keys[1], width, width, ("embed", "mlp"), bias=True)

    def __call__(self, state: Float[Array, "B columns"], execution: Execution) -> Float[Array, "B D"]:
        return self.fc2(ACTIVATIONS["gelu"](self.fc1(state, execution)), execution)


class Slots(NamedTuple):
    """Where a chunk stands in the text of a head that predicts it at once, and what is known of it."""

    positions: Int[HostOrDevice, "B N"]  # text indices of the chunk's numbers, action by action
    real: Bool[HostOrDevice, "B T"]  # which text tokens are no pads
    noisy: Float[Array, "B N"] | None = None  # a noisy chunk; None: slots are zero
    timestep: Int[Array, "B"] | None = None  # of the noise


class OpenVLA(nnx.Module):
    """The whole model. `dtype` is the dtype of activations and products; parameters are created in float32.

    `SequenceLayout` defines the order of the sequence. Pixel values are normalised, three channels per tower in the
    towers' order: [B, C, H, W, 3 * towers], or [B, H, W, 3 * towers] of one camera. `input_ids` start with BOS and are
    padded on the right. `state`, float32 [B, columns], is normalised; a model without a state projector takes None.
    `image_mask`, bool [B, C], hides cameras that a row does not have; None shows all.
    """

    unused: nnx.Dict | None  # adapters of what is never run, by tower, so that PEFT's are kept (`models/tuning.py`)
    state_projector: StateProjector | None
    action_head: MLPResNet | None  # of the heads "l1" and "diffusion"
    noisy_projector: NoisyActionProjector | None  # of the head "diffusion"

    def __init__(self, config: VLAConfig, key: Array, dtype=jnp.float32):
        keys = jax.random.split(key, len(config.towers) + 2)
        language = config.llama.width if config.film else None
        towers = zip(config.towers, keys[2:], strict=True)
        self.vision = nnx.Dict({tower.name: ViT(k, tower, language) for tower, k in towers})
        self.projector = Projector(keys[0], config)
        self.llama = Llama(keys[1], config.llama)
        if config.state_dim:
            self.state_projector = StateProjector(jax.random.fold_in(key, 1), config.state_dim, config.llama.width)
        else:
            self.state_projector = nnx.data(None)
        self.action_head = self.noisy_projector = nnx.data(None)
        if config.is_continuous:
            self.action_head = MLPResNet(jax.random.fold_in(key, 2), config.llama.width, config.action_dim)
        if config.head == "diffusion":
            self.noisy_projector = NoisyActionProjector(jax.random.fold_in(key, 3), config.llama.width)
        self.unused = nnx.data(None)
        self.config = config
        self.dtype = jnp.dtype(dtype)

    @property
    def layout(self) -> SequenceLayout:
        return SequenceLayout.of(self.config)

    def __call__(
        self,
        pixel_values: Float[HostOrDevice, "*B height width channels"],
        input_ids: Int[HostOrDevice, "B T"],
        execution: Execution = PLAIN,
        state: Float[HostOrDevice, "B columns"] | None = None,
        image_mask: Bool[HostOrDevice, "B C"] | None = None,
    ) -> Float[Array, "B S V"]:
        """Returns float32 logits at every position; pads are hidden from all queries.

        Raises ValueError for a model with a diffusion head, whose sequence needs a noisy chunk (`chunk_hidden`).
        """
        input_ids = jnp.asarray(input_ids)
        real = input_ids != self.config.pad_token
        visible = self.layout.visible(real, image_mask)
        patches = self.project(pixel_values, execution, self.language(input_ids, real, execution))
        x = self.embed_patches(patches, input_ids, execution, state)
        return self.llama.logits(self.llama(x, execution, visible, bidirectional=self.layout.bidirectional), execution)

    def hidden(
        self,
        pixel_values: Float[HostOrDevice, "*B height width channels"],
        input_ids: Int[HostOrDevice, "B T"],
        execution: Execution = PLAIN,
        state: Float[HostOrDevice, "B columns"] | None = None,
        image_mask: Bool[HostOrDevice, "B C"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the final normed hidden states of the sequence. Outputs at pads mean nothing."""
        visible = None
        if image_mask is not None:
            visible = self.layout.visible(jnp.ones(input_ids.shape, bool), image_mask)
        return self.llama(self.embed(pixel_values, input_ids, execution, state), execution, visible)

    def chunk_hidden(
        self,
        patches: Float[Array, "B P D"],
        input_ids: Int[HostOrDevice, "B T"],
        slots: Slots,
        execution: Execution = PLAIN,
        state: Float[HostOrDevice, "B columns"] | None = None,
        image_mask: Bool[HostOrDevice, "B C"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the final normed hidden states of a sequence with action slots; outputs at pads mean nothing.

        The ids at the slots do not matter: their embeddings are zero, or the noisy chunk's. All positions attend to
        all that are no pads.
        """
        text = self.llama.embed(input_ids, self.dtype, execution)
        noisy = None
        if slots.noisy is not None:
            assert self.noisy_projector is not None, "a noisy chunk is for a model with a diffusion head"
            noisy = self.noisy_projector(slots.noisy.astype(self.dtype), execution)
        text = put_positions(text, jnp.asarray(slots.positions), noisy)
        timestep = None
        if slots.timestep is not None:
            timestep = embed_timestep(slots.timestep, self.config.llama.width).astype(self.dtype)
        x = self.layout.join(text, patches, self.embed_state(state, execution), timestep)
        visible = self.layout.visible(jnp.asarray(slots.real), image_mask)
        return self.llama(x, execution, visible, bidirectional=True)

    def chunk_features(
        self, hidden: Float[Array, "B S D"], positions: Int[HostOrDevice, "B N"], dim: int
    ) -> Float[Array, "B K AD"]:
        """Returns what a continuous head reads: the states one position before each slot, side by side per action."""
        chosen = take_positions(hidden, self.layout.predictor(jnp.asarray(positions)))
        return rearrange(chosen, "B (K A) D -> B K (A D)", A=dim)

    def target_logits(
        self, hidden: Float[Array, "B S D"], targets: Int[HostOrDevice, "B N"], execution: Execution = PLAIN
    ) -> Float[Array, "B N V"]:
        """Returns the logits that predict the text tokens at indices `targets`, and no others."""
        chosen = take_positions(hidden, self.layout.predictor(jnp.asarray(targets)))
        return self.llama.logits(chosen, execution)

    def normalize(self, images: UInt8[HostOrDevice, "*B height width 3"]) -> Float[Array, "*B height width channels"]:
        """uint8 RGB to each tower's normalised pixels, stacked on channels."""
        unit = jnp.asarray(images).astype(jnp.float32) / 255.0
        towers = self.config.towers
        pixels = [(unit - jnp.asarray(t.mean, jnp.float32)) / jnp.asarray(t.std, jnp.float32) for t in towers]
        return jnp.concatenate(pixels, axis=-1)

    def project(
        self,
        pixel_values: Float[HostOrDevice, "*B height width channels"],
        execution: Execution = PLAIN,
        language: Float[Array, "B L"] | None = None,
    ) -> Float[Array, "B P D"]:
        """Returns projected patch embeddings, one camera after the other. `language` modulates towers with FiLM.

        Each tower reads its own three channels; features are joined in tower order. Raises ValueError for another
        number of cameras or another size than the model's.
        """
        config, towers, shape = self.config, self.config.towers, pixel_values.shape
        wanted = (config.image_size, config.image_size, 3 * len(towers))
        cameras = shape[1] if len(shape) == 5 else 1
        if shape[-3:] != wanted or cameras != config.cameras or len(shape) not in (4, 5):
            takes = wanted if config.cameras == 1 else (config.cameras, *wanted)
            raise ValueError(f"pixel_values {shape}: {config.name!r} takes [B, {', '.join(map(str, takes))}]")
        pixels = jnp.asarray(pixel_values, self.dtype).reshape(-1, *wanted)
        if language is not None:
            language = jnp.repeat(language, cameras, axis=0)
        features = []
        for i, tower in enumerate(towers):
            with jax.named_scope(f"vision/{tower.name}"):  # profiles then read like the model
                features.append(self.vision[tower.name](pixels[..., 3 * i : 3 * i + 3], execution, language))
        with jax.named_scope("projector"):
            patches = self.projector(jnp.concatenate(features, axis=-1), execution)
        return rearrange(patches, "(B C) P D -> B (C P) D", C=cameras)

    def language(
        self, input_ids: Int[HostOrDevice, "B T"], shown: Bool[HostOrDevice, "B T"], execution: Execution = PLAIN
    ) -> Float[Array, "B D"] | None:
        """Returns the mean embedding of the tokens that are `shown`, for FiLM; None for a model without it."""
        if not self.config.film:
            return None
        weights = jnp.asarray(shown, jnp.float32)[..., None]
        text = self.llama.embed(input_ids, self.dtype, execution).astype(jnp.float32)
        return ((text * weights).sum(axis=1) / weights.sum(axis=1)).astype(self.dtype)

    def embed_state(
        self, state: Float[HostOrDevice, "B columns"] | None, execution: Execution = PLAIN
    ) -> Float[Array, "B D"] | None:
        """Returns the state's token; None for a model without one. Raises ValueError if the model takes another."""
        if (state is None) != (self.state_projector is None):
            takes = f"a state of {self.config.state_dim} columns" if self.config.state_dim else "no state"
            raise ValueError(f"state is {'missing' if state is None else 'given'}: {self.config.name!r} takes {takes}")
        if self.state_projector is None:
            return None
        return self.state_projector(jnp.asarray(state, self.dtype), execution)

    def embed(
        self,
        pixel_values: Float[HostOrDevice, "*B height width channels"],
        input_ids: Int[HostOrDevice, "B T"],
        execution: Execution = PLAIN,
        state: Float[HostOrDevice, "B columns"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Returns the embeddings of the whole sequence. Raises ValueError for a state that the model does not take."""
        return self.embed_patches(self.project(pixel_values, execution), input_ids, execution, state)

    def embed_patches(
        self,
        patches: Float[Array, "B P D"],
        input_ids: Int[HostOrDevice, "B T"],
        execution: Execution = PLAIN,
        state: Float[HostOrDevice, "B columns"] | None = None,
    ) -> Float[Array, "B S D"]:
        """`embed` of patches that are projected already."""
        text = self.llama.embed(input_ids, self.dtype, execution)
        return self.layout.join(text, patches, self.embed_state(state, execution))

    def prefill(
        self,
        pixel_values: Float[HostOrDevice, "*B height width channels"],
        input_ids: Int[HostOrDevice, "B T"],
        lengths: Int[HostOrDevice, "B"],
        steps: int,
        execution: Execution = PLAIN,
        state: Float[HostOrDevice, "B columns"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Returns the logits of the token after each row's `lengths` text tokens, and a cache for `steps` more."""
        return self.prefill_patches(self.project(pixel_values, execution), input_ids, lengths, steps, execution, state)

    def prefill_patches(
        self,
        patches: Float[Array, "B P D"],
        input_ids: Int[HostOrDevice, "B T"],
        lengths: Int[HostOrDevice, "B"],
        steps: int,
        execution: Execution = PLAIN,
        state: Float[HostOrDevice, "B columns"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """`prefill` of patches that are projected already."""
        x = self.embed_patches(patches, input_ids, execution, state)
        last = self.layout.predictor(jnp.asarray(lengths))
        hidden, cache = self.llama.prefill(x, x.shape[1] + steps, execution, last)
        return self.llama.logits(hidden[:, 0], execution), cache

    def decode_step(
        self, tokens: Int[Array, "B"], lengths: Int[HostOrDevice, "B"], cache: Cache, execution: Execution = PLAIN
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Returns the logits after one more token, which is text token number `lengths` of its row."""
        x = self.llama.embed(tokens[:, None], self.dtype, execution)
        hidden, cache = self.llama.decode_step(x, self.layout.position(jnp.asarray(lengths)), cache, execution)
        return self.llama.logits(hidden[:, 0], execution), cache

    def unstack(self) -> None:
        """Unstacks the layers, and gives integers the form of `BlockedQTensor`, in place: what is fastest on
        a CPU (see `stack.unstack`).
        """
        self.llama.blocks = unstack(self.llama.blocks)
        for tower in self.vision.values():
            tower.blocks = unstack(tower.blocks)
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Linear) and isinstance(module.kernel, QTensor):
                module.kernel = module.kernel.blocked()
            elif isinstance(module, Embedding) and isinstance(module.table, QTensor):
                module.table = module.table.blocked()


def abstract_model(config: VLAConfig, dtype=jnp.float32) -> OpenVLA:
    """The model with `jax.ShapeDtypeStruct` leaves: no arrays are made."""
    return jax.eval_shape(lambda key: OpenVLA(config, key, dtype), jax.random.key(0))


def abstract_unused(config: VLAConfig) -> dict[str, UnusedViT]:
    """Shapes of the tensors that reference checkpoints hold but the policy never runs, by tower."""
    language = config.llama.width if config.film else None
    return {
        t.name: jax.eval_shape(lambda key, t=t: UnusedViT(key, t, language), jax.random.key(0)) for t in config.towers
    }


def count_parameters(config: VLAConfig, include_unused: bool = False) -> int:
    """Number of parameters, without making any; with the reference's never-run ones if `include_unused`."""
    trees = [abstract_model(config)] + ([abstract_unused(config)] if include_unused else [])
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trees))
