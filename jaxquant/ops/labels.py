"""Axes of operands by label: which of two operands' axes are contracted, batched or broadcast."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import LowRank, QTensor
from .operands import Operand, is_quantized


def hidden_labels(count: int) -> list[str]:
    """Labels of axes without a letter, counted from the end. These broadcast."""
    return [f"...{i}" for i in range(count, 0, -1)]


def ordered(labels: Sequence[str], wanted: Iterable[str]) -> list[str]:
    """The wanted labels without repetitions, in order."""
    return [label for label in dict.fromkeys(labels) if label in wanted]


def pair_axes(
    lhs: Operand | LowRank,
    lhs_labels: Sequence[str],
    rhs: Operand | LowRank,
    rhs_labels: Sequence[str],
    out_labels: Sequence[str],
) -> tuple[Operand | LowRank, Operand | LowRank, lax.DotDimensionNumbers, tuple[int, ...]]:
    """Prepares two labelled operands for `dot_general`.

    Returns:
        The operands, without broadcast axes and summed over labels that no other has; the
        dimension numbers; and the permutation that brings the result to the output labels.

    Raises:
        ValueError: a label has two lengths, or an output label is not an operand's.
    """
    lhs, lhs_labels, rhs, rhs_labels = _broadcast_away(lhs, lhs_labels, rhs, rhs_labels)
    lhs_keep = ordered(lhs_labels, {*out_labels, *rhs_labels})
    rhs_keep = ordered(rhs_labels, {*out_labels, *lhs_labels})
    lhs, rhs = _sum_to(lhs, lhs_labels, lhs_keep), _sum_to(rhs, rhs_labels, rhs_keep)
    shared = [label for label in lhs_keep if label in rhs_keep]
    batch = [label for label in shared if label in out_labels]
    inner = [label for label in shared if label not in out_labels]
    contract, batch_axes = (
        (tuple(map(lhs_keep.index, group)), tuple(map(rhs_keep.index, group)))
        for group in (inner, batch)
    )
    found = batch + [x for x in lhs_keep + rhs_keep if x not in shared]
    if sorted(found) != sorted(out_labels):
        raise ValueError(
            f"Every output label must be an operand's, once; got output {out_labels} for "
            f"operands {lhs_labels} and {rhs_labels}."
        )
    order = tuple(found.index(label) for label in out_labels)
    return lhs, rhs, (contract, batch_axes), order


def _broadcast_away(
    lhs: Operand | LowRank,
    lhs_labels: Sequence[str],
    rhs: Operand | LowRank,
    rhs_labels: Sequence[str],
) -> tuple[Any, Sequence[str], Any, Sequence[str]]:
    """Drops axes of length 1 that broadcast with a longer one; raises for other mismatches."""
    for label in [label for label in lhs_labels if label in rhs_labels]:
        left, right = lhs.shape[lhs_labels.index(label)], rhs.shape[rhs_labels.index(label)]
        if left == right:
            continue
        if not label.startswith("...") or 1 not in (left, right):
            raise ValueError(
                f"Axes that meet must have one length; got {left} and {right} in shapes "
                f"{lhs.shape} and {rhs.shape}."
            )
        if left == 1:
            lhs, lhs_labels = _squeeze(lhs, lhs_labels, label)
        else:
            rhs, rhs_labels = _squeeze(rhs, rhs_labels, label)
    return lhs, lhs_labels, rhs, rhs_labels


def _squeeze(x: Any, labels: Sequence[str], label: str) -> tuple[Any, Sequence[str]]:
    axis = labels.index(label)
    rest = [*labels[:axis], *labels[axis + 1 :]]
    if isinstance(x, LowRank):
        base, _ = _squeeze(x.base, labels, label)
        a, b = (
            f.squeeze(axes.index(axis)) if axis in axes else f
            for f, axes in zip((x.a, x.b), x.axes(), strict=True)
        )
        return dataclasses.replace(x, base=base, a=a, b=b), rest
    if isinstance(x, QTensor):
        # Every array in it has this axis, 1 long.
        bare = dataclasses.replace(x.reorder(None), inputs=None)
        bare = jax.tree.map(lambda a: a.squeeze(axis), bare)
        return dataclasses.replace(bare, inputs=x.inputs), rest
    return x.squeeze(axis), rest


def _sum_to(x: Any, labels: Sequence[str], keep: Sequence[str]) -> Any:
    """Takes diagonals of repeated labels and sums over those not in `keep`."""
    if list(labels) == list(keep):
        return x
    letters = {label: chr(ord("a") + i) for i, label in enumerate(dict.fromkeys(labels))}
    source, target = ("".join(letters[label] for label in ls) for ls in (labels, keep))
    return jnp.einsum(f"{source}->{target}", as_plain(x))


def as_plain(x: Any) -> jax.Array:
    """The dequantized operand, for a sum, a diagonal or a transpose.

    Raises:
        ValueError: it has `inputs`, which are for products.
    """
    if not is_quantized(x):
        return x
    inputs = x.base.inputs if isinstance(x, LowRank) else x.inputs
    if inputs is not None:
        raise ValueError(
            "What has `inputs` can only be multiplied; got a sum or a diagonal of "
            f"{x!r}. Use each of its labels once, in the output or in the other operand."
        )
    return x.dequantize()
