"""New values in a tree that is quantized already."""

import dataclasses
from functools import partial
from typing import Any

import jax

from ..core import SCALE_DTYPES, ArrayConfig, QTensor, blocks_between, quantize
from .paths import check_like, is_whole, leaves_with_paths


def requantize(params: Any, like: Any) -> Any:
    """Quantizes new parameters as a tree is quantized, in the memory of that tree.

    Formats, groups, scale dtypes, storage orders and activation configs are those of `like`. Ranges
    are those of `AbsMax()` and of the formats: a QTensor does not keep `range` and `value_range` of
    the config that it was quantized with. The result has the structure, shapes and dtypes of
    `like`, so that a jitted function of it is not compiled again: give a policy in training to its
    quantized rollouts in each step.

    Args:
        params: tree of floating-point arrays, with the structure and shapes that `like` stands for.
        like: tree of QTensors and arrays, such as `quantize` returns. Its QTensors are donated: do
            not use them afterwards. Its arrays may be those of `params`, and are not donated.

    Returns:
        The tree `like` with the values of `params`; arrays are copied, and cast to the dtypes in
        `like`.

    Raises:
        ValueError: params does not match, or a parameter in `like` cannot be requantized: it has an
            offset, a permutation, a multiplier or a rotation, adapters, values in training, or
            scales of a format that `quantize` does not produce.

    Example:
        >>> params = {"kernel": jnp.ones((64, 32)), "bias": jnp.zeros(32)}
        >>> served = jq.tree.quantize(params, {"kernel": jq.W8A8})
        >>> params = {"kernel": jnp.full((64, 32), 2.0), "bias": jnp.ones(32)}
        >>> served = jq.tree.requantize(params, like=served)
        >>> float(served["kernel"].dequantize()[0, 0]), float(served["bias"][0])
        (2.0, 1.0)
    """
    check_like("params", params, "like", like)
    paths, leaves, treedef = leaves_with_paths(like)
    for path, leaf in zip(paths, leaves, strict=True):
        reason = _why_unsupported(leaf)
        if reason:
            raise ValueError(
                f"like must hold parameters as quantize returns them; got {path} with {reason}. "
                "Quantize params as like was."
            )
    # Neither `inputs` nor arrays are donated, because QTensors and `params` may share them.
    stored = [
        dataclasses.replace(q, inputs=None) if isinstance(q, QTensor) else None for q in leaves
    ]
    made = _requantize(treedef.flatten_up_to(params), stored)
    return jax.tree.unflatten(treedef, map(_completed, leaves, made))


@partial(jax.jit, donate_argnums=1, keep_unused=True)
def _requantize(params, stored):
    pairs = zip(params, stored, strict=True)
    return [new if old is None else _new_values(old, new) for new, old in pairs]


def _completed(old, made):
    """What a leaf of `like` becomes, from what `_requantize` returns in its place."""
    if isinstance(old, QTensor):
        return dataclasses.replace(made, inputs=old.inputs)
    return made.astype(old.dtype)


def _new_values(old, new):
    axes = old.stored_axes(range(old.ndim))
    blocks = blocks_between(old.codes.shape, old.scale.shape)
    lengths = {a: blocks[stored] for a, stored in enumerate(axes) if blocks[stored] > 1}
    config = ArrayConfig(
        format=old.format,
        group_size=None if old.format.group_size else tuple(lengths.values()) or None,
        symmetric=old.zero_point is None,
        scale_dtype=_scale_dtype(old),
    )
    q = quantize(new, config, tuple(lengths)).reorder(old.order)
    return dataclasses.replace(q, inputs=old.inputs, dtype=old.dtype)


def _scale_dtype(q):
    """The scale dtype of a config that leads to these scales."""
    return q.scale.format.dtype if isinstance(q.scale, QTensor) else q.scale.dtype.name


def _why_unsupported(leaf) -> str | None:
    """What of a leaf of `like` cannot be computed from new values; None if all can."""
    if not isinstance(leaf, QTensor):
        return f"a {type(leaf).__name__}" if is_whole(leaf) else None
    found = [name for name in ("offset", "values") if getattr(leaf, name) is not None]
    if leaf.inputs is not None and leaf.inputs.changes_weight:
        found.append(f"inputs.{leaf.inputs.changing_field}")
    if found:
        return " and ".join(found)
    if _scale_dtype(leaf) not in SCALE_DTYPES:
        return f"scales {leaf.scale!r}"
    new = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    made = jax.eval_shape(_new_values, leaf, new)
    is_same = jax.tree.structure(made) == jax.tree.structure(leaf) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(leaf), strict=True)
    )
    return None if is_same else f"scales {leaf.scale!r}"
