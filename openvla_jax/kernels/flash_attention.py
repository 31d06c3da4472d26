"""Self-attention of short sequences as a TPU kernel: scores never leave the chip's fast memory.

Written in Pallas for a policy's sequences of a few hundred positions. All keys of a head lie beside its queries, so the
softmax needs no running maximum, what causality hides is left out, and queries and keys are rotated on the way in.
Libraries' kernels (jax's splash attention) are made for thousands of positions: lengths and heads that are no multiples
of 128 have to be padded for them, scores among them.

Scores stand transposed, [S, T]: maximum and sum over keys run down the registers instead of across them, and the
logarithm of the sum, all that the backward pass needs besides the inputs, lies along lanes. One program takes several
heads, and each step of all of them before the next: a TPU's units would wait for each other within a single head.

Letters as in `layers`: B batch, T query position, S key position, N heads, H head dim.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from openvla_jax.parallel.placement import ROWS

LANES = 128  # of a register; queries and keys are taken in blocks of as many
_SUBLANES = 16  # of a register of bfloat16
_BUFFERS = 4  # of scores' gradients in float32, taken in turn by the heads
_VMEM = {"TPU v4": 13 * 2**20}  # bytes that a program may take; elsewhere:
_VMEM_ELSEWHERE = 40 * 2**20
_SPILLS = 3 * 2**20  # what the compiler needs beside
_LOWEST = float(np.finfo(np.float32).min)
_HIDDEN = -1e30  # added to the score of a hidden key, whose weight is zero then
_TRANSPOSED = (((1,), (1,)), ((), ()))  # dimensions of a product with the second operand transposed

Angles = tuple[Array, Array]


class _Shape(NamedTuple):
    """Of one program: all positions of `heads` heads, which fill whole lanes."""

    length: int
    heads: int
    dim: int
    causal: bool
    masked: bool  # whether some keys are hidden from all queries
    interpreted: bool

    @property
    def keys(self) -> int:
        return _round_up(self.length, _SUBLANES)

    @property
    def queries(self) -> int:
        return _round_up(self.length, LANES)

    @property
    def scale(self) -> float:
        return self.dim**-0.5

    @property
    def log2_scale(self) -> float:
        """scale * log2(e): the softmax is computed in base 2."""
        return self.scale * math.log2(math.e)

    def lanes(self, head: int) -> slice:
        return slice(head * self.dim, (head + 1) * self.dim)

    def read(self, refs: Sequence[Any], part: int, head: int) -> Array:
        """A head's queries (part 0), keys (1) or values (2), which lie in a ref of their own or all in one."""
        ref, lanes = self._place(refs, part, head)
        return ref[0, : self.keys, lanes]

    def write(self, refs: Sequence[Any], part: int, head: int, rows: slice, x: Array) -> None:
        """Writes one head's rows into the ref that `read` reads from."""
        ref, lanes = self._place(refs, part, head)
        ref[0, rows, lanes] = x

    def _place(self, refs: Sequence[Any], part: int, head: int) -> tuple[Any, slice]:
        if len(refs) == 1:
            return refs[0], self.lanes(part * self.heads + head)
        return refs[part], self.lanes(head)

    def blocks(self) -> Iterator[tuple[slice, list[slice]]]:
        """Blocks of queries, each with the blocks of keys that it sees."""
        for first in range(0, self.queries, LANES):
            seen = min(first + LANES, self.keys) if self.causal else self.keys
            yield slice(first, first + LANES), [slice(i, min(i + LANES, seen)) for i in range(0, seen, LANES)]

    def product(self, a: Array, b: Array, dimensions: Any = (((1,), (0,)), ((), ()))) -> Array:
        """Returns the matrix product accumulated in float32."""
        if self.interpreted:  # not every version of XLA's CPU compiler multiplies bfloat16 into float32
            a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)

    def scratch(self, dtype, backward: bool) -> list[Any]:
        """Queries and keys by heads, rotated; values; in a backward pass the gradient and keys transposed; weights; and
        what else goes from step to step.
        """
        rows, across = (self.heads, self.queries, self.dim), (self.heads, self.dim, self.keys)
        keys, weights = (self.heads, self.keys, self.dim), (self.heads, self.keys, self.queries)
        if not backward:
            return [pltpu.VMEM(x, dtype) for x in (rows, keys, across, weights)] + [
                pltpu.VMEM((self.heads, 1, self.queries), jnp.float32)
            ]
        return [pltpu.VMEM(x, dtype) for x in (rows, keys, keys, rows, across, weights, weights)] + [
            pltpu.VMEM((min(self.heads, _BUFFERS), self.keys, LANES), jnp.float32)
        ]

    @property
    def vmem_bytes(self) -> int:
        """Of the backward pass: two buffers for each operand and result, and the scratch."""
        operands = 2 * 7 * self.queries * self.heads * self.dim * 2 + 2 * self.masked * self.keys * LANES * 4
        # Lanes are filled up to whole registers.
        return operands + sum(
            math.prod(x.shape[:-1]) * _round_up(x.shape[-1], LANES) * jnp.dtype(x.dtype).itemsize
            for x in self.scratch(jnp.bfloat16, backward=True)
        )


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def _program(x: Array, heads: int, dim: int, causal: bool, masked: bool, device: jax.Device) -> _Shape | None:
    """What one program works on; None if no whole number of heads fills lanes and fits the memory."""
    shapes = [
        _Shape(x.shape[1], n, dim, causal, masked, device.platform != "tpu")
        for n in range(1, heads + 1)
        if heads % n == 0 and n * dim % LANES == 0
    ]
    fitting = [shape for shape in shapes if shape.vmem_bytes <= _VMEM.get(device.device_kind, _VMEM_ELSEWHERE)]
    # More heads together than eight registers hold gain nothing and take long to compile.
    return max((s for s in fitting if s.heads * dim <= 8 * LANES), default=min(fitting, default=None))


def fits(x: Float[Array, "B T D"], heads: int, rotated: bool, masked: bool, mesh: Mesh) -> bool:
    """Whether `flash_attention` takes projections of this shape and dtype on the chips of `mesh`."""
    dim = x.shape[-1] // heads
    if x.dtype != jnp.bfloat16 or (rotated and dim != LANES):
        return False
    return _program(x, heads, dim, False, masked, mesh.devices.flat[0]) is not None


def takes_merged(x: Float[Array, "B T D"], heads: int, mesh: Mesh) -> bool:
    """Whether `flash_attention` takes queries, keys and values of this shape side by side: with all heads at once."""
    shape = _program(x, heads, x.shape[-1] // heads, False, False, mesh.devices.flat[0])
    return shape is not None and shape.heads == heads


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def flash_attention(
    qkv: tuple[Array, ...],
    angles: Angles | None,
    keys: Bool[Array, "B T"] | None,
    heads: int,
    causal: bool,
    mesh: Mesh,
) -> Float[Array, "B T D"]:
    """Attention of projections D = N H of a whole sequence, each row of the batch on the chip that holds it.

    `qkv`: queries, keys and values [B, T, D]; or, if `takes_merged` returns true, one array [B, T, 3 D] of them.
    `angles`: cosine and sine [T, H] by which queries and keys are rotated, the sine negative in its first half; None
    for none. `keys`: which positions may be attended to; None for all. Softmax and sums are float32. A remat policy may
    keep the result, named "attention", and the logarithms of the sums, "statistics". Only if `fits` says so.
    """
    return _forward(qkv, angles, keys, heads, causal, mesh)[0]


def _forward(qkv, angles, keys, heads, causal, mesh):
    run = _call(_forward_kernel, "flash_attention", qkv, heads, causal, keys is not None, mesh)
    mixed, sums = run(qkv, _biases(keys), angles or ())
    return checkpoint_name(mixed, "attention"), (qkv, angles, keys, checkpoint_name(sums, "statistics"))


def _backward(heads, causal, mesh, residuals, gradient):
    qkv, angles, keys, sums = residuals
    run = _call(_backward_kernel, "flash_attention_backward", qkv, heads, causal, keys is not None, mesh)
    return run(qkv, (*_biases(keys), gradient, sums), angles or ()), None, None


def _biases(keys: Bool[Array, "B T"] | None) -> tuple[Array, ...]:
    """What is added to the scores [B, T, 1] of keys; nothing without hidden ones."""
    return () if keys is None else (jnp.where(keys, 0.0, _HIDDEN)[..., None],)


flash_attention.defvjp(_forward, _backward)


def _call(kernel, name: str, qkv: Sequence[Array], heads: int, causal: bool, masked: bool, mesh: Mesh) -> Callable:
    """The kernel as a function of (qkv, what else has rows, angles), run by each chip on its own rows."""
    device = mesh.devices.flat[0]
    width = qkv[0].shape[-1] * len(qkv) // 3
    dim = width // heads
    shape = _program(qkv[0], heads, dim, causal, masked, device)
    assert shape is not None, "ask `fits` first"
    backward = kernel is _backward_kernel
    row = pl.BlockSpec((1, shape.queries, shape.heads * dim), lambda b, n: (b, 0, n))
    projections = [row] * 3
    if len(qkv) == 1:
        projections = [pl.BlockSpec((1, shape.queries, 3 * width), lambda b, n: (b, 0, 0))]
    sums = pl.BlockSpec((1, shape.heads, 1, shape.queries), lambda b, n: (b, n, 0, 0))
    biases = [pl.BlockSpec((1, shape.keys, 1), lambda b, n: (b, 0, 0))] * masked
    angle = pl.BlockSpec((shape.keys, dim), lambda b, n: (0, 0))
    limit = _VMEM.get(device.device_kind, _VMEM_ELSEWHERE) + _SPILLS

    def run(qkv: Sequence[Array], given: Sequence[Array], angles: Sequence[Array]):
        batch, length, _ = qkv[0].shape
        grid = (batch, heads // shape.heads)
        like = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv)
        mixed = jax.ShapeDtypeStruct((batch, length, width), qkv[0].dtype)
        logarithms = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
        return pl.pallas_call(
            partial(kernel, shape=shape, projections=len(qkv)),
            grid=grid,
            in_specs=[*projections, *biases, *[row, sums] * backward, *[angle] * len(angles)],
            out_specs=tuple(projections) if backward else [row, sums],
            out_shape=like if backward else [mixed, logarithms],
            scratch_shapes=shape.scratch(qkv[0].dtype, backward),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=limit),
            interpret=shape.interpreted,
            name=name,
            metadata={"programs": str(math.prod(grid))},  # the compiler's text does not say (planning/hlo.py)
        )(*qkv, *given, *angles)

    split, whole = PartitionSpec(ROWS), PartitionSpec()
    return jax.shard_map(run, mesh=mesh, in_specs=(split, split, whole), out_specs=split, check_vma=False)


# ---------------------------------------------------------------------------------------------------------------------
# Inside a program
# ---------------------------------------------------------------------------------------------------------------------


def _forward_kernel(*refs, shape: _Shape, projections: int):
    qkv, refs = refs[:projections], refs[projections:]
    biases, refs = refs[: shape.masked], refs[shape.masked :]
    *angles, out_ref, sums_ref, q, k, v_across, weights_ref, inverse_ref = refs
    _load_rotated(qkv, angles, q, k, shape)
    for head in range(shape.heads):
        v_across[head] = _transposed(zero_padding(shape.read(qkv, 2, head), 0, shape.length))
    for queries, seen in shape.blocks():
        keys = slice(0, seen[-1].stop)
        for head in range(shape.heads):
            scores = add_biases(
                shape.product(k[head, keys], q[head, queries], _TRANSPOSED), keys, biases, shape
            )  # [S, T]
            scores = jnp.concatenate([mask_scores(scores[part], part, queries, shape, _LOWEST) for part in seen])
            largest = scores.max(axis=0, keepdims=True)
            weights = jnp.exp2((scores - largest) * shape.log2_scale)
            total = weights.sum(axis=0, keepdims=True)
            weights_ref[head, keys, queries] = weights.astype(weights_ref.dtype)
            inverse_ref[head, :, queries] = 1 / total
            sums_ref[0, head, :, queries] = largest * shape.log2_scale + jnp.log2(total)
    for queries, seen in shape.blocks():
        keys = slice(0, seen[-1].stop)
        for head in range(shape.heads):
            mixed = shape.product(v_across[head, :, keys], weights_ref[head, keys, queries])  # [H, T]
            mixed = mixed * inverse_ref[head, :, queries]
            out_ref[0, queries, shape.lanes(head)] = mixed.T.astype(out_ref.dtype)


def _backward_kernel(*refs, shape: _Shape, projections: int):
    qkv, given = refs[:projections], refs[projections : -8 - projections]
    biases, (gradient_ref, sums_ref, *angles) = given[: shape.masked], given[shape.masked :]
    to_qkv = refs[-8 - projections : -8]
    q, k, v, gradient, k_across, weights_ref, to_scores_ref, to_weights_ref = refs[-8:]
    dtype = q.dtype
    _load_rotated(qkv, angles, q, k, shape)
    for head in range(shape.heads):
        k_across[head] = _transposed(k[head])
        v[head] = zero_padding(shape.read(qkv, 2, head), 0, shape.length)
        gradient[head] = zero_padding(gradient_ref[0, :, shape.lanes(head)], 0, shape.length)

    def rotated_back(x, at: slice):
        if not angles:
            return x.astype(dtype)
        cos, sin = (ref[at].astype(jnp.float32) for ref in angles)
        # Rounded before as well, as the gradient of rotated queries and keys is without a kernel.
        return _rotate(x.astype(dtype).astype(jnp.float32), cos, -sin).astype(dtype)

    for queries, seen in shape.blocks():
        keys = slice(0, seen[-1].stop)
        for head in range(shape.heads):
            sums = sums_ref[0, head, :, queries]
            if queries.stop > shape.length:
                query = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 1)
                sums = jnp.where(query < shape.length - queries.start, sums, 0.0)
            to_weights_buffer = to_weights_ref.at[head % _BUFFERS]
            through_sum = jnp.zeros_like(sums)
            for part in seen:
                scores = add_biases(
                    shape.product(k[head, part], q[head, queries], _TRANSPOSED), part, biases, shape
                )  # [S, T]
                weights = mask_scores(jnp.exp2(scores * shape.log2_scale - sums), part, queries, shape, 0.0)
                to_weights = shape.product(v[head, part], gradient[head, queries], _TRANSPOSED)
                through_sum += (weights * to_weights).sum(axis=0, keepdims=True)
                weights_ref[head, part, queries] = weights.astype(dtype)
                to_weights_buffer[part] = to_weights
            for part in seen:
                weights = weights_ref[head, part, queries].astype(jnp.float32)
                to_scores_ref[head, part, queries] = (weights * (to_weights_buffer[part] - through_sum)).astype(dtype)
        there = slice(queries.start, min(queries.stop, shape.keys))
        for head in range(shape.heads):
            to_q = shape.product(k_across[head, :, keys], to_scores_ref[head, keys, queries]) * shape.scale  # [H, T]
            shape.write(to_qkv, 0, head, there, rotated_back(to_q.T[: there.stop - there.start], there))
    for first in range(0, shape.keys, LANES):
        keys = slice(first, min(first + LANES, shape.keys))
        seeing = slice(first if shape.causal else 0, shape.queries)
        for head in range(shape.heads):
            to_v = shape.product(weights_ref[head, keys, seeing], gradient[head, seeing])
            shape.write(to_qkv, 2, head, keys, to_v.astype(dtype))
            to_k = shape.product(to_scores_ref[head, keys, seeing], q[head, seeing]) * shape.scale
            shape.write(to_qkv, 1, head, keys, rotated_back(to_k, keys))


def _load_rotated(qkv, angles, q, k, shape: _Shape) -> None:
    """Queries and keys by heads, zeros behind the last position."""
    cos_and_sin = [ref[...].astype(jnp.float32) for ref in angles]
    for head in range(shape.heads):
        for part, to in enumerate((q, k)):
            x = shape.read(qkv, part, head)
            if cos_and_sin:
                x = _rotate(x.astype(jnp.float32), *cos_and_sin).astype(to.dtype)
            to[head, : shape.keys] = zero_padding(x, 0, shape.length)  # after the rotation: angles end there too
        if shape.queries > shape.keys:
            q[head, shape.keys :] = jnp.zeros((shape.queries - shape.keys, shape.dim), q.dtype)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """float32 [T, H]; turning the lanes by half of them exchanges the halves."""
    return x * cos + pltpu.roll(x, LANES // 2, 1) * sin


def zero_padding(x: Array, first: int, length: int) -> Array:
    """Replaces rows at and after position `length` by zeros; `first` is the position of row 0.

    Beyond the sequence a block holds whatever was in memory, NaN included.
    """
    if first + x.shape[0] <= length:
        return x
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(row < length - first, x, jnp.zeros_like(x))


def add_biases(x: Array, keys: slice, biases: Sequence[Any], shape: _Shape) -> Array:
    """Adds to scores [S, T] what hides keys from all queries, if anything does."""
    for ref in biases:
        x = x + zero_padding(ref[0, keys], keys.start, shape.length)
    return x


def mask_scores(x: Array, keys: slice, queries: slice, shape: _Shape, value: float) -> Array:
    """Replaces scores or weights [S, T] by `value` if the query must not attend to the key."""
    key = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    if shape.causal and keys.stop - 1 > queries.start:
        query = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        return jnp.where(key <= query + (queries.start - keys.start), x, value)
    if not shape.causal and keys.stop > shape.length:
        return jnp.where(key < shape.length - keys.start, x, value)
    return x


def _transposed(x: Array) -> Array:
    """Through float32, which every generation transposes."""
    return x.astype(jnp.float32).T.astype(x.dtype)
