"""Where a traced model's activations and weights lie on the mesh, said where the compiler's own choice is a bad one."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

ROWS = ("data", "fsdp")  # the mesh's axes over which a batch is split
_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)
_KERNELS: ContextVar[bool] = ContextVar("kernels", default=False)


@contextlib.contextmanager
def activations_sharded(mesh: Mesh, kernels: bool = False) -> Iterator[None]:
    """While a model is traced in here, `shard_rows` and `gathered` hold it to `mesh`, and with `kernels` layers may run
    as kernels of their own on its chips.
    """
    tokens = _MESH.set(mesh), _KERNELS.set(kernels)
    try:
        yield
    finally:
        _MESH.reset(tokens[0])
        _KERNELS.reset(tokens[1])


def kernel_mesh() -> Mesh | None:
    """The mesh of chips for which layers may be kernels of their own; None for layers that the compiler makes. With a
    tensor axis there are none: heads are then spread over chips.
    """
    mesh = _MESH.get()
    return mesh if mesh is not None and _KERNELS.get() and mesh.shape["tensor"] == 1 else None


def shard_rows(x: Array) -> Array:
    """Keeps an activation split along its batch axis. Left to itself the compiler may gather the batch to match a
    kernel's shards, which no memory holds. With a tensor axis it is left to itself: held so, its gradients came out
    wrong on 2 x 2 x 2 devices.
    """
    mesh = _MESH.get()
    if mesh is None or mesh.shape["tensor"] > 1:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(ROWS, *free)))


def gathered(x: Array) -> Array:
    """A layer's weights whole on every chip, where they are used.

    Weights that are stored as float32 and used as bfloat16 are gathered by the compiler's own choice, once for each
    use. With frozen ones, which are stored as they are used, it moves pieces of weights and activations round and round
    instead, many times the bytes. With a tensor axis it is left to itself, as in `shard_rows`.
    """
    mesh = _MESH.get()
    if mesh is None or not weights_are_spread():
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def weights_are_spread() -> bool:
    """Whether `gathered` does anything."""
    mesh = _MESH.get()
    return mesh is not None and mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] == 1


def take_rows(table: Array, ids: Array, dtype) -> Array:
    """Rows [B, T, D] of a table [V, D], in `dtype`.

    Rows first, then the cast: a chip's gradient adds up in float32, as in bfloat16 a token seen 4096 times counts 256.
    Between chips it goes in `dtype`, as those of products do, and each gets its part of the table only. The compiler
    alone sends all of it to all in float32. What is looked up moves to the chips of its examples as rows of tokens:
    with axes of its own for examples and tokens it is copied about before and after, by twenty times as long a program.
    """
    mesh = _MESH.get()
    if mesh is None or not weights_are_spread() or table.shape[1] % mesh.shape["fsdp"]:
        return table[ids].astype(dtype)
    rows = shard_rows(_take_rows(mesh, jnp.dtype(dtype), table, ids.reshape(-1)))
    return rows.reshape(*ids.shape, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take_rows(mesh: Mesh, dtype, table: Array, ids: Array) -> Array:
    return table[ids].astype(dtype)


def _take_rows_forward(mesh: Mesh, dtype, table: Array, ids: Array) -> tuple[Array, tuple[Array, int]]:
    return _take_rows(mesh, dtype, table, ids), (ids, table.shape[0])


def _take_rows_backward(mesh: Mesh, dtype, residuals: tuple[Array, int], gradient: Array) -> tuple[Array, None]:
    ids, size = residuals

    def on_each_chip(ids: Array, gradient: Array) -> Array:
        rows = jnp.zeros((size, gradient.shape[-1]), jnp.float32).at[ids].add(gradient.astype(jnp.float32))
        part = jax.lax.psum_scatter(rows.astype(dtype).T, "fsdp", scatter_dimension=0, tiled=True)
        return jax.lax.psum(part.astype(jnp.float32), "data").T

    split = PartitionSpec(ROWS)
    summed = jax.shard_map(on_each_chip, mesh=mesh, in_specs=(split, split), out_specs=PartitionSpec(None, "fsdp"))
    return summed(ids, gradient), None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def product(x: Array, weights: Array, by_outputs: bool, result_dtype=None) -> Array:
    """`x @ weights`, of weights [in, out] that are spread over chips by what goes in or by what comes out.

    Their gradient goes between chips in their own dtype, and is made with the dimension first by which they are spread:
    a chip's part then lies in one piece. Of parts of every row some compilers make no reduce-scatter, but send the
    whole to all.
    """
    mesh = _MESH.get()
    if mesh is None or not weights_are_spread() or weights.shape[by_outputs] % mesh.shape["fsdp"]:
        return jnp.matmul(x, weights, preferred_element_type=result_dtype)
    return _product(mesh, by_outputs, result_dtype, x, weights)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(mesh: Mesh, by_outputs: bool, result_dtype, x: Array, weights: Array) -> Array:
    return jnp.matmul(x, weights, preferred_element_type=result_dtype)


def _product_forward(mesh: Mesh, by_outputs: bool, result_dtype, x: Array, weights: Array):
    return _product(mesh, by_outputs, result_dtype, x, weights), (x, weights)


def _product_backward(mesh: Mesh, by_outputs: bool, result_dtype, residuals: tuple[Array, Array], gradient: Array):
    x, weights = residuals
    gradient = gradient.astype(weights.dtype)  # as a TPU's product takes it in any case
    to_weights = jnp.einsum("...o,...i->oi" if by_outputs else "...o,...i->io", gradient, x)
    to_weights = jax.lax.with_sharding_constraint(to_weights, NamedSharding(mesh, PartitionSpec("fsdp")))
    return jnp.matmul(gradient, weights.T), to_weights.T if by_outputs else to_weights


_product.defvjp(_product_forward, _product_backward)
