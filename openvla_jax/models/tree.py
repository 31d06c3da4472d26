"""Trees of parameters by path."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def flat(tree: Any) -> dict[str, Any]:
    """Leaves of nested dicts by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flat`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def refill(abstract: Any, pure: Any) -> Any:
    """Puts plain leaves back under the `nnx.Variable`s of `abstract` (dicts iterate in one order on both sides)."""
    names = {name: i for i, name in enumerate(shapes(pure))}
    order = [names[name] for name in shapes(nnx.to_pure_dict(nnx.as_pure(abstract)))]
    leaves = jax.tree.leaves(pure)
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[i] for i in order])


def with_shardings(abstract: Any, placed: Any) -> Any:
    """Shape structs that carry their shardings: a target for restoring."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), abstract, placed)
