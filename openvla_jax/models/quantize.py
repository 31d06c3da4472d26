"""Weight-only quantisation: kernels as int8 per output channel, or as int4 in groups of input rows.

A `QTensor` stands where a `Linear` has its kernel, or an `Embedding` its table; on a CPU a `BlockedQTensor` takes its
place. Activations, norms and biases stay as they are. Scales are symmetric (no zero point) and bfloat16;
the integers are rounded against the rounded scales.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from openvla_jax.config import nearest
from openvla_jax.errors import InputError

# Kind -> (dtype of the integers, largest magnitude, input rows that share a scale; None: all of them).
KINDS: dict[str, tuple[Any, int, int | None]] = {"int8": (jnp.int8, 127, None), "int4": (jnp.int4, 7, 128)}

# Path prefixes that keep full precision: the towers, whose activations have outliers, and the two vocabulary tables.
EXCLUDE = ("vision", "llama/embed", "llama/head")
_NAMES = ("kernel", "table")
MAX_BLOCK = 256  # input rows that a CPU converts at a time


class QTensor(nnx.Module):
    """`values * scale`: values int8 or int4 [..., in, out], scale bfloat16 [..., groups, out], groups of equal size."""

    def __init__(self, values: nnx.Param, scale: nnx.Param):
        self.values, self.scale = values, scale

    def matmul(self, x: Float[Array, "... i"], precision=None, preferred_element_type=None) -> Array:
        """`x @ kernel` in the dtype of `x`, accumulated in float32 or better by the device.

        Per channel the scale comes after the product. Groups are scaled before it: the compilers of accelerators fuse
        that into the product's operand, so that only the integers are read from memory.
        """
        if self.scale.shape[-2] == 1:
            y = jnp.matmul(x, self.values[...].astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
            y = y * self.scale[...][..., 0, :].astype(jnp.float32)
            return y.astype(preferred_element_type or x.dtype)
        kernel = self.dequantize(x.dtype)
        return jnp.matmul(x, kernel, precision=precision, preferred_element_type=preferred_element_type)

    def dequantize(self, dtype) -> Float[Array, "... i o"]:
        return scaled(self.values[...], self.scale[...], dtype)

    @property
    def kind(self) -> str:
        return str(self.values.dtype)

    def blocked(self) -> "QTensor | BlockedQTensor":
        """For products on a CPU; itself where its rows do not make up blocks."""
        values, groups = self.values[...], self.scale.shape[-2]
        size = values.shape[0] // groups
        if values.dtype == jnp.int4:
            if size % 2:
                return self
            halves = values.astype(jnp.uint8).reshape(groups, 2, size // 2, -1)
            packed = (halves[:, 0] & 15) | (halves[:, 1] << 4)
            return BlockedQTensor(nnx.Param(packed.reshape(-1, values.shape[1])), self.scale, size)
        rows = next(n for n in range(min(MAX_BLOCK, size), 0, -1) if size % n == 0)
        return BlockedQTensor(self.values, self.scale, rows) if 8 * rows >= min(MAX_BLOCK, size) else self

    def rows(self, ids: Int[Any, "..."], dtype) -> Float[Array, "... o"]:
        """`kernel[ids]` without the other rows."""
        group_size = self.values.shape[-2] // self.scale.shape[-2]
        return self.values[...][ids].astype(dtype) * self.scale[...][ids // group_size].astype(dtype)


class BlockedQTensor(nnx.Module):
    """A QTensor's kernel or table [in, out] for a CPU, whose matmul dequantises one block of input rows at a time.

    A CPU's compiler writes a whole converted kernel to fresh memory first, which takes longer than reading it and
    multiplying with few rows. `values` are int8 [in, out], or the int4 of two rows in a uint8 [in / 2, out]: a block is
    then a group, the low bits are its first half.
    """

    def __init__(self, values: nnx.Param, scale: nnx.Param, block: int):
        self.values, self.scale, self.block = values, scale, block

    @property
    def kind(self) -> str:
        return "int4" if self.values.dtype == jnp.uint8 else "int8"

    def matmul(self, x: Float[Array, "... i"], precision=None, preferred_element_type=None) -> Array:
        """`x @ kernel` in the dtype of `x`, multiplied and added up in float32."""
        values, scale, rows = self.values[...], self.scale[...].astype(jnp.float32), self.block
        packed = values.dtype == jnp.uint8
        stored = rows // 2 if packed else rows
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        dot = lambda x, w: jnp.matmul(x, w.astype(jnp.float32), precision=precision)

        def add(block: Array, total: Array) -> Array:
            inputs = jax.lax.dynamic_slice_in_dim(flat, block * rows, rows, axis=1)
            part = jax.lax.dynamic_slice_in_dim(values, block * stored, stored)
            if not packed:
                return total + dot(inputs, part)
            low, high = dot(inputs[:, :stored], _high_bits(part << 4)), dot(inputs[:, stored:], _high_bits(part))
            return total + (low + high) * scale[block]

        total = jnp.zeros((flat.shape[0], values.shape[1]), jnp.float32)
        total = jax.lax.fori_loop(0, flat.shape[1] // rows, add, total)
        y = total if packed else total * scale[0]
        return y.reshape(*x.shape[:-1], -1).astype(preferred_element_type or x.dtype)

    def rows(self, ids: Int[Any, "..."], dtype) -> Float[Array, "... o"]:
        """`kernel[ids]` without the other rows."""
        values, scale = self.values[...], self.scale[...].astype(dtype)
        if values.dtype != jnp.uint8:
            return values[ids].astype(dtype) * scale[0]
        group, row, half = ids // self.block, ids % self.block, self.block // 2
        pair = values[group * half + row % half]
        return _high_bits(jnp.where((row < half)[..., None], pair << 4, pair)).astype(dtype) * scale[group]


def _high_bits(pairs: Array) -> Array:
    """The second int4 of each uint8, as int8."""
    return jax.lax.bitcast_convert_type(pairs, jnp.int8) >> 4


def scaled(values: Array, scale: Array, dtype) -> Array:
    """Values [..., in, out] times their groups' scales [..., groups, out]."""
    *lead, rows, columns = values.shape
    grouped = values.reshape(*lead, scale.shape[-2], -1, columns).astype(dtype)
    return (grouped * scale[..., None, :].astype(dtype)).reshape(*lead, rows, columns)


def group_size(rows: int, kind: str) -> int:
    """Input rows that share a scale: the largest divisor of `rows` up to the kind's group (128 in every 7B kernel)."""
    limit = KINDS[kind][2]
    if limit is None:
        return rows
    return next(size for size in range(min(limit, rows), 0, -1) if rows % size == 0)


def quantize_array(kernel: Float[Array, "*lead i o"], kind: str) -> tuple[Array, Array]:
    """(values, scale) of a kernel, layer by layer if it is stacked, so that no float32 copy of the whole is made."""
    if kernel.ndim > 2:
        return jax.lax.map(lambda layer: quantize_array(layer, kind), kernel)
    dtype, largest, _ = KINDS[kind]
    rows, columns = kernel.shape
    grouped = kernel.astype(jnp.float32).reshape(-1, group_size(rows, kind), columns)
    scale = (jnp.abs(grouped).max(axis=1) / largest).astype(jnp.bfloat16)
    divisor = jnp.where(scale == 0, 1, scale).astype(jnp.float32)[:, None]  # a group of zeros stays zeros
    values = jnp.clip(jnp.round(grouped / divisor), -largest, largest)
    return values.reshape(rows, columns).astype(dtype), scale


def choose_paths(model: nnx.Module, exclude: Sequence[str] = EXCLUDE) -> list[str]:
    """Paths of the kernels and tables that are quantised: all but those below a path in `exclude`."""
    paths = ["/".join(map(str, path)) for path, _ in _kernels(model)]
    for name in exclude:
        if not any(_below(path, name) for path in paths):
            known = sorted({path.rsplit("/", depth)[0] for path in paths for depth in range(1, path.count("/") + 1)})
            raise InputError(
                f"exclude {name!r} names no part of the model that could be quantised; {nearest(name, known)}"
            )
    return [path for path in paths if not any(_below(path, name) for name in exclude)]


def quantize_model(model: nnx.Module, kind: str, paths: Sequence[str]) -> nnx.Module:
    """Replaces the kernels at `paths` by QTensors, in place; under `jax.eval_shape` it makes the abstract model."""
    check_kind(kind)
    chosen = set(paths)
    for path, (module, name) in list(_kernels(model)):
        if "/".join(map(str, path)) in chosen:
            kernel = getattr(module, name)
            axes = kernel.get_metadata()["axes"]
            values, scale = quantize_array(kernel[...], kind)
            scale_axes = (*axes[:-2], "groups", axes[-1])
            setattr(module, name, QTensor(nnx.Param(values, axes=axes), nnx.Param(scale, axes=scale_axes)))
    return model


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"unknown quantisation {kind!r}; {nearest(kind, KINDS)}")


def count_bytes(tree: Any) -> int:
    """Returns the bytes of a tree's arrays or shape structs in a device's memory, in which two int4 share a byte."""
    bits = lambda leaf: 4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize
    return sum(-(-leaf.size * bits(leaf) // 8) for leaf in jax.tree.leaves(tree))


def _kernels(model: nnx.Module):
    """((path, (module, attribute)), ...) of every kernel and table."""
    for path, module in nnx.iter_modules(model):
        for name in _NAMES:
            if isinstance(getattr(module, name, None), nnx.Param):
                yield (*path, name), (module, name)


def _below(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}/")
