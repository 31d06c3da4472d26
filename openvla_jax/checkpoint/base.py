"""A base checkpoint under a fine-tuning: read as it is trained, and recognised again by its fingerprint.

A run that freezes parameters saves those that it trained, and of its base a path and a fingerprint. Whoever uses the
result reads the base again; another one is refused.
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from openvla_jax.checkpoint.contract import CheckpointError, Contract
from openvla_jax.checkpoint.reading import check_tree, load_contract, open_checkpoint, read_leaves, stored_params
from openvla_jax.config import VLAConfig
from openvla_jax.models.openvla import OpenVLA, abstract_model
from openvla_jax.models.quantize import quantize_array
from openvla_jax.models.tree import flat, nested, refill, with_shardings
from openvla_jax.models.tuning import ADDED, ALL_ADDED, LAST, Tuning, matches
from openvla_jax.parallel.sharding import parameter_spec, shardings

BLOCKS = "llama/blocks"
SAMPLES = 16  # values of each layer of each leaf that a fingerprint covers
MERGE = "convert_weights.py merge BASE ADAPTER DST makes one checkpoint of the two"

# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints
# ---------------------------------------------------------------------------------------------------------------------


def sample(x: Any, stacked: bool) -> Any:
    """Evenly spaced values of an array, or of each layer of a stack, in bfloat16: the same for every stored dtype."""
    shape = x.shape[1:] if stacked else x.shape
    places = np.unravel_index(np.linspace(0, int(np.prod(shape)) - 1, SAMPLES).astype(int), shape)
    return (x[(slice(None), *places)] if stacked else x[places]).astype(jnp.bfloat16)


def fingerprint(samples: Mapping[str, Any]) -> str:
    """Of the samples of all parameters by path: equal for equal weights, up to a conversion between dtypes."""
    digest = hashlib.sha256()
    for path in sorted(samples):
        digest.update(f"{path}\n".encode())
        digest.update(np.ascontiguousarray(np.asarray(samples[path]).astype(ml_dtypes.bfloat16)).tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(found: str, adapter: Mapping[str, Any], base: object, where: object) -> None:
    if adapter["fingerprint"] not in (None, found):
        raise CheckpointError(
            f"{where} was trained on another base: its fingerprint is {adapter['fingerprint']} ({adapter['base']}), "
            f"that of {base} is {found}: name the base that it was trained on"
        )


def open_base(adapter: Mapping[str, Any], where: object, base: os.PathLike | str | None = None) -> Any:
    """The directory of an adapter's base: `base`, or where it was when the adapter was trained."""
    try:
        return open_checkpoint(base or adapter["base"])
    except CheckpointError as error:
        raise CheckpointError(
            f"{where} is an adapter and needs its base: {error}; name it with base (--base)"
        ) from None


def check_is_base(path: Any, contract: Contract) -> None:
    """Raises unless the checkpoint holds a whole model in floating point."""
    if contract.adapter is not None:
        raise CheckpointError(f"{path} is an adapter, not a whole model: {MERGE}")
    for name, leaf in flat(stored_params(path)).items():
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            raise CheckpointError(
                f"{path} holds integers ({name}): start from the checkpoint that it was quantised from"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """The weights of a model that is tuned; arrays, shapes or shardings."""

    params: Any  # what is trained
    frozen: Any


def abstract_weights(model: VLAConfig, mesh: Mesh, tuning: Tuning) -> tuple[Weights, Weights]:
    """Returns the shapes and the shardings of a tuned model's weights; no arrays are made."""
    make = lambda key: Weights(*tuning.split(tuning.prepare(OpenVLA(model, key), key))[1:])
    weights = jax.eval_shape(make, jax.random.key(0))
    return weights, shardings(weights, mesh)


def read_base(
    path: os.PathLike | str, model: VLAConfig, tuning: Tuning, abstract: Any, placed: Any, mesh: Mesh, seed: int | None
) -> tuple[nnx.State | None, nnx.State, str]:
    """(trained, frozen, fingerprint) of a checkpoint's weights, as `abstract` and `placed` say: `Weights`, or training
    states.

    Every leaf is read in its final dtype onto the devices that hold it. One that is quantised, or that gives up its
    last layer, is read as it is stored and converted at once, one after the other. Adapters, and parts that
    the checkpoint does not have, are drawn from `seed`; parts that only the checkpoint has are left out. If `seed` is
    None, what is trained comes from elsewhere, and is None here. Raises CheckpointError for a part of another shape,
    and for one that the checkpoint does not have and that would be frozen.
    """
    path = open_checkpoint(path)
    contract = load_contract(path)
    check_is_base(path, contract)
    plain = nnx.state(abstract_model(contract.model), nnx.Param)  # `model` may have parts that the base has not
    check_tree(path, plain)
    stored = flat(stored_params(path))
    axes = {"/".join(map(str, keys)): leaf.get_metadata()["axes"] for keys, leaf in nnx.to_flat_state(plain)}
    target = {
        name: leaf
        for part, sharding in ((abstract.params, placed.params), (abstract.frozen, placed.frozen))
        for name, leaf in flat(nnx.to_pure_dict(nnx.as_pure(with_shardings(part, sharding)))).items()
    }
    for name in axes:
        whole = name in target and not {f"{name}/values", _last(name)} & {*target}
        if whole and target[name].shape != stored[name].shape:
            raise CheckpointError(
                f"{path}: {name} has shape {stored[name].shape}, but the run's model {target[name].shape}: leave out "
                "what of config.observation and config.action differs from the checkpoint's"
            )
    everywhere = NamedSharding(mesh, P())
    direct = {name: target[name] for name in axes if name in target and target[name].shape == stored[name].shape}
    arrays = read_leaves(path, direct)
    take = lambda leaves: {name: sample(x, "/blocks/" in name) for name, x in leaves.items()}
    samples = jax.device_get(jax.jit(take, out_shardings=everywhere)(arrays))
    for name in (name for name in axes if name not in direct):
        x = jax.ShapeDtypeStruct(
            stored[name].shape, stored[name].dtype,
            sharding=NamedSharding(mesh, parameter_spec(stored[name].shape, axes[name], mesh)),
        )  # fmt: skip
        parts = {key: target[key] for key in _parts(name, target)}
        convert = jax.jit(
            lambda x, name=name, parts=parts: (_convert(x, name, parts, tuning), sample(x, "/blocks/" in name)),
            out_shardings=({key: leaf.sharding for key, leaf in parts.items()}, everywhere),
        )
        converted, taken = jax.block_until_ready(convert(read_leaves(path, {name: x})[name]))
        arrays |= converted
        samples[name] = jax.device_get(taken)
    fresh = {name: leaf.sharding for name, leaf in target.items() if name not in arrays}
    lost = [name for name in flat(nnx.to_pure_dict(nnx.as_pure(abstract.frozen))) if name in fresh]
    if lost:
        part = ALL_ADDED if matches(lost[0], ADDED) else lost[0].partition("/")[0]
        raise CheckpointError(
            f"{path} has no {lost[0]}, which the model needs and would freeze as it is drawn: add {part!r} to trainable"
        )
    if fresh and seed is not None:
        arrays |= jax.jit(_adapters, static_argnums=(0, 1, 2), out_shardings=fresh)(
            model, tuning, tuple(fresh), jax.random.key(seed)
        )
    chosen = lambda part: nested({name: arrays[name] for name in flat(nnx.to_pure_dict(nnx.as_pure(part)))})
    params = None if seed is None else refill(abstract.params, chosen(abstract.params))
    return params, refill(abstract.frozen, chosen(abstract.frozen)), fingerprint(samples)


def _parts(name: str, target: Mapping[str, Any]) -> list[str]:
    """What becomes of a leaf: itself, its integers and scale, its last layer apart; nothing if the model has none."""
    return [key for key in (name, f"{name}/values", f"{name}/scale", _last(name)) if key in target]


def _last(name: str) -> str:
    return LAST + name.removeprefix(BLOCKS) if name.startswith(f"{BLOCKS}/") else ""


def _convert(x: Any, name: str, parts: Mapping[str, Any], tuning: Tuning) -> dict[str, Any]:
    made = {}
    if _last(name) in parts:
        x, made[_last(name)] = x[:-1], x[-1:]
    if f"{name}/values" in parts:
        made[f"{name}/values"], made[f"{name}/scale"] = quantize_array(x, str(tuning.quantize))
    else:
        made[name] = x
    return {key: value.astype(parts[key].dtype) for key, value in made.items() if key in parts}


def _adapters(model: VLAConfig, tuning: Tuning, names: tuple[str, ...], key: Any) -> dict[str, Any]:
    """Fresh leaves by path; the compiler drops all that is made beside them."""
    state = flat(nnx.to_pure_dict(nnx.as_pure(nnx.state(tuning.prepare(OpenVLA(model, key), key), nnx.Param))))
    return {name: state[name] for name in names}


def check_finite(params: Any, where: object) -> None:
    """Raises CheckpointError naming the first leaf that holds NaN or infinity."""
    leaves = flat(nnx.to_pure_dict(nnx.as_pure(params)))
    finite = jax.device_get(jax.jit(lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree))(leaves))
    for name, good in finite.items():
        if not good:
            raise CheckpointError(f"{where}: {name} holds NaN or infinity: its training diverged, use an earlier step")
