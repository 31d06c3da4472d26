"""Linear layers, and how parameters are made.

Einsum letters, here and everywhere: B batch, T query position, S key position, N heads, K key/value heads, G query
heads per key/value head, H head dim, D model width, F mlp width, V vocabulary, L layers, P patches.

Parameters are `nnx.Param`s with logical axis names in their metadata (`axes`); `parallel/sharding.py` maps these to
the mesh. Blocks are created *stacked*: `layers=L` gives every parameter a leading axis L, and `stack.scan_layers`
runs the stack with one `lax.scan`, so that compile time does not grow with depth. Modules are used as plain pytrees
under jax's own transforms.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from openvla_jax.models.lora import LoRA
from openvla_jax.models.quantize import BlockedQTensor, QTensor
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.placement import all_gather_weights, fsdp_enabled, fsdp_matmul

Kernel = nnx.Param | QTensor | BlockedQTensor


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
    x: Float[Array, "... i"],
    kernel: Kernel,
    execution: Execution,
    preferred_element_type=None,
    scale: Float[Array, "o"] | None = None,
) -> Float[Array, "... o"]:
    """Returns `x @ kernel` in the dtype of `x`, whatever the kernel is stored as.

    `scale` multiplies the kernel's columns; only for a kernel that `is_rounded`.
    """
    precision = matmul_precision(x.dtype)
    if isinstance(kernel, QTensor | BlockedQTensor):
        return kernel.matmul(x, precision, preferred_element_type)
    stored = kernel[...] if scale is None else kernel[...] * scale
    return _matmul(x, stored, kernel.axes[-1] == "embed", execution, preferred_element_type)


def _matmul(x: Array, stored: Array, by_outputs: bool, execution: Execution, preferred_element_type=None) -> Array:
    """Returns `x @ stored` for an array that is sharded by outputs (`by_outputs`) or by inputs."""
    precision = matmul_precision(x.dtype)
    product = partial(jnp.matmul, precision=precision, preferred_element_type=preferred_element_type)
    if stored.dtype != x.dtype:
        weights = stored.astype(x.dtype)
        if precision is None and (by_outputs or preferred_element_type is not None):
            return fsdp_matmul(x, weights, by_outputs, execution.mesh, preferred_element_type)
        return product(x, weights)
    if fsdp_enabled(execution.mesh):
        # The backward pass then keeps this chip's shard instead of the gathered weights.
        gathered = lambda x, weights: product(x, all_gather_weights(weights, execution.mesh))
        return jax.checkpoint(gathered, prevent_cse=False)(x, stored)
    return product(x, stored)


def apply_row_parameter(
    function: Callable[[Array, Array], Array], x: Float[Array, "... D"], row: nnx.Param | Array
) -> Array:
    """Returns `function(x, row)` of a parameter [D], as if both were in the dtype of `x`.

    It is computed in float32, with the same result, so that the gradient of `row` is summed and kept in float32. A sum
    of thousands in bfloat16 loses most of its terms.
    """
    exact = row[...].astype(jnp.float32)
    rounded = exact + jax.lax.stop_gradient(exact.astype(x.dtype).astype(jnp.float32) - exact)
    return function(x.astype(jnp.float32), rounded).astype(x.dtype)


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, kernel [in, out] (transposed against PyTorch), computed in the dtype of `x`.

    `lora` is the adapter beside the kernel, or None (`models/tuning.py`).
    """

    kernel: Kernel
    lora: LoRA | None

    def __init__(
        self,
        key,
        in_features: int,
        out_features: int,
        axes,
        *,
        bias: bool,
        layers: int | None = None,
        init_scale: float | None = None,
    ):
        lead, lead_axes = stack_shape(layers)
        scale = in_features**-0.5 if init_scale is None else init_scale
        self.kernel = make_param(key, (*lead, in_features, out_features), (*lead_axes, *axes), scale=scale)
        self.bias = make_param(None, (*lead, out_features), (*lead_axes, axes[-1]), value=0.0) if bias else None
        self.lora = nnx.data(None)

    def __call__(
        self,
        x: Float[Array, "... i"],
        execution: Execution,
        preferred_element_type=None,
        scale: nnx.Param | None = None,
    ) -> Float[Array, "... o"]:
        """Returns the layer's output, times `scale` [o] if there is one.

        If the kernel is rounded for use, `scale` is multiplied into it. Its gradient then follows from the kernel's,
        and the backward pass does not need the unscaled output again.
        """
        folded = None
        if scale is not None and self.lora is None and is_rounded(self.kernel, x.dtype):
            folded = scale[...].astype(jnp.float32)
        y = matmul(x, self.kernel, execution, preferred_element_type, folded)
        if self.lora is not None:
            y = y + self.lora(x, execution, matmul_precision(x.dtype)).astype(y.dtype)
        if self.bias is not None:
            y = apply_row_parameter(jnp.add, y, self.bias if folded is None else self.bias[...] * folded)
        return y if scale is None or folded is not None else apply_row_parameter(jnp.multiply, y, scale)


def merged(x: Float[Array, "... i"], layers: Sequence[Linear], execution: Execution) -> Float[Array, "... o"]:
    """Returns the outputs of several layers side by side, by one product if no kernel is quantised.

    The layers must be sharded by inputs and carry no adapters of their own.
    """
    kernels = [layer.kernel[...] for layer in layers if isinstance(layer.kernel, nnx.Param)]
    if len(kernels) < len(layers):
        return jnp.concatenate([layer(x, execution) for layer in layers], axis=-1)
    assert all(layer.lora is None for layer in layers)
    y = _matmul(x, jnp.concatenate(kernels, axis=-1), by_outputs=False, execution=execution)
    biases = [layer.bias[...] for layer in layers if layer.bias is not None]
    return apply_row_parameter(jnp.add, y, jnp.concatenate(biases, axis=-1)) if biases else y
