"""`einsum` on quantized operands: parses the subscripts and contracts pairs of operands."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..jaxprs import OutSharding
from .dot import dot_by_labels
from .dot_spec import DotOptions
from .labels import as_plain, hidden_labels, ordered
from .operands import OperandLike, as_operands, is_quantized


def einsum(
    subscripts: str,
    /,
    *operands: OperandLike,
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

    Example:
        >>> w = jq.quantize(jnp.ones((8, 4)), jq.ArrayConfig(), axis=0)
        >>> jq.einsum("btk,kn->btn", jnp.ones((2, 3, 8)), w).shape
        (2, 3, 4)
    """
    if not isinstance(subscripts, str):
        raise ValueError(
            "subscripts must be one string, such as 'btd,dh->bth'; got "
            f"{type(subscripts).__name__}."
        )
    operands = as_operands(operands, implementation)
    if len(operands) < 2 or not any(map(is_quantized, operands)):
        return jnp.einsum(
            subscripts,
            *map(as_plain, operands),
            optimize=optimize,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    labels, out_labels = _parse(subscripts, operands)
    options = DotOptions(precision, preferred_element_type, None, implementation)
    result, result_labels = operands[0], labels[0]
    for i in range(1, len(operands) - 1):
        wanted = set(out_labels).union(*labels[i + 1 :])
        keep = ordered(result_labels + labels[i], wanted)
        result = dot_by_labels(result, result_labels, operands[i], labels[i], keep, options)
        result_labels = keep
    options = dataclasses.replace(options, out_sharding=out_sharding)
    return dot_by_labels(result, result_labels, operands[-1], labels[-1], out_labels, options)


def _parse(subscripts: str, operands: Sequence[Any]) -> tuple[list[list[str]], list[str]]:
    """Labels of each operand and of the result. An ellipsis becomes labels too."""
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
    return labels, hidden_labels(dots) + letters


def _expand(term: str, ndim: int, subscripts: str) -> list[str]:
    """One label per axis; an axis under an ellipsis is "...i", counted from its end."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after)
    if (not (before + after).isalpha() and before + after) or hidden < 0 or (hidden and not dots):
        raise ValueError(
            f"subscripts must have one letter per axis; got {term!r} in {subscripts!r} for an "
            f"operand of {ndim} axes."
        )
    return [*before, *hidden_labels(hidden), *after]
