"""Sharding constraints on activations and weights, for the places where the compiler alone chooses badly.

Every function takes the mesh of an `Execution` and does nothing special without one.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

ROWS = ("data", "fsdp")  # the mesh's axes over which a batch is split


def shard_rows(x: Array, mesh: Mesh | None) -> Array:
    """Constrains an activation to be sharded along its batch axis.

    Left alone, the compiler may gather the whole batch to match the shards of a kernel, which no memory holds.
    No constraint with a tensor axis: on a 2x2x2 mesh gradients were wrong (jax 0.10.2).
    """
    if mesh is None or mesh.shape["tensor"] > 1:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS, *free)))


def fsdp_enabled(mesh: Mesh | None) -> bool:
    """Returns whether weights are sharded over `fsdp` and gathered for use."""
    return mesh is not None and mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] == 1


def all_gather_weights(x: Array, mesh: Mesh | None) -> Array:
    """Constrains a layer's weights to be replicated on every chip, at the place of use.

    Weights stored as float32 and used as bfloat16 need no constraint: the compiler gathers them once for each use.
    Frozen weights are stored as they are used. For these it permutes pieces of weights and activations instead, which
    sends many times the bytes. No constraint with a tensor axis, as in `shard_rows`.
    """
    if mesh is None or not fsdp_enabled(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def embedding_lookup(table: Array, ids: Array, dtype, mesh: Mesh | None) -> Array:
    """Returns rows [B, T, D] of a table [V, D], in `dtype`.

    The cast follows the lookup, so that a chip accumulates the gradient in float32. In bfloat16 a token seen 4096 times
    would count 256 times. Between chips the gradient is sent in `dtype`, like those of matrix products, and each chip
    receives its own part of the table. The compiler alone would send the whole table in float32 to every chip.
    """
    if mesh is None or not fsdp_enabled(mesh) or table.shape[1] % mesh.shape["fsdp"]:
        return table[ids].astype(dtype)
    # Keep the gathered rows flat, [B*T, D], while they move to the data shards. With separate B and T axes XLA inserts
    # copies on both sides, and the program is 20 times longer.
    rows = shard_rows(_embedding_lookup(mesh, jnp.dtype(dtype), table, ids.reshape(-1)), mesh)
    return rows.reshape(*ids.shape, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _embedding_lookup(mesh: Mesh, dtype, table: Array, ids: Array) -> Array:
    return table[ids].astype(dtype)


def _embedding_lookup_forward(mesh: Mesh, dtype, table: Array, ids: Array) -> tuple[Array, tuple[Array, int]]:
    return _embedding_lookup(mesh, dtype, table, ids), (ids, table.shape[0])


def _embedding_lookup_backward(mesh: Mesh, dtype, residuals: tuple[Array, int], gradient: Array) -> tuple[Array, None]:
    ids, size = residuals

    def on_each_chip(ids: Array, gradient: Array) -> Array:
        rows = jnp.zeros((size, gradient.shape[-1]), jnp.float32).at[ids].add(gradient.astype(jnp.float32))
        part = jax.lax.psum_scatter(rows.astype(dtype).T, "fsdp", scatter_dimension=0, tiled=True)
        return jax.lax.psum(part.astype(jnp.float32), "data").T

    split = PartitionSpec(ROWS)
    summed = jax.shard_map(on_each_chip, mesh=mesh, in_specs=(split, split), out_specs=PartitionSpec(None, "fsdp"))
    return summed(ids, gradient), None


_embedding_lookup.defvjp(_embedding_lookup_forward, _embedding_lookup_backward)


def fsdp_matmul(x: Array, weights: Array, by_outputs: bool, mesh: Mesh | None, result_dtype=None) -> Array:
    """Returns `x @ weights` for weights [in, out] that are sharded by outputs (`by_outputs`) or by inputs.

    The weights' gradient is sent between chips in their own dtype. It is computed with the sharded dimension first, so
    that each chip's part is contiguous. Otherwise some compilers make no reduce-scatter, but send all of it to every
    chip.
    """
    if mesh is None or not fsdp_enabled(mesh) or weights.shape[by_outputs] % mesh.shape["fsdp"]:
        return jnp.matmul(x, weights, preferred_element_type=result_dtype)
    return _fsdp_matmul(mesh, by_outputs, result_dtype, x, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fsdp_matmul(mesh: Mesh, by_outputs: bool, result_dtype, x: Array, weights: Array) -> Array:
    return jnp.matmul(x, weights, preferred_element_type=result_dtype)


def _fsdp_matmul_forward(mesh: Mesh, by_outputs: bool, result_dtype, x: Array, weights: Array):
    return _fsdp_matmul(mesh, by_outputs, result_dtype, x, weights), (x, weights)


def _fsdp_matmul_backward(mesh: Mesh, by_outputs: bool, result_dtype, residuals: tuple[Array, Array], gradient: Array):
    x, weights = residuals
    gradient = gradient.astype(weights.dtype)  # a TPU's matrix unit would cast it anyway
    to_weights = jnp.einsum("...o,...i->oi" if by_outputs else "...o,...i->io", gradient, x)
    to_weights = jax.lax.with_sharding_constraint(to_weights, NamedSharding(mesh, PartitionSpec("fsdp")))
    return jnp.matmul(gradient, weights.T), to_weights.T if by_outputs else to_weights


_fsdp_matmul.defvjp(_fsdp_matmul_forward, _fsdp_matmul_backward)
