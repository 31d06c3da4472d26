"""A checkpoint's model on the default device: in full precision, or as integers that are made while it is read."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from openvla_jax.config import VLAConfig
from openvla_jax.models.openvla import OpenVLA, abstract_model
from openvla_jax.models.quantize import EXCLUDE, KINDS, check_kind, choose_paths, quantize_array, quantize_model
from openvla_jax.models.tuning import Tuning, merge_tuned
from openvla_jax.training.adapter import check_fingerprint, check_finite, open_base, read_base
from openvla_jax.training.checkpoint import (
    CheckpointError,
    Contract,
    Files,
    absolute,
    check_tree,
    flat,
    load_contract,
    load_params,
    nested,
    open_checkpoint,
    read_leaves,
    with_shardings,
)
from openvla_jax.training.sharding import make_mesh
from openvla_jax.training.state import abstract_state
from openvla_jax.training.step import make_graph

VALUES, SCALE = "values", "scale"


def load_model(
    path: str | os.PathLike,
    dtype: str = "float32",
    quantize: str | None = None,
    exclude: Sequence[str] = EXCLUDE,
    base: str | os.PathLike | None = None,
) -> tuple[OpenVLA, VLAConfig]:
    """A checkpoint's model on the default device, parameters and computation in `dtype`.

    `quantize` ("int8", "int4") stores all kernels but those below the paths in `exclude` as integers: one is read and
    quantised after the other, largest first, so that the full-precision model is never in memory. A checkpoint that
    was saved quantised is loaded as it is. An adapter is merged into its base, which is read from `base`, or from where
    it was when the adapter was trained. Raises CheckpointError if `path` holds no complete checkpoint, its tensors
    do not fit its own config, or it is quantised otherwise.
    """
    contract = load_contract(path)
    return load_weights(open_checkpoint(path), contract, dtype, quantize, exclude, base), contract.model


def load_weights(
    path: epath.Path,
    contract: Contract,
    dtype: str,
    quantize: str | None = None,
    exclude: Sequence[str] = EXCLUDE,
    base: str | os.PathLike | None = None,
) -> OpenVLA:
    """`load_model` of an open checkpoint whose contract was read."""
    if quantize is not None:
        check_kind(quantize)
    if contract.adapter is not None:
        model = load_adapted(path, contract, dtype, base)
        if quantize is not None:
            quantize_model(model, quantize, choose_paths(model, exclude))
        return model
    stored = stored_quantization(path)
    if stored is not None:
        kind, paths = stored
        if quantize not in (None, kind):
            raise CheckpointError(f"{path} is {kind} already: quantise the original checkpoint to {quantize}")
        graph, abstract = nnx.split(abstract_quantized(contract.model, kind, paths, dtype), nnx.Param)
        return nnx.merge(graph, load_params(path, _placed(abstract, dtype)))
    model = abstract_model(contract.model, dtype)
    graph, abstract = nnx.split(model, nnx.Param)
    if quantize is None:
        return nnx.merge(graph, load_params(path, _placed(abstract, dtype)))
    check_tree(path, abstract)
    paths = choose_paths(model, exclude)
    arrays = _read_quantizing(path, nnx.to_pure_dict(nnx.as_pure(_placed(abstract, dtype))), paths, quantize)
    graph, state = nnx.split(abstract_quantized(contract.model, quantize, paths, dtype), nnx.Param)
    nnx.replace_by_pure_dict(state, arrays)
    return nnx.merge(graph, state)


def load_adapted(
    path: epath.Path, contract: Contract, dtype: str, base: str | os.PathLike | None = None, merge: bool = True
) -> OpenVLA:
    """An adapter on its base: merged in float32 and cast to `dtype`, or as it was trained, with the base in `dtype`."""
    assert contract.adapter is not None
    tuning = Tuning.from_dict(contract.adapter["tuning"])
    tuning = dataclasses.replace(tuning, frozen_dtype=dtype, quantize=None)
    source = open_base(contract.adapter, path, base)
    mesh = make_mesh({}, jax.local_devices()[:1])
    abstract, placed = abstract_state(contract.model, dtype, optax.identity(), mesh, tuning)
    _, frozen, found = read_base(source, contract.model, tuning, abstract, placed, mesh, seed=None)
    check_fingerprint(found, contract.adapter, source, path)
    trained = load_params(path, with_shardings(abstract.params, placed.params))
    check_finite(trained, path)
    graph = make_graph(contract.model, dtype, tuning)
    if not merge:
        return cast(OpenVLA, nnx.merge(graph, trained, frozen))

    def merged(trained: nnx.State, frozen: nnx.State) -> OpenVLA:
        model = merge_tuned(cast(OpenVLA, nnx.merge(graph, trained, frozen)))
        return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), model)

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
    ocp.save_checkpointables(path, {"params": params, "contract": Files(contract.save)})


def abstract_quantized(config: VLAConfig, kind: str, paths: Sequence[str], dtype: Any = jnp.float32) -> OpenVLA:
    """The model with `kind` integers at `paths` (see `choose_paths`), as shapes: no arrays are made."""
    check_kind(kind)
    make = lambda key: quantize_model(OpenVLA(config, key, dtype), kind, paths)
    return jax.eval_shape(make, jax.random.key(0))


def stored_quantization(path: str | os.PathLike) -> tuple[str, list[str]] | None:
    """(kind, paths) of a checkpoint that was saved quantised, else None."""
    path, found = open_checkpoint(path), {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(ocp.metadata(path, "params").metadata):
        *parent, name = (key.key for key in keys)
        if name == VALUES:
            found["/".join(parent)] = jnp.dtype(leaf.dtype)
    if not found:
        return None
    kinds = [kind for kind, (dtype, _, _) in KINDS.items() if set(found.values()) == {jnp.dtype(dtype)}]
    if not kinds:
        raise CheckpointError(f"{path} holds integers of {sorted(map(str, set(found.values())))}: one of {list(KINDS)}")
    return kinds[0], list(found)


def _placed(abstract: nnx.State, dtype: Any) -> nnx.State:
    """Shapes to read: floats as `dtype`, integers and their bfloat16 scales as they are, on the default device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(keys, leaf):
        names = [str(getattr(key, "key", key)) for key in keys]
        kept = jnp.issubdtype(leaf.dtype, jnp.integer) or (SCALE in names and leaf.dtype == jnp.bfloat16)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if kept else jnp.dtype(dtype), sharding=device)

    return jax.tree_util.tree_map_with_path(place, abstract)


def _read_quantizing(path: epath.Path, tree: Mapping[str, Any], paths: Sequence[str], kind: str) -> dict[str, Any]:
    """The arrays of `tree` (shapes), those at `paths` as {values, scale}."""
    leaves = flat(tree)
    stored = flat(ocp.metadata(path, "params").metadata)
    quantize = jax.jit(quantize_array, static_argnums=1)

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
        values, scale = quantize(read([name], as_stored=True)[name], kind)
        arrays |= {f"{name}/{VALUES}": values, f"{name}/{SCALE}": scale}
        jax.block_until_ready(values)  # or the next kernel would be read while this one is still there
    arrays |= read([name for name in leaves if name not in set(paths)], as_stored=False)
    return nested(arrays)
