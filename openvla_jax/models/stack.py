"""Stacks of layers: one scan, or a loop over unstacked layers; and what the backward pass recomputes."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from openvla_jax.errors import InputError
from openvla_jax.parallel.execution import Execution
from openvla_jax.parallel.placement import shard_rows

# Activations that the backward pass may keep instead of recomputing them; `checkpoint_name` marks them.
SAVEABLE = ("q", "k", "v", "attention", "o", "gate", "up", "activation", "weights")


def _keep(*names: str) -> Callable[..., Any]:
    """Keeps what `names` lists, and always the "statistics" of softmax and norms: a number or two a row, without which
    the backward pass would go through all scores three times instead of once, and through a norm's input once more.
    """
    return jax.checkpoint_policies.save_only_these_names(*names, "statistics")


# Policies, from least to most memory; `remat_policy` also takes names of SAVEABLE, separated by commas.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_qkv": _keep("q", "k", "v"),
    "save_qkvo": _keep("q", "k", "v", "attention", "o"),
    "save_dots": _keep(*SAVEABLE),
    "none": None,
}


def remat_policy(name: str) -> Callable[..., Any] | None:
    """The policy called `name`, or one that keeps what `name` lists, as "q,k,v,o"; InputError for others."""
    if name in REMAT_POLICIES:
        return REMAT_POLICIES[name]
    kept = name.split(",")
    if not set(kept) <= set(SAVEABLE):
        raise InputError(
            f"unknown remat policy {name!r}: one of {', '.join(REMAT_POLICIES)}, or names to keep, separated by "
            f"commas, of {', '.join(SAVEABLE)}"
        )
    return _keep(*kept)


def scan_layers(body: Callable[[Any, Array, Execution], Array], x: Array, layers: Any, execution: Execution) -> Array:
    """Runs a stack of layers: `x = body(layer, x, execution)` for each slice of `layers` along its leading axis.

    Each layer gets its own dropout key. The body returns activations only: returning parameters makes XLA copy the
    whole stack. InputError for an unknown `execution.remat`.
    """

    def step(carry, scanned):
        layer, *key = scanned
        own = execution.with_dropout_key(key[0] if key else None)
        return shard_rows(body(layer, shard_rows(carry, own.mesh), own), own.mesh), None

    policy = remat_policy(execution.remat)
    keys = execution.layer_keys(jax.tree.leaves(layers)[0].shape[0])
    if policy is not None:
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    return scan_stack(step, x, layers, *([] if keys is None else [keys]))[0]


def scan_stack(step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Any, *others: Any) -> tuple[Any, Any]:
    """`jax.lax.scan(step, carry, (layers, *others))`; or, over layers that `unstack` made, a loop of Python's.

    There what is scanned beside the layers, and what the steps return, are lists of one entry per layer.
    """
    if not isinstance(layers, nnx.List | list):
        return jax.lax.scan(step, carry, (layers, *others))
    outputs = []
    for i, layer in enumerate(layers):
        carry, output = step(carry, (layer, *(_entry(other, i) for other in others)))
        outputs.append(output)
    return carry, jax.tree.map(lambda *leaves: list(leaves), *outputs)


def _entry(tree: Any, i: int) -> Any:
    """Entry i of every list in `tree`."""
    return jax.tree.map(lambda x: x[i], tree, is_leaf=lambda x: isinstance(x, list))


def unstack(layers: nnx.Module) -> nnx.List:
    """The layers of a stack as modules with arrays of their own; the stack's arrays are deleted one by one.

    A scan copies each layer's parameters out of the stack before a CPU's products, which with few tokens takes longer
    than these. Without the stack the program is as long as the model is deep, and so is its compilation.
    """
    leaves, structure = jax.tree.flatten(layers)
    parts = []
    for leaf in leaves:
        parts.append(jax.block_until_ready([leaf[i] for i in range(leaf.shape[0])]))
        leaf.delete()
    return nnx.List([jax.tree.unflatten(structure, layer) for layer in zip(*parts, strict=True)])
