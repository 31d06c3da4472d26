"""OpenVLA: vision towers, projector, language model; and its parameter counts (arXiv 2406.09246, section 3)."""

import math

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
from openvla_jax.models.sequence import SequenceLayout, take_positions
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


class OpenVLA(nnx.Module):
    """The whole model. `dtype` is the dtype of activations and products; parameters are created in float32.

    `SequenceLayout` defines the order of the sequence. Pixel values are normalised, three channels per tower in the
    towers' order: [B, C, H, W, 3 * towers], or [B, H, W, 3 * towers] of one camera. `input_ids` start with BOS and are
    padded on the right. `state`, float32 [B, columns], is normalised; a model without a state projector takes None.
    `image_mask`, bool [B, C], hides cameras that a row does not have; None shows all.
    """

    unused: nnx.Dict | None  # adapters of what is never run, by tower, so that PEFT's are kept (`models/tuning.py`)
    state_projector: StateProjector | None

    def __init__(self, config: VLAConfig, key: Array, dtype=jnp.float32):
        keys = jax.random.split(key, len(config.towers) + 2)
        self.vision = nnx.Dict({tower.name: ViT(k, tower) for tower, k in zip(config.towers, keys[2:], strict=True)})
        self.projector = Projector(keys[0], config)
        self.llama = Llama(keys[1], config.llama)
        if config.state_dim:
            self.state_projector = StateProjector(jax.random.fold_in(key, 1), config.state_dim, config.llama.width)
        else:
            self.state_projector = nnx.data(None)
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
        """Returns float32 logits at every position; pads are hidden from all queries."""
        input_ids = jnp.asarray(input_ids)
        visible = self.layout.visible(input_ids != self.config.pad_token, image_mask)
        x = self.embed(pixel_values, input_ids, execution, state)
        return self.llama.logits(self.llama(x, execution, visible), execution)

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
        self, pixel_values: Float[HostOrDevice, "*B height width channels"], execution: Execution = PLAIN
    ) -> Float[Array, "B P D"]:
        """Returns projected patch embeddings, one camera after the other.

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
        features = []
        for i, tower in enumerate(towers):
            with jax.named_scope(f"vision/{tower.name}"):  # profiles then read like the model
                features.append(self.vision[tower.name](pixels[..., 3 * i : 3 * i + 3], execution))
        with jax.named_scope("projector"):
            patches = self.projector(jnp.concatenate(features, axis=-1), execution)
        return rearrange(patches, "(B C) P D -> B (C P) D", C=cameras)

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
        token = None
        if self.state_projector is not None and state is not None:
            token = self.state_projector(jnp.asarray(state, self.dtype), execution)[:, None]
        elif state is not None or self.state_projector is not None:
            takes = f"a state of {self.config.state_dim} columns" if self.config.state_dim else "no state"
            raise ValueError(f"state is {'missing' if state is None else 'given'}: {self.config.name!r} takes {takes}")
        return self.layout.join(text, patches, token)

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
    return {t.name: jax.eval_shape(lambda key, t=t: UnusedViT(key, t), jax.random.key(0)) for t in config.towers}


def count_parameters(config: VLAConfig, include_unused: bool = False) -> int:
    """Number of parameters, without making any; with the reference's never-run ones if `include_unused`."""
    trees = [abstract_model(config)] + ([abstract_unused(config)] if include_unused else [])
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trees))
