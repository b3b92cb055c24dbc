"""`einsum` and `matmul` on quantized operands: axes by label, then `dot_general`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import LowRank, QTensor
from ..jaxprs import OutSharding, before_transpose
from .dispatch import Factor
from .dot import dot_general
from .operands import check_factors, is_quantized


def einsum(
    subscripts: str,
    /,
    *operands: Factor,
    optimize: Any = "auto",
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: OutSharding = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.numpy.einsum` on arrays and QTensors, in any mixture.

        out[output labels] = sum over all other labels of the product of the operands

    Pairs are contracted from left to right, each by `dot_general`, which has the details.

    Args:
        subscripts: as for `jax.numpy.einsum`, as one string, such as "btd,dhk->bthk".
        operands: float arrays or QTensors.
        optimize: as for `jax.numpy.einsum` where no operand is a QTensor, and without effect
            otherwise: order the operands so that the pairs are small.
        precision, preferred_element_type, out_sharding, implementation: as for `dot_general`.

    Returns:
        Array with one axis per output label.

    Raises:
        ValueError: subscripts do not fit the operands, a label has two lengths, or as for
            `dot_general`.

    Gradients and error: those of `dot_general`.
    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 7.
    """
    if not isinstance(subscripts, str):
        raise ValueError(
            "subscripts must be one string, such as 'btd,dh->bth'; got "
            f"{type(subscripts).__name__}."
        )
    operands = check_factors(operands, implementation)
    if len(operands) < 2 or not any(map(is_quantized, operands)):
        return jnp.einsum(
            subscripts,
            *map(_plain, operands),
            optimize=optimize,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    labels, out_labels = _parse(subscripts, operands)
    options: dict[str, Any] = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "out_sharding": None,
        "implementation": implementation,
    }
    result, result_labels = operands[0], labels[0]
    for i in range(1, len(operands) - 1):
        keep = _ordered(result_labels + labels[i], set(out_labels).union(*labels[i + 1 :]))
        result = _contract(result, result_labels, operands[i], labels[i], keep, options)
        result_labels = keep
    options["out_sharding"] = out_sharding
    return _contract(result, result_labels, operands[-1], labels[-1], out_labels, options)


def matmul(
    a: Factor,
    b: Factor,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: OutSharding = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.numpy.matmul` on arrays and QTensors, in any mixture: (..., M, K) @ (..., K, N).

        out[..., m, n] = sum over k of a[..., m, k] * b[..., k, n]

    Args:
        a, b: float arrays or QTensors of at least one axis. Leading axes broadcast; an operand
            of one axis is a row on the left, a column on the right, and its axis is dropped.
        precision, preferred_element_type, out_sharding, implementation: as for `dot_general`,
            which has the details.

    Returns:
        Array of shape (..., M, N).

    Raises:
        ValueError: an operand has no axis, lengths do not fit, or as for `dot_general`.

    Gradients and error: those of `dot_general`.
    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 7.
    """
    a, b = check_factors((a, b), implementation)
    if not (isinstance(a, QTensor | LowRank) or isinstance(b, QTensor | LowRank)):
        return jnp.matmul(
            a,
            b,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    if a.ndim == 0 or b.ndim == 0:
        raise ValueError(f"matmul needs operands of at least one axis; got {a.shape}, {b.shape}.")
    a_labels = [*_hidden(a.ndim - 2), *["m", "k"][-a.ndim :]]
    b_labels = [*_hidden(b.ndim - 2), *["k", "n"][: b.ndim]]
    out = [*_hidden(max(a.ndim, b.ndim) - 2), *["m"] * (a.ndim > 1), *["n"] * (b.ndim > 1)]
    options = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "out_sharding": out_sharding,
        "implementation": implementation,
    }
    return _contract(a, a_labels, b, b_labels, out, options)


def _parse(subscripts, operands):
    """Labels of each operand and of the result. An ellipsis becomes labels of its own."""
    text = subscripts.replace(" ", "")
    inputs, arrow, output = text.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        raise ValueError(
            f"subscripts must name one term per operand; got {subscripts!r} for "
            f"{len(operands)} operands."
        )
    labels = [_expand(term, x.ndim, subscripts) for term, x in zip(terms, operands, strict=True)]
    dots = max(sum(label.startswith("...") for label in ls) for ls in labels)
    if arrow:
        # Without an ellipsis in the output, the axes under those of the inputs are summed.
        hidden = dots if "..." in output else 0
        return labels, _expand(output, hidden + len(output.replace("...", "")), subscripts)
    letters = sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1)
    return labels, _hidden(dots) + letters


def _hidden(count):
    """Labels of axes that no letter names, counted from the end: these broadcast."""
    return [f"...{i}" for i in range(count, 0, -1)]


def _expand(term, ndim, subscripts):
    """One label per axis; an axis under an ellipsis is "...i", counted from its end."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after)
    if (not (before + after).isalpha() and before + after) or hidden < 0 or (hidden and not dots):
        raise ValueError(
            f"subscripts must have one letter per axis; got {term!r} in {subscripts!r} for an "
            f"operand of {ndim} axes."
        )
    return [*before, *_hidden(hidden), *after]


def _ordered(labels, wanted):
    return [label for label in dict.fromkeys(labels) if label in wanted]


def _contract(lhs, lhs_labels, rhs, rhs_labels, out_labels, options):
    """The product of two labelled operands, summed over the labels that are not in the output."""
    lhs, lhs_labels, rhs, rhs_labels = _broadcast_away(lhs, lhs_labels, rhs, rhs_labels)
    lhs_keep = _ordered(lhs_labels, {*out_labels, *rhs_labels})
    rhs_keep = _ordered(rhs_labels, {*out_labels, *lhs_labels})
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
    options = options | {"out_sharding": before_transpose(options["out_sharding"], order)}
    if not (is_quantized(lhs) or is_quantized(rhs)):
        # Of three operands, two may be plain: what is forced is for the others.
        options = options | {"implementation": None}
    out = dot_general(lhs, rhs, (contract, batch_axes), **options)
    return out if order == tuple(range(out.ndim)) else out.transpose(order)


def _broadcast_away(lhs, lhs_labels, rhs, rhs_labels):
    """Drops axes of length 1 that meet a longer one; raises where other lengths meet."""
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


def _squeeze(x, labels, label):
    axis = labels.index(label)
    rest = labels[:axis] + labels[axis + 1 :]
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


def _sum_to(x, labels, keep):
    """Takes diagonals of repeated labels and sums over those that are not kept."""
    if list(labels) == list(keep):
        return x
    letters = {label: chr(ord("a") + i) for i, label in enumerate(dict.fromkeys(labels))}
    source, target = ("".join(letters[label] for label in ls) for ls in (labels, keep))
    return jnp.einsum(f"{source}->{target}", _plain(x))


def _plain(x):
    """The operand as an array, where a product is not what is asked for."""
    if not is_quantized(x):
        return x
    inputs = x.base.inputs if isinstance(x, LowRank) else x.inputs
    if inputs is not None:
        raise ValueError(
            "What has `inputs` can only be multiplied; got a sum or a diagonal of "
            f"{x!r}. Use each of its labels once, in the output or in the other operand."
        )
    return x.dequantize()
