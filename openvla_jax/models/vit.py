"""One vision transformer that is DINOv2 with registers, SigLIP, CLIP or an ImageNet ViT, by config.

It computes what the reference takes from timm: the output of the second-to-last block, without final norm, prefix
tokens dropped. The last block, the final norm and SigLIP's attention pool are never run and have no parameters here;
their tensors (`UnusedViT`) only travel through checkpoints.
"""

import einops
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from openvla_jax.config import VisionConfig
from openvla_jax.models.activations import ACTIVATIONS
from openvla_jax.models.attention import attention, attention_kernel
from openvla_jax.models.film import FiLM
from openvla_jax.models.linear import Linear, make_param, matmul, matmul_precision, merged, stack_shape
from openvla_jax.models.lora import LoRA
from openvla_jax.models.norms import LayerNorm
from openvla_jax.models.stack import scan_layers
from openvla_jax.parallel.execution import Execution


class PatchEmbed(nnx.Module):
    """Convolution with stride = kernel = patch size, as one product over flattened patches (height, width, channel)."""

    lora: LoRA | None

    def __init__(self, key, config: VisionConfig):
        size = config.patch_size
        fan_in = size * size * 3
        self.kernel = make_param(key, (fan_in, config.width), ("patch", "embed"), scale=fan_in**-0.5)
        self.bias = None if config.pre_norm else make_param(None, (config.width,), ("embed",), value=0.0)
        self.lora = nnx.data(None)
        self.size = size

    def __call__(self, pixels: Float[Array, "B height width 3"], execution: Execution) -> Float[Array, "B P D"]:
        rows, columns = pixels.shape[1] // self.size, pixels.shape[2] // self.size
        # Pixels beyond the last whole patch are ignored, as by a VALID convolution.
        x = pixels[:, : rows * self.size, : columns * self.size]
        x = einops.rearrange(x, "b (y p) (x q) c -> b (y x) (p q c)", p=self.size, q=self.size)
        y = matmul(x, self.kernel, execution)
        if self.lora is not None:
            y = y + self.lora(x, execution, matmul_precision(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Self-attention. `qkv` holds the adapter of the three input projections, which reference checkpoints keep as one
    matrix: they share its A, as PEFT adapts it.
    """

    qkv: nnx.Dict | None

    def __init__(self, key, config: VisionConfig, layers: int | None):
        keys = jax.random.split(key, 4)
        width, heads = config.width, ("embed", "heads")
        self.q = Linear(keys[0], width, width, heads, bias=True, layers=layers)
        self.k = Linear(keys[1], width, width, heads, bias=True, layers=layers)
        self.v = Linear(keys[2], width, width, heads, bias=True, layers=layers)
        self.o = Linear(keys[3], width, width, ("heads", "embed"), bias=True, layers=layers)
        self.heads = config.heads
        self.qkv = nnx.data(None)

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "B T D"], scale: nnx.Param | None, execution: Execution
    ) -> Float[Array, "B T D"]:
        added = None if self.qkv is None else self.qkv["lora"](x, execution, matmul_precision(x.dtype))
        kernel = attention_kernel(x, self.heads, execution, causal=False)
        if kernel is not None and kernel.takes_merged:
            qkv = merged(x, [self.q, self.k, self.v], execution)
            mixed = kernel(qkv if added is None else qkv + added)
            return checkpoint_name(self.o(mixed, execution, scale=scale), "o")
        q, k, v = (layer(x, execution) for layer in (self.q, self.k, self.v))
        if added is not None:
            q, k, v = (y + part for y, part in zip((q, k, v), jnp.split(added, 3, axis=-1), strict=True))
        if kernel is not None:
            return checkpoint_name(self.o(kernel(q, k, v), execution, scale=scale), "o")
        shape = (*x.shape[:2], self.heads, -1)
        # Kept by heads, as attention takes them.
        q = checkpoint_name(q.reshape(shape), "q")
        k = checkpoint_name(k.reshape(shape), "k")
        v = checkpoint_name(v.reshape(shape), "v")
        return checkpoint_name(self.o(attention(q, k, v).reshape(x.shape), execution, scale=scale), "o")


class MLP(nnx.Module):
    def __init__(self, key, config: VisionConfig, layers: int | None):
        up, down = jax.random.split(key)
        self.up = Linear(up, config.width, config.mlp_dim, ("embed", "mlp"), bias=True, layers=layers)
        self.down = Linear(down, config.mlp_dim, config.width, ("mlp", "embed"), bias=True, layers=layers)
        self.activation = config.activation

    @jax.named_scope("mlp")
    def __call__(
        self, x: Float[Array, "B T D"], scale: nnx.Param | None, execution: Execution
    ) -> Float[Array, "B T D"]:
        up = checkpoint_name(self.up(x, execution), "up")
        # Kept too: an erf costs more than its place.
        return self.down(checkpoint_name(ACTIVATIONS[self.activation](up), "activation"), execution, scale=scale)


class ViTBlock(nnx.Module):
    """Pre-norm block; DINOv2 scales each branch by a learned vector (LayerScale). FiLM, if there is one, comes between
    the two branches.
    """

    film: FiLM | None

    def __init__(self, key, config: VisionConfig, layers: int | None, language_width: int | None = None):
        keys = jax.random.split(key)
        lead, lead_axes = stack_shape(layers)
        self.norm1 = LayerNorm(config.width, config.norm_eps, layers=layers)
        self.attention = Attention(keys[0], config, layers)
        self.norm2 = LayerNorm(config.width, config.norm_eps, layers=layers)
        self.mlp = MLP(keys[1], config, layers)
        scale = (*lead, config.width), (*lead_axes, "norm")
        # timm starts LayerScale at 1e-5 for its 40-block giants; at 0.1 a small tower learns from scratch too.
        self.scale1 = make_param(None, *scale, value=0.1) if config.layer_scale else None
        self.scale2 = make_param(None, *scale, value=0.1) if config.layer_scale else None
        self.film = nnx.data(None)
        if language_width is not None:
            self.film = FiLM(jax.random.fold_in(key, 1), language_width, config.width, layers)

    def __call__(
        self, x: Float[Array, "B T D"], execution: Execution, language: Float[Array, "B L"] | None = None
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.norm1(x), self.scale1, execution)
        if self.film is not None:
            assert language is not None, "a tower with FiLM needs the instruction"
            x = self.film(x, language, execution)
        return x + self.mlp(self.norm2(x), self.scale2, execution)


class ViT(nnx.Module):
    """A tower: normalised pixels of one image to patch features, without class and register tokens.

    With `language_width` its blocks have FiLM, and it takes an embedding of the instruction per image.
    """

    blocks: ViTBlock | nnx.List  # stacked, or one by one (`OpenVLA.unstack`)

    def __init__(self, key, config: VisionConfig, language_width: int | None = None):
        keys = jax.random.split(key, 5)
        width = config.width
        positions = config.patches + int(config.position_for_class_token)
        self.patch_embed = PatchEmbed(keys[0], config)
        self.position = make_param(keys[1], (positions, width), ("position", "embed"), scale=0.02)
        self.class_token = (
            make_param(keys[2], (1, width), ("position", "embed"), scale=0.02) if config.class_token else None
        )
        registers = (config.registers, width)
        self.registers = make_param(keys[3], registers, ("position", "embed"), scale=0.02) if config.registers else None
        self.pre_norm = LayerNorm(width, config.norm_eps) if config.pre_norm else None
        self.blocks = ViTBlock(keys[4], config, config.depth - 1, language_width)
        self.config = config

    def __call__(
        self,
        pixels: Float[Array, "B height width 3"],
        execution: Execution,
        language: Float[Array, "B L"] | None = None,
    ) -> Float[Array, "B P D"]:
        config = self.config
        x = self.patch_embed(pixels, execution)
        position = self.position[...].astype(x.dtype)
        if not config.position_for_class_token:
            x = x + position
        prefix = [p[...].astype(x.dtype) for p in (self.class_token, self.registers) if p is not None]
        if prefix:
            tokens = jnp.concatenate(prefix)
            x = jnp.concatenate([jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)), x], axis=1)
        if config.position_for_class_token:
            x = x + position
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        x = scan_layers(lambda block, x, own: block(x, own, language), x, self.blocks, execution)
        return x[:, config.prefix_tokens :]


class AttentionPool(nnx.Module):
    """SigLIP's pooling head (latent query over the patches): named tensors only, never called."""

    def __init__(self, key, config: VisionConfig):
        width = config.width
        self.latent = make_param(None, (1, width), ("position", "embed"), value=0.0)
        for name in ("q", "k", "v", "o"):
            setattr(self, name, Linear(key, width, width, ("embed", "heads"), bias=True))
        self.norm = LayerNorm(width, config.norm_eps)
        self.mlp = MLP(key, config, None)


class UnusedViT(nnx.Module):
    """The tensors of a tower that the policy never runs: last block, final norm, attention pool."""

    def __init__(self, key, config: VisionConfig, language_width: int | None = None):
        self.block = ViTBlock(key, config, None, language_width)
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.pool = AttentionPool(key, config) if config.attention_pool else None
