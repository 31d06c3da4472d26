"""OpenVLA: vision towers, projector, language model; and its parameter counts (arXiv 2406.09246, section 3)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from openvla_jax.config import VLAConfig
from openvla_jax.models.activations import ACTIVATIONS
from openvla_jax.models.linear import Linear, matmul_precision
from openvla_jax.models.llama import Cache, Embedding, Llama
from openvla_jax.models.quantize import QTensor
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


class OpenVLA(nnx.Module):
    """The whole model. `dtype` is the dtype of activations and products; parameters are created in float32.

    Sequence: BOS, the image's patches, the rest of the text; positions count patches.
    """

    unused: nnx.Dict | None  # adapters of what is never run, by tower, so that PEFT's are kept (`models/tuning.py`)

    def __init__(self, config: VLAConfig, key: Array, dtype=jnp.float32):
        keys = jax.random.split(key, len(config.towers) + 2)
        self.vision = nnx.Dict({tower.name: ViT(k, tower) for tower, k in zip(config.towers, keys[2:], strict=True)})
        self.projector = Projector(keys[0], config)
        self.llama = Llama(keys[1], config.llama)
        self.unused = nnx.data(None)
        self.config = config
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self,
        pixel_values: Float[HostOrDevice, "B height width channels"],
        input_ids: Int[HostOrDevice, "B T"],
        execution: Execution = PLAIN,
    ) -> Float[Array, "B S V"]:
        """Logits at every position: S = patches + T.

        `pixel_values` are normalised, three channels per tower in the towers' order; `input_ids` start with BOS and are
        padded on the right. Returns float32.
        """
        input_ids = jnp.asarray(input_ids)
        seen = jnp.pad(input_ids != self.config.pad_token, ((0, 0), (self.config.patches, 0)), constant_values=True)
        x = self.splice(self.project(pixel_values, execution), input_ids, execution)
        return self.llama.logits(self.llama(x, execution, seen), execution)

    def hidden(
        self, pixel_values: HostOrDevice, input_ids: Int[HostOrDevice, "B T"], execution: Execution = PLAIN
    ) -> Float[Array, "B S D"]:
        """Final normed hidden states of the multimodal sequence."""
        x = self.splice(self.project(pixel_values, execution), input_ids, execution)
        return self.llama(x, execution)

    def target_logits(
        self,
        pixel_values: HostOrDevice,
        input_ids: Int[HostOrDevice, "B T"],
        targets: Int[HostOrDevice, "B N"],
        execution: Execution = PLAIN,
    ) -> Float[Array, "B N V"]:
        """Logits that predict the tokens at text indices `targets` (each from the position before it), and no
        others.
        """
        hidden = self.hidden(pixel_values, input_ids, execution)
        before = jnp.asarray(targets) + (self.config.patches - 1)
        # A product with rows of an identity, exact in any dtype: the gradient of a gather is a scatter, which is slow
        # on TPUs, and wrong when the compiler splits it over two mesh axes.
        pick = jax.nn.one_hot(before, hidden.shape[1], dtype=hidden.dtype)
        chosen = jnp.einsum("BNS,BSD->BND", pick, hidden, precision=matmul_precision(hidden.dtype))
        return self.llama.logits(chosen, execution)

    def normalize(self, images: UInt8[HostOrDevice, "B height width 3"]) -> Float[Array, "B height width channels"]:
        """uint8 RGB to each tower's normalised pixels, stacked on channels."""
        unit = jnp.asarray(images).astype(jnp.float32) / 255.0
        towers = self.config.towers
        pixels = [(unit - jnp.asarray(t.mean, jnp.float32)) / jnp.asarray(t.std, jnp.float32) for t in towers]
        return jnp.concatenate(pixels, axis=-1)

    def project(
        self, pixel_values: Float[HostOrDevice, "B height width channels"], execution: Execution = PLAIN
    ) -> Float[Array, "B P D"]:
        """Projected patch embeddings: each tower reads its own three channels; features are joined in tower order."""
        size, towers = self.config.image_size, self.config.towers
        if pixel_values.shape[1:] != (size, size, 3 * len(towers)):
            raise ValueError(
                f"pixel_values {pixel_values.shape}: {self.config.name!r} takes [B, {size}, {size}, {3 * len(towers)}]"
            )
        pixels = jnp.asarray(pixel_values, self.dtype)
        features = []
        for i, tower in enumerate(towers):
            with jax.named_scope(f"vision/{tower.name}"):  # profiles then read like the model
                features.append(self.vision[tower.name](pixels[..., 3 * i : 3 * i + 3], execution))
        with jax.named_scope("projector"):
            return self.projector(jnp.concatenate(features, axis=-1), execution)

    def splice(
        self, patches: Float[Array, "B P D"], input_ids: Int[HostOrDevice, "B T"], execution: Execution = PLAIN
    ) -> Float[Array, "B P+T D"]:
        """Patches go directly after BOS, without separators."""
        text = self.llama.embed(input_ids, self.dtype, execution)
        return jnp.concatenate([text[:, :1], patches, text[:, 1:]], axis=1)

    def prefill(
        self,
        pixel_values: HostOrDevice,
        input_ids: Int[HostOrDevice, "B T"],
        lengths: Int[HostOrDevice, "B"],
        steps: int,
        execution: Execution = PLAIN,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits of the token after each row's `lengths` text tokens, and a cache with room for `steps` more."""
        x = self.splice(self.project(pixel_values, execution), input_ids, execution)
        last = jnp.asarray(lengths) + (self.config.patches - 1)
        hidden, cache = self.llama.prefill(x, x.shape[1] + steps, execution, last)
        return self.llama.logits(hidden[:, 0], execution), cache

    def decode_step(
        self, tokens: Int[Array, "B"], lengths: Int[HostOrDevice, "B"], cache: Cache, execution: Execution = PLAIN
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after one more token, which is text token number `lengths` of its row."""
        x = self.llama.embed(tokens[:, None], self.dtype, execution)
        hidden, cache = self.llama.decode_step(x, jnp.asarray(lengths) + self.config.patches, cache, execution)
        return self.llama.logits(hidden[:, 0], execution), cache

    def unstack(self) -> None:
        """Gives every layer arrays of its own, and integers the form of `BlockedQTensor`, in place: what is fastest on
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
