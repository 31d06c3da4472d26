"""The layers that every part of the model is made of.

Einsum letters, here and everywhere: B batch, T query position, S key position, N heads, K key/value heads, G query
heads per key/value head, H head dim, D model width, F mlp width, V vocabulary, L layers, P patches.

Parameters are `nnx.Param`s with logical axis names in their metadata (`axes`); `training/sharding.py` maps these to
the mesh. Blocks are created *stacked*: `layers=L` gives every parameter a leading axis L, and `scan_layers` runs the
stack with one `lax.scan`, so that compile time does not grow with depth. Modules are used as plain pytrees under
jax's own transforms.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from openvla_jax.models import flash_attention, placement
from openvla_jax.models.lora import LoRA, dropout_key, layer_keys
from openvla_jax.models.placement import gathered, kernel_mesh, shard_rows, weights_are_spread
from openvla_jax.models.quantize import BlockedQTensor, QTensor

Kernel = nnx.Param | QTensor | BlockedQTensor

# Activations that the backward pass may keep instead of recomputing them; marked by `save_name` where they are made.
SAVEABLE = ("q", "k", "v", "attention", "o", "gate", "up", "activation", "weights")


def _keep(*names: str) -> Callable[..., Any]:
    """Keeps what `names` lists, and always the "statistics" of softmax and norms: a number or two a row, without which
    the backward pass would go through all scores three times instead of once, and through a norm's input once more.
    """
    return jax.checkpoint_policies.save_only_these_names(*names, "statistics")


# Policies, from least to most memory; `remat_policy` also takes names of SAVEABLE, separated by commas.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_qkv": _keep("q", "k", "v"),
    "save_qkvo": _keep("q", "k", "v", "attention", "o"),
    "save_dots": _keep(*SAVEABLE),
    "none": None,
}


def remat_policy(name: str) -> Callable[..., Any] | None:
    """The policy called `name`, or one that keeps what `name` lists, as "q,k,v,o"; ValueError for others."""
    if name in REMAT_POLICIES:
        return REMAT_POLICIES[name]
    kept = name.split(",")
    if not set(kept) <= set(SAVEABLE):
        raise ValueError(
            f"unknown remat policy {name!r}: one of {', '.join(REMAT_POLICIES)}, or names to keep, separated by "
            f"commas, of {', '.join(SAVEABLE)}"
        )
    return _keep(*kept)


def make_param(
    key, shape, axes, *, scale: float | None = None, value: float | None = None, dtype=jnp.float32
) -> nnx.Param:
    """A parameter: truncated normal of standard deviation `scale`, or the constant `value`."""
    assert len(shape) == len(axes), (shape, axes)
    if value is None:
        # 0.8796 is the standard deviation of a unit normal truncated at two.
        data = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype) * ((scale or 0.0) / 0.87962566)
    else:
        data = jnp.full(shape, value, dtype)
    return nnx.Param(data, axes=axes)


def stack_shape(layers: int | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Leading shape and axes of a stacked parameter (none if `layers` is None)."""
    return ((), ()) if layers is None else ((layers,), ("layers",))


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """float32 means float32 on every accelerator; bfloat16 takes the native product."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def is_rounded(kernel: Kernel, dtype) -> bool:
    """Whether `matmul` rounds the kernel to `dtype` for use, as training in bfloat16 does."""
    return isinstance(kernel, nnx.Param) and kernel[...].dtype == jnp.float32 and dtype != jnp.float32


def matmul(
    x: Float[Array, "... i"], kernel: Kernel, preferred_element_type=None, scale: Float[Array, "o"] | None = None
) -> Float[Array, "... o"]:
    """`x @ kernel` in the dtype of `x`, whatever the kernel is stored as; `scale` is for one that `is_rounded`."""
    precision = matmul_precision(x.dtype)
    if isinstance(kernel, QTensor | BlockedQTensor):
        return kernel.matmul(x, precision, preferred_element_type)
    stored = kernel[...] if scale is None else kernel[...] * scale
    return _matmul(x, stored, kernel.axes[-1] == "embed", preferred_element_type)


def _matmul(x: Array, stored: Array, by_outputs: bool, preferred_element_type=None) -> Array:
    """`x @ stored`, of an array that is spread over chips by what comes out (`by_outputs`) or by what goes in."""
    precision = matmul_precision(x.dtype)
    product = partial(jnp.matmul, precision=precision, preferred_element_type=preferred_element_type)
    if stored.dtype != x.dtype:
        weights = stored.astype(x.dtype)
        if precision is None and (by_outputs or preferred_element_type is not None):
            return placement.product(x, weights, by_outputs, preferred_element_type)
        return product(x, weights)
    if weights_are_spread():
        # Kept for the backward pass is this chip's part, not what was gathered.
        return jax.checkpoint(lambda x, weights: product(x, gathered(weights)), prevent_cse=False)(x, stored)
    return product(x, stored)


def by_row(function: Callable[[Array, Array], Array], x: Float[Array, "... D"], row: nnx.Param | Array) -> Array:
    """`function` of x and a parameter [D], both in the dtype of x. Written in float32 the result is the same, and the
    row's gradient is summed up and stays in float32: in bfloat16 a sum of thousands loses most of them.
    """
    exact = row[...].astype(jnp.float32)
    rounded = exact + jax.lax.stop_gradient(exact.astype(x.dtype).astype(jnp.float32) - exact)
    return function(x.astype(jnp.float32), rounded).astype(x.dtype)


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, kernel [in, out] (transposed against PyTorch), computed in the dtype of `x`.

    `lora` is an adapter beside the kernel, where there is one (`models/tuning.py`).
    """

    kernel: Kernel
    lora: LoRA | None

    def __init__(self, key, in_features: int, out_features: int, axes, *, bias: bool, layers: int | None = None):
        lead, lead_axes = stack_shape(layers)
        self.kernel = make_param(key, (*lead, in_features, out_features), (*lead_axes, *axes), scale=in_features**-0.5)
        self.bias = make_param(None, (*lead, out_features), (*lead_axes, axes[-1]), value=0.0) if bias else None
        self.lora = nnx.data(None)

    def __call__(
        self, x: Float[Array, "... i"], preferred_element_type=None, scale: nnx.Param | None = None
    ) -> Float[Array, "... o"]:
        """The result times `scale` [o], if there is one. Where the kernel is rounded for use, `scale` goes into it: its
        gradient then comes from the kernel's, and nothing needs the unscaled result once more.
        """
        folded = None
        if scale is not None and self.lora is None and is_rounded(self.kernel, x.dtype):
            folded = scale[...].astype(jnp.float32)
        y = matmul(x, self.kernel, preferred_element_type, folded)
        if self.lora is not None:
            y = y + self.lora(x, matmul_precision(x.dtype)).astype(y.dtype)
        if self.bias is not None:
            y = by_row(jnp.add, y, self.bias if folded is None else self.bias[...] * folded)
        return y if scale is None or folded is not None else by_row(jnp.multiply, y, scale)


def merged(x: Float[Array, "... i"], layers: Sequence[Linear]) -> Float[Array, "... o"]:
    """The results of several layers of x side by side; by one product, where kernels are not quantised. For layers that
    are spread over chips by what goes in, without adapters of their own.
    """
    kernels = [layer.kernel[...] for layer in layers if isinstance(layer.kernel, nnx.Param)]
    if len(kernels) < len(layers):
        return jnp.concatenate([layer(x) for layer in layers], axis=-1)
    assert all(layer.lora is None for layer in layers)
    y = _matmul(x, jnp.concatenate(kernels, axis=-1), by_outputs=False)
    biases = [layer.bias[...] for layer in layers if layer.bias is not None]
    return by_row(jnp.add, y, jnp.concatenate(biases, axis=-1)) if biases else y


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, statistics in float32."""

    def __init__(self, width: int, eps: float, *, layers: int | None = None):
        lead, lead_axes = stack_shape(layers)
        self.scale = make_param(None, (*lead, width), (*lead_axes, "norm"), value=1.0)
        self.bias = make_param(None, (*lead, width), (*lead_axes, "norm"), value=0.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        # Kept without the axis of one element, which a TPU would fill up to a whole tile.
        mean = save_name(x32.mean(axis=-1), "statistics")[..., None]
        variance = save_name(jnp.square(x32 - mean).mean(axis=-1), "statistics")[..., None]
        normed = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS norm as Llama rounds it: mean square in float32, cast to the activation dtype, *then* times the weight."""

    def __init__(self, width: int, eps: float, *, layers: int | None = None):
        lead, lead_axes = stack_shape(layers)
        self.scale = make_param(None, (*lead, width), (*lead_axes, "norm"), value=1.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        mean_square = save_name(jnp.square(x32).mean(axis=-1), "statistics")[..., None]
        normed = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return by_row(jnp.multiply, normed.astype(x.dtype), self.scale)


def rope(x: Float[Array, "B T N H"], positions: Int[Array, "#B T"], theta: float) -> Float[Array, "B T N H"]:
    """Rotary position embedding in the rotate-half layout (first half paired with second), angles in float32."""
    cos, sin = rope_angles(positions, x.shape[-1], theta, x.dtype)
    return _rotate(x, cos[..., None, :], sin[..., None, :])


def rope_angles(positions: Int[Array, "*B T"], dim: int, theta: float, dtype) -> tuple[Array, Array]:
    """Cosine and sine [*B, T, dim / 2] of the angles by which pairs are rotated."""
    half = dim // 2
    # Made on the host: an accelerator's power function is less exact, and position multiplies the error.
    frequencies = jnp.asarray(theta ** (-np.arange(half) / half), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    # The reference casts cosine and sine to the activation dtype before the products.
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


@jax.custom_vjp
def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [B, T, N, H] turned by angles of cosine and sine [#B, T, 1, H / 2]; the angles get no gradient."""
    return jax.lax.platform_dependent(x, cos, sin, tpu=_rotate_by_product, default=_rotate_halves)


def _rotate_halves(x: Array, cos: Array, sin: Array) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _rotate_by_product(x: Array, cos: Array, sin: Array) -> Array:
    """The same numbers. By the TPU compiler's estimate a product with a signed permutation moves half a lane row across
    faster than a slice and a concatenation.
    """
    half = cos.shape[-1]
    exchange = np.kron([[0, 1], [-1, 0]], np.eye(half))  # (first, second) -> (-second, first)
    exchanged = jnp.matmul(x, jnp.asarray(exchange, x.dtype), precision=matmul_precision(x.dtype))
    return x * jnp.concatenate([cos, cos], axis=-1) + exchanged * jnp.concatenate([sin, sin], axis=-1)


_rotate.defvjp(
    lambda x, cos, sin: (_rotate(x, cos, sin), (cos, sin)),
    lambda angles, gradient: (_rotate(gradient, angles[0], -angles[1]), None, None),
)


class AttentionKernel(NamedTuple):
    """Attention of a whole sequence as a kernel: of queries, keys and values [B, T, D], or where it `takes_merged` of
    one array [B, T, 3 D] of them, to their mix [B, T, D].
    """

    run: Callable[[tuple[Array, ...]], Array]
    takes_merged: bool

    def __call__(self, *qkv: Array) -> Array:
        if len(qkv) == 3:
            return self.run(tuple(save_name(x, name) for x, name in zip(qkv, "qkv", strict=True)))
        (x,) = qkv
        for name in "qkv":  # kept whole where a policy names any of them
            x = save_name(x, name)
        return self.run((x,))


def attention_kernel(
    x: Float[Array, "B T D"], heads: int, *, causal: bool, theta: float | None = None
) -> AttentionKernel | None:
    """The kernel, where one is wanted and takes projections like `x`; else None. `theta` rotates queries and keys."""
    mesh = kernel_mesh()
    if mesh is None or not flash_attention.fits(x, heads, theta is not None, mesh):
        return None
    angles = None
    if theta is not None:
        cos, sin = rope_angles(jnp.arange(x.shape[1]), x.shape[-1] // heads, theta, x.dtype)
        angles = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    run = lambda qkv: flash_attention.flash_attention(qkv, angles, heads, causal, mesh)
    return AttentionKernel(run, flash_attention.takes_merged(x, heads, mesh))


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Array | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with grouped key/value heads; `mask` broadcasts to [B, T, S], true where a key is seen.

    Scores, maximum, sum and the value product are float32; the division comes after that product, which is cheaper.
    """
    batch, length, heads, dim = q.shape
    q = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    return _attention(q, k, v, mask).reshape(batch, length, heads, dim)


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """q [B, T, K, G, H] -> [B, T, K, G, H].

    It has a backward pass of its own because derived ones need the exponentials in float32: kept, they are the largest
    activation there is, and recomputed, their products are run twice. This one needs them in the compute dtype.
    """
    return _attention_forward(q, k, v, mask)[0]


def _attention_forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple]:
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    largest = save_name(scores.max(axis=-1), "statistics")  # [B, K, G, T]
    weights = jnp.exp(scores - largest[..., None])
    total = jnp.moveaxis(save_name(weights.sum(axis=-1), "statistics"), -1, 1)[..., None]  # [B, T, K, G, 1]
    weights = save_name(weights.astype(v.dtype), "weights")
    mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, precision=precision, preferred_element_type=jnp.float32)
    mixed = save_name((mixed / total).astype(v.dtype), "attention")
    return mixed, (q, k, v, mask, weights, total, mixed)


def _attention_backward(residuals: tuple, gradient: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, weights, total, mixed = residuals
    options: Any = {"precision": matmul_precision(q.dtype), "preferred_element_type": jnp.float32}
    gradient = gradient.astype(jnp.float32) / total
    through_sum = (gradient * mixed.astype(jnp.float32)).sum(axis=-1)  # [B, T, K, G]
    gradient = gradient.astype(v.dtype)
    to_v = jnp.einsum("BKGTS,BTKGH->BSKH", weights, gradient, **options)
    to_weights = jnp.einsum("BTKGH,BSKH->BKGTS", gradient, v, **options)
    to_scores = weights.astype(jnp.float32) * (to_weights - jnp.moveaxis(through_sum, 1, -1)[..., None])
    if mask is not None:  # matters where a row sees no key at all: elsewhere the weight is 0
        to_scores = jnp.where(mask[:, None, None], to_scores, 0.0)
    to_scores = (to_scores * q.shape[-1] ** -0.5).astype(q.dtype)
    to_q = jnp.einsum("BKGTS,BSKH->BTKGH", to_scores, k, **options)
    to_k = jnp.einsum("BKGTS,BTKGH->BSKH", to_scores, q, **options)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


def _in_float32(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """`function` rounded once, as PyTorch's kernels do: in bfloat16 its inner steps would each round."""
    return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    # PyTorch's form. With that of jax.nn, by erfc, the towers' step is estimated 5 to 10% longer on TPUs.
    "gelu": _in_float32(lambda x: 0.5 * x * (1 + jax.lax.erf(x * np.float32(0.5**0.5)))),
    "quick_gelu": _in_float32(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "silu": _in_float32(jax.nn.silu),
}


def save_name(x: Array, name: str) -> Array:
    """Marks an activation that a remat policy may keep; `name` is of SAVEABLE, or "statistics"."""
    return checkpoint_name(x, name)


def scan_layers(body: Callable[[Any, Array], Array], x: Array, layers: Any, remat: str = "none") -> Array:
    """Runs a stack of layers: `x = body(layer, x)` for each slice of `layers` along its leading axis.

    The body returns activations only: returning parameters makes XLA copy the whole stack.
    """

    def step(carry, scanned):
        layer, *key = scanned
        with dropout_key(key[0] if key else None):
            return shard_rows(body(layer, shard_rows(carry))), None

    policy = remat_policy(remat)
    keys = layer_keys(jax.tree.leaves(layers)[0].shape[0])
    if policy is not None:
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    return scan_stack(step, x, layers, *([] if keys is None else [keys]))[0]


def scan_stack(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Any, *others: Any) -> tuple[Any, Any]:
    """`jax.lax.scan(step, carry, (layers, *others))`; or, over layers that `unstack` made, a loop of Python's.

    There what is scanned beside the layers, and what the steps return, are lists of one entry per layer.
    """
    if not isinstance(layers, nnx.List | list):
        return jax.lax.scan(step, carry, (layers, *others))
    outputs = []
    for i, layer in enumerate(layers):
        carry, output = step(carry, (layer, *(_entry(other, i) for other in others)))
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: list(leaves), *outputs)


def _entry(tree: Any, i: int) -> Any:
    """Entry i of every list in `tree`."""
    return jax.tree.map(lambda x: x[i], tree, is_leaf=lambda x: isinstance(x, list))


def unstack(layers: nnx.Module) -> nnx.List:
    """The layers of a stack as modules with arrays of their own; those of the stack are deleted one by one.

    A scan copies each layer's parameters out of the stack before a CPU's products, which with few tokens takes longer
    than these. Without the stack the program is as long as the model is deep, and so is its compilation.
    """
    leaves, structure = jax.tree.flatten(layers)
    parts = []
    for leaf in leaves:
        parts.append(jax.block_until_ready([leaf[i] for i in range(leaf.shape[0])]))
        leaf.delete()
    return nnx.List([jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)])
