"""A checkpoint's model on one device or several: in full precision, or as integers that are made while it is read."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int
from orbax.checkpoint import v1 as ocp

from openvla_jax.checkpoint import checksums
from openvla_jax.checkpoint.base import abstract_weights, check_fingerprint, check_finite, open_base, read_base
from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.reading import (
    Files,
    check_tree,
    load_contract,
    load_params,
    open_checkpoint,
    read_leaves,
    stored_params,
)
from openvla_jax.config import VLAConfig
from openvla_jax.errors import InputError
from openvla_jax.models.openvla import OpenVLA, abstract_model
from openvla_jax.models.quantize import EXCLUDE, KINDS, check_kind, choose_paths, quantize_array, quantize_model
from openvla_jax.models.tree import flat, nested, with_shardings
from openvla_jax.models.tuning import Tuning, make_graph, merge_tuned
from openvla_jax.parallel.sharding import make_mesh, shardings
from openvla_jax.storage import absolute

VALUES, SCALE = "values", "scale"


def load_model(
    path: str | os.PathLike,
    dtype: str = "float32",
    quantize: str | None = None,
    exclude: Sequence[str] = EXCLUDE,
    base: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    verify: bool = False,
) -> tuple[OpenVLA, VLAConfig]:
    """A checkpoint's model, parameters and computation in `dtype`, spread over `mesh` or on the default device.

    `quantize` ("int8", "int4") stores all kernels but those below the paths in `exclude` as integers: one is read and
    quantised after the other, largest first, so that the full-precision model is never in memory. A checkpoint that
    was saved quantised is loaded as it is. An adapter is merged into its base, which is read from `base`, or from where
    it was when the adapter was trained. `verify` reads all files once more before, and compares them with their
    checksums, the base's files too. Raises CheckpointError if `path` holds no complete checkpoint, its tensors
    do not fit its own config, or it is quantised otherwise.
    """
    contract = load_contract(path)
    model = load_weights(open_checkpoint(path), contract, dtype, quantize, exclude, base, mesh, verify)
    return model, contract.model


def load_weights(
    path: epath.Path,
    contract: Contract,
    dtype: str,
    quantize: str | None = None,
    exclude: Sequence[str] = EXCLUDE,
    base: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    verify: bool = False,
) -> OpenVLA:
    """`load_model` of an open checkpoint whose contract was read."""
    if verify:
        checksums.verify(path)
        if contract.adapter is not None:
            checksums.verify(open_base(contract.adapter, path, base))
    if quantize is not None:
        check_kind(quantize)
    mesh = mesh or make_mesh({}, jax.local_devices()[:1])
    if contract.adapter is not None:
        model = load_adapted(path, contract, dtype, base, mesh=mesh)
        if quantize is None:
            return model
        quantize_model(model, quantize, choose_paths(model, exclude))
        graph, state = nnx.split(model, nnx.Param)
        return nnx.merge(graph, jax.device_put(state, shardings(state, mesh)))
    stored = stored_quantization(path)
    if stored is not None:
        kind, paths = stored
        if quantize not in (None, kind):
            raise CheckpointError(f"{path} is {kind} already: quantise the original checkpoint to {quantize}")
        graph, abstract = nnx.split(abstract_quantized(contract.model, kind, paths, dtype), nnx.Param)
        return nnx.merge(graph, load_params(path, placed(abstract, mesh, dtype)))
    model = abstract_model(contract.model, dtype)
    graph, abstract = nnx.split(model, nnx.Param)
    if quantize is None:
        return nnx.merge(graph, load_params(path, placed(abstract, mesh, dtype)))
    check_tree(path, abstract)
    paths = choose_paths(model, exclude)
    graph, state = nnx.split(abstract_quantized(contract.model, quantize, paths, dtype), nnx.Param)
    leaves, made = (flat(nnx.to_pure_dict(nnx.as_pure(placed(tree, mesh, dtype)))) for tree in (abstract, state))
    nnx.replace_by_pure_dict(state, _read_quantizing(path, leaves, made, paths, quantize))
    return nnx.merge(graph, state)


def load_adapted(
    path: epath.Path,
    contract: Contract,
    dtype: str,
    base: str | os.PathLike | None = None,
    merge: bool = True,
    mesh: Mesh | None = None,
) -> OpenVLA:
    """An adapter on its base: merged in float32 and cast to `dtype`, or as it was trained, with the base in `dtype`."""
    assert contract.adapter is not None
    tuning = Tuning.from_dict(contract.adapter["tuning"])
    tuning = dataclasses.replace(tuning, frozen_dtype=dtype, quantize=None)
    source = open_base(contract.adapter, path, base)
    mesh = mesh or make_mesh({}, jax.local_devices()[:1])
    abstract, places = abstract_weights(contract.model, mesh, tuning)
    _, frozen, found = read_base(source, contract.model, tuning, abstract, places, mesh, seed=None)
    check_fingerprint(found, contract.adapter, source, path)
    trained = load_params(path, with_shardings(abstract.params, places.params))
    check_finite(trained, path)
    graph = make_graph(contract.model, dtype, tuning)
    if not merge:
        return cast(OpenVLA, nnx.merge(graph, trained, frozen))

    def merged(trained: nnx.State, frozen: nnx.State) -> OpenVLA:
        whole, state = nnx.split(merge_tuned(cast(OpenVLA, nnx.merge(graph, trained, frozen))), nnx.Param)
        state = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), state)
        return nnx.merge(whole, jax.lax.with_sharding_constraint(state, shardings(state, mesh)))

    # A stack that a last layer joins is made anew; all else is changed where it lies.
    return jax.jit(merged, donate_argnums=() if tuning.splits_last else 1)(trained, frozen)


def save_model(model: OpenVLA, contract: Contract, directory: str | os.PathLike) -> None:
    """Writes the model as it is, quantised or not, as a checkpoint that `load_model` and `Policy` read.

    The directory appears when it is complete. Raises CheckpointError where it exists.
    """
    path = absolute(directory)
    if path.exists():
        raise CheckpointError(f"{path} exists: name another destination")
    params = nnx.to_pure_dict(nnx.as_pure(nnx.split(model, nnx.Param)[1]))
    with checksums.noting_context():
        ocp.save_checkpointables(path, checksums.noted({"params": params, "contract": Files(contract.save)}))


def abstract_quantized(config: VLAConfig, kind: str, paths: Sequence[str], dtype: Any = jnp.float32) -> OpenVLA:
    """The model with `kind` integers at `paths` (see `choose_paths`), as shapes: no arrays are made."""
    check_kind(kind)
    make = lambda key: quantize_model(OpenVLA(config, key, dtype), kind, paths)
    return jax.eval_shape(make, jax.random.key(0))


def tensor_mesh(model: VLAConfig, devices: Sequence[Any]) -> Mesh:
    """A mesh on which `devices` share every layer, by heads and MLP columns. ValueError where heads are left."""
    for name, heads in [(tower.name, tower.heads) for tower in model.towers] + [("llama", model.llama.kv_heads)]:
        if heads % len(devices):
            raise InputError(f"{len(devices)} chips do not divide the {heads} heads of {name}; take fewer")
    return make_mesh({"data": 1, "fsdp": 1, "tensor": len(devices)}, devices)


def placed(abstract: nnx.State, mesh: Mesh, dtype: Any) -> nnx.State:
    """Parameters' shapes with their places on `mesh`: floats as `dtype`, integers and their bfloat16 scales as they
    are.
    """

    def place(keys, leaf, sharding):
        names = [str(getattr(key, "key", key)) for key in keys]
        kept = jnp.issubdtype(leaf.dtype, jnp.integer) or (SCALE in names and leaf.dtype == jnp.bfloat16)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else jnp.dtype(dtype), sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, abstract, shardings(abstract, mesh))


def stored_quantization(path: str | os.PathLike) -> tuple[str, list[str]] | None:
    """(kind, paths) of a checkpoint that was saved quantised, else None."""
    path, found = open_checkpoint(path), {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(stored_params(path)):
        *parent, name = (key.key for key in keys)
        if name == VALUES:
            found["/".join(parent)] = jnp.dtype(leaf.dtype)
    if not found:
        return None
    kinds = [kind for kind, (dtype, _, _) in KINDS.items() if set(found.values()) == {jnp.dtype(dtype)}]
    if not kinds:
        raise CheckpointError(f"{path} holds integers of {sorted(map(str, set(found.values())))}: one of {list(KINDS)}")
    return kinds[0], list(found)


def _read_quantizing(
    path: epath.Path, leaves: Mapping[str, Any], made: Mapping[str, Any], paths: Sequence[str], kind: str
) -> dict[str, Any]:
    """The tree of `made` (shapes with places), from a checkpoint of `leaves`: those at `paths` as {values, scale}."""
    stored = flat(stored_params(path))

    def read(names: Sequence[str], as_stored: bool) -> dict[str, jax.Array]:
        """Quantisation rounds what is stored, not what a cast has rounded before."""
        dtypes = {name: stored[name].dtype if as_stored else leaves[name].dtype for name in names}
        wanted = {
            name: jax.ShapeDtypeStruct(leaves[name].shape, dtypes[name], sharding=leaves[name].sharding)
            for name in names
        }
        return read_leaves(path, wanted)

    arrays: dict[str, Any] = {}
    for name in sorted(paths, key=lambda name: -leaves[name].size):
        parts = f"{name}/{VALUES}", f"{name}/{SCALE}"
        quantized = _quantize(read([name], as_stored=True)[name], kind, *(made[part] for part in parts))
        arrays |= dict(zip(parts, quantized, strict=True))
        jax.block_until_ready(quantized)  # or the next kernel would be read while this one is still there
    arrays |= read([name for name in leaves if name not in set(paths)], as_stored=False)
    return nested(arrays)


def _quantize(kernel: jax.Array, kind: str, *made: jax.ShapeDtypeStruct) -> tuple[jax.Array, ...]:
    """(values, scale) of one kernel or a stack, as `made` says. Each layer of a stack is a program's run of its own: in
    one program a CPU's compiler may hold all of them in float32.
    """
    places = tuple(part.sharding for part in made)
    if kernel.ndim == 2:
        return jax.jit(quantize_array, static_argnums=1, out_shardings=places)(kernel, kind)

    @partial(jax.jit, donate_argnums=1, out_shardings=places)
    def put(kernel: jax.Array, stacks: tuple[jax.Array, ...], layer: Int[Any, ""]) -> tuple[jax.Array, ...]:
        new = quantize_array(kernel[layer], kind)
        return tuple(stack.at[layer].set(x.astype(stack.dtype)) for stack, x in zip(stacks, new, strict=True))

    # As int8 until all are there: a CPU writes all layers of int4 anew for each that is put there.
    values, scale = (
        jnp.zeros(part.shape, jnp.int8 if part.dtype == jnp.int4 else part.dtype, device=part.sharding) for part in made
    )
    for layer in range(kernel.shape[0]):
        values, scale = put(kernel, (values, scale), np.int32(layer))
    return values.astype(made[0].dtype), scale
