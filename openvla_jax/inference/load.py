"""A checkpoint's model on the default device: in full precision, or as integers that are made while it is read."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from orbax.checkpoint import v1 as ocp

from openvla_jax.config import VLAConfig
from openvla_jax.models.openvla import OpenVLA, abstract_model
from openvla_jax.models.quantize import EXCLUDE, KINDS, check_kind, choose_paths, quantize_array, quantize_model
from openvla_jax.training.checkpoint import (
    CheckpointError,
    Contract,
    Files,
    absolute,
    check_tree,
    load_contract,
    load_params,
    open_checkpoint,
)

VALUES, SCALE = "values", "scale"


def load_model(
    path: str | os.PathLike, dtype: str = "float32", quantize: str | None = None, exclude: Sequence[str] = EXCLUDE
) -> tuple[OpenVLA, VLAConfig]:
    """A checkpoint's model on the default device, parameters and computation in `dtype`.

    `quantize` ("int8", "int4") stores all kernels but those below the paths in `exclude` as integers: one is read and
    quantised after the other, largest first, so that the full-precision model is never in memory. A checkpoint that
    was saved quantised is loaded as it is. Raises CheckpointError if `path` holds no complete checkpoint, its tensors
    do not fit its own config, or it is quantised otherwise.
    """
    contract = load_contract(path)
    return load_weights(open_checkpoint(path), contract, dtype, quantize, exclude), contract.model


def load_weights(
    path: epath.Path, contract: Contract, dtype: str, quantize: str | None = None, exclude: Sequence[str] = EXCLUDE
) -> OpenVLA:
    """`load_model` of an open checkpoint whose contract was read."""
    if quantize is not None:
        check_kind(quantize)
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
    leaves = _flat(tree)
    stored = _flat(ocp.metadata(path, "params").metadata)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    quantize = jax.jit(quantize_array, static_argnums=1)

    def read(names: Sequence[str], as_stored: bool) -> dict[str, jax.Array]:
        """Quantisation rounds what is stored, not what a cast has rounded before."""
        dtypes = {name: stored[name].dtype if as_stored else leaves[name].dtype for name in names}
        wanted = {
            name: jax.ShapeDtypeStruct(leaves[name].shape, dtypes[name], sharding=leaves[name].sharding)
            for name in names
        }
        with context:
            return _flat(ocp.load_checkpointables(path, {"params": _nested(wanted)})["params"])

    arrays: dict[str, Any] = {}
    for name in sorted(paths, key=lambda name: -leaves[name].size):
        values, scale = quantize(read([name], as_stored=True)[name], kind)
        arrays |= {f"{name}/{VALUES}": values, f"{name}/{SCALE}": scale}
        jax.block_until_ready(values)  # or the next kernel would be read while this one is still there
    arrays |= read([name for name in leaves if name not in set(paths)], as_stored=False)
    return _nested(arrays)


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
