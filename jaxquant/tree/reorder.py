"""Stores the quantized arrays of a tree in the order of axes that a platform reads fastest."""

from collections.abc import Mapping
from typing import Any

import jax

from ..core import Axes, QTensor
from ..ops import best_order
from .paths import leaves_with_paths


def reorder(
    params: Any, platform: str | None = None, *, contracted: Mapping[str, Axes] | None = None
) -> Any:
    """The tree with each QTensor stored in the fastest order of axes for the platform.

    Args:
        params: tree from `quantize`, possibly for another platform, or from `checkpoints.load`.
        platform: "cpu", "gpu" or "tpu"; None for `jax.default_backend()`.
        contracted: the axes that products sum over, by path: `jaxquant.uses(...).contracted`.
            Scales say it of other leaves, but not those of blocks along two axes, such as the
            blocks of 128 x 128 of FP8 checkpoints: without it, these keep their order.

    Raises:
        ValueError: the platform is unknown, an axis is out of range, or `contracted` is not a
            mapping or names a path that the tree does not have.

    Example:
        >>> params = {"kernel": jnp.ones((64, 32))}
        >>> on_cpu = jq.tree.quantize(params, jq.W8A8, platform="cpu")
        >>> on_cpu["kernel"].codes.shape, on_cpu["kernel"].shape
        ((32, 64), (64, 32))
        >>> grouped = jq.tree.quantize({"kernel": jnp.ones((256, 32))}, jq.W4A16, platform="cpu")
        >>> jq.tree.reorder(grouped, platform="tpu")["kernel"].codes.shape
        (256, 32)
    """
    platform, known = platform or jax.default_backend(), {} if contracted is None else contracted
    if not isinstance(known, Mapping):
        raise ValueError(
            "contracted must map paths to axes, such as jaxquant.uses(...).contracted; got "
            f"{type(known).__name__}."
        )
    paths, leaves, treedef = leaves_with_paths(params)
    if odd := sorted(known.keys() - set(paths)):
        raise ValueError(
            f"contracted must name leaves of the tree; got {', '.join(odd[:5])}. It has "
            f"{', '.join(paths[:5])}{', ...' if len(paths) > 5 else ''}."
        )

    def moved(path: str, leaf: Any) -> Any:
        def one(x: Any) -> Any:
            return x.reorder(best_order(x, platform, known.get(path))) if _is_qtensor(x) else x

        # The base of a leaf with adapters has its axes.
        return jax.tree.map(one, leaf, is_leaf=_is_qtensor)

    return jax.tree.unflatten(treedef, list(map(moved, paths, leaves)))


def _is_qtensor(x: Any) -> bool:
    return isinstance(x, QTensor)
