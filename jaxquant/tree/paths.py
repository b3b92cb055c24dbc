"""Leaves of a pytree with their paths. A QTensor or similar pytree counts as one leaf."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ..core import LowRank, QTensor, TrainedArray


def is_quantized(x: Any) -> bool:
    """Whether x is a QTensor, with or without adapters. Use it as `is_leaf` for trees of them.

    Example:
        >>> params = {"w": jq.quantize(jnp.ones((4, 8)), jq.ArrayConfig()), "b": jnp.ones(8)}
        >>> jax.tree.map(jq.tree.is_quantized, params, is_leaf=jq.tree.is_quantized)
        {'b': False, 'w': True}
    """
    return isinstance(x, QTensor | LowRank)


def is_whole(x: Any) -> bool:
    """Whether x represents one array and counts as one leaf, although JAX sees a pytree."""
    return isinstance(x, QTensor | LowRank | TrainedArray)


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = is_whole
) -> tuple[list[str], list[Any], Any]:
    """Paths such as "layers/0/kernel", the leaves in the same order, and the structure."""
    found, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]
    return paths, [leaf for _, leaf in found], treedef


def check_sortable(path: Any, tree: Any) -> None:
    """Checks that JAX can sort the keys of each dict in the tree of a file.

    Raises:
        ValueError: it cannot; the text begins with the path of the file.
    """
    # Before JAX tries: each such error of jaxlib 0.10 takes a level of Python's stack.
    if isinstance(tree, dict) and len({type(key) for key in tree}) > 1:
        raise ValueError(
            f"{path} holds a dict with keys of several types, which JAX cannot sort: "
            f"{str(list(tree))[:80]}. jaxquant.load reads it."
        )
    if isinstance(tree, dict | list | tuple):
        for child in tree.values() if isinstance(tree, dict) else tree:
            check_sortable(path, child)


def check_like(name: str, tree: Any, like_name: str, like: Any) -> None:
    """Checks that a tree, quantized or not, has the structure and the shapes of another.

    Raises:
        ValueError: it does not; the text has the names of both.
    """
    paths, leaves, treedef = leaves_with_paths(like)
    _, others, other = leaves_with_paths(tree)
    if other != treedef:
        raise ValueError(f"{name} must have the structure of {like_name}, {treedef}; got {other}.")
    for path, leaf, new in zip(paths, leaves, others, strict=True):
        if np.shape(new) != np.shape(leaf):
            raise ValueError(
                f"{name} must have the shapes of {like_name}; got {np.shape(new)} for {path} of "
                f"shape {np.shape(leaf)}."
            )
