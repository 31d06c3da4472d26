"""The mesh, and the one table that says where every parameter and activation lives.

Axes: `data` replicates parameters (across slices), `fsdp` shards parameters, optimiser state and batch, `tensor`
splits heads, mlp and vocabulary. Arrays are placed by the compiler (`AxisType.Auto`) from parameter shardings and few
constraints.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from openvla_jax.errors import InputError
from openvla_jax.parallel.placement import ROWS

AXES = ("data", "fsdp", "tensor")
BATCH = P(ROWS)

# Logical axis of a parameter -> mesh axis. The model width of every kernel is sharded, never the layer axis: gathers
# and reductions then need no layout copies.
RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "norm": None,
    "patch": None,
    "position": None,
    "state": None,
    "groups": None,
    "adapter": "fsdp",  # the long side of an adapter's factors
    "rank": None,
}

MAX_REPLICATED_BYTES = 64 * 2**20


def make_mesh(sizes: Mapping[str, int], devices=None) -> Mesh:
    """A mesh of `('data', 'fsdp', 'tensor')`; one size may be -1: what the other two leave of the devices.

    `data` 0 is one per slice. Several slices are joined by `data` alone, so that only gradients cross the data-centre
    network; within a slice axes follow the chips' links. InputError for sizes that the devices do not make up.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = {axis: int(sizes.get(axis, 1)) for axis in AXES}
    sizes["data"] = sizes["data"] or slices
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    bad = len(free) > 1 or fixed <= 0 or len(devices) % fixed or (not free and fixed != len(devices))
    if bad:
        wanted = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise InputError(
            f"mesh ({wanted}) does not fit {len(devices)} devices: the product must be that, with at most one -1"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    return Mesh(slice_grid(sizes, devices, slices), AXES, axis_types=(AxisType.Auto,) * 3)


def slice_grid(sizes: Mapping[str, int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """The devices of one slice or several, [data, fsdp, tensor]: each slice is a run of `data`.

    Two mesh axes may share a dimension of the slice, which `jax.make_mesh` refuses.
    """
    if slices == 1:
        shape = tuple(sizes[axis] for axis in AXES)
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["data"] % slices:
        raise InputError(
            f"mesh data={sizes['data']} on {slices} slices: the other axes would cross the data-centre network in "
            f"every layer; config.mesh.data must be a multiple of {slices} (0: one per slice)"
        )
    inner = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    return mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, allow_split_physical_axes=True)


def parameter_spec(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh | AbstractMesh) -> P:
    """The partition of one parameter by `RULES`.

    A dimension that its mesh axis does not divide hands the axis on to the largest free dimension that it does divide
    (4304 or 32064 over 64 chips), other than the layer axis. Two dimensions on one mesh axis raise.
    """
    wanted = [RULES[axis] for axis in axes]
    taken = [axis for axis in wanted if axis is not None]
    if len(set(taken)) != len(taken):
        raise InputError(f"parameter axes {axes} put two dimensions on one mesh axis: {wanted}")
    spec: list[str | None] = [None] * len(shape)
    left = []
    for i, axis in enumerate(wanted):
        if axis is not None and mesh.shape[axis] > 1:
            if shape[i] % mesh.shape[axis] == 0:
                spec[i] = axis
            else:
                left.append(axis)
    for axis in left:
        free = [
            i for i in range(len(shape)) if spec[i] is None and axes[i] != "layers" and shape[i] % mesh.shape[axis] == 0
        ]
        if free:
            spec[max(free, key=lambda i: shape[i])] = axis
    return P(*spec)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """`NamedSharding`s for a tree of `nnx.Variable`s (parameters, Adam moments) and plain leaves, which are replicated.

    The result has the structure of `tree`, so that it serves as `in_shardings`, `out_shardings` and restore target.
    """

    def place(path, leaf):
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        array = leaf.get_value()
        spec = parameter_spec(array.shape, leaf.get_metadata()["axes"], mesh)
        bytes_replicated = math.prod(array.shape) * array.dtype.itemsize
        if mesh.shape["fsdp"] > 1 and all(axis is None for axis in spec) and bytes_replicated > MAX_REPLICATED_BYTES:
            raise InputError(
                f"{jax.tree_util.keystr(path)} {array.shape} would be replicated on every device "
                f"({bytes_replicated / 2**20:.0f} MiB): fsdp={mesh.shape['fsdp']} divides no dimension; a smaller one "
                f"may, config.mesh.data={2 * mesh.shape['data']} halves it"
            )
        return leaf.replace(NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def global_batch(batch: Any, mesh: Mesh) -> Any:
    """Joins the hosts' local arrays (leading axis: rows of this host) to global arrays sharded over data and fsdp."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """The global batch must split into accumulation steps, each over all data shards, and over processes."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for what, divisor in (
        (f"accumulation {accumulation} x {shards} data shards", accumulation * shards),
        (f"{jax.process_count()} processes", jax.process_count()),
    ):
        if batch_size % divisor:
            near = max(1, round(batch_size / divisor)) * divisor
            raise InputError(f"train.batch_size {batch_size} is not a multiple of {what}; the nearest that is: {near}")
