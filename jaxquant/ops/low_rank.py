"""Products with a quantized array that has low-rank adapters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import LowRank, QTensor
from ..jaxprs import OutSharding
from .dot_spec import DotOptions
from .operands import Operand


def with_low_rank(
    dot: Callable[..., jax.Array],
    lhs: Operand | LowRank,
    rhs: Operand | LowRank,
    dimension_numbers: lax.DotDimensionNumbers,
    options: DotOptions,
) -> jax.Array:
    """x @ (base + (alpha / rank) * a @ b) as two products, x on either side.

        out = dot(x, base) + (alpha / rank) * (x @ a) @ b

    If the product contracts the axes of `b` rather than those of `a`, x is multiplied with `b`
    first, so that the intermediate result has `rank` columns.

    Raises:
        ValueError: both operands have a low-rank part.
    """
    if isinstance(lhs, LowRank) and isinstance(rhs, LowRank):
        raise ValueError(
            f"One operand of a product may have adapters; got {lhs!r} and {rhs!r}. Merge one of "
            "them, with jaxquant.training.merge."
        )
    bases = (lax.stop_gradient(x.base) if isinstance(x, LowRank) else x for x in (lhs, rhs))
    # First, because it raises for shapes that do not match.
    out = dot(*bases, dimension_numbers, options)
    numbers = tuple(tuple(tuple(map(int, axes)) for axes in pair) for pair in dimension_numbers)
    return _add_low_rank(out, lhs, rhs, numbers, options.precision, options.out_sharding)


@partial(jax.jit, static_argnames=("numbers", "precision", "out_sharding"))
def _add_low_rank(
    out: jax.Array,
    lhs: Any,
    rhs: Any,
    numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike,
    out_sharding: OutSharding,
) -> jax.Array:
    lhs_labels, rhs_labels, out_labels = _labels(lhs, rhs, numbers)
    x, x_labels, w, w_labels = lhs, lhs_labels, rhs, rhs_labels
    if isinstance(lhs, LowRank):
        x, x_labels, w, w_labels = rhs, rhs_labels, lhs, lhs_labels
    compute = jnp.promote_types(x.dtype, w.dtype)
    x = x.dequantize() if isinstance(x, QTensor) else x
    labels = [*w_labels, lhs.ndim + rhs.ndim]  # The last is that of the axis between a and b.
    a, b = (([labels[i] for i in axes], y) for axes, y in zip(w.axes(), (w.a, w.b), strict=True))
    first, second = (a, b) if set(a[0]) - set(b[0]) - set(out_labels) else (b, a)
    wanted = {*second[0], *out_labels}
    between = [i for i in dict.fromkeys([*x_labels, *first[0]]) if i in wanted]
    x = jnp.asarray(x).astype(compute)
    narrow = jnp.einsum(
        x, x_labels, first[1].astype(compute), first[0], between, precision=precision
    )
    low_rank = jnp.einsum(
        narrow,
        between,
        second[1].astype(compute),
        second[0],
        out_labels,
        precision=precision,
        preferred_element_type=out.dtype,
        out_sharding=out_sharding,
    )
    return out + w.factor * low_rank


def _labels(
    lhs: Any, rhs: Any, numbers: lax.DotDimensionNumbers
) -> tuple[list[int], list[int], list[int]]:
    """One number per axis of the operands and of their product; matching axes share a number."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers
    lhs_labels = list(range(lhs.ndim))
    rhs_labels = list(range(lhs.ndim, lhs.ndim + rhs.ndim))
    for i, j in zip((*lhs_contract, *lhs_batch), (*rhs_contract, *rhs_batch), strict=True):
        rhs_labels[j] = lhs_labels[i]
    free = [i for i in lhs_labels + rhs_labels if (i in lhs_labels) != (i in rhs_labels)]
    return lhs_labels, rhs_labels, [lhs_labels[i] for i in lhs_batch] + free


def take_low_rank(
    take: Callable[..., jax.Array],
    a: LowRank,
    axis: int | None,
    fill_value: jax.typing.ArrayLike | None,
) -> jax.Array:
    """Rows of base + (alpha / rank) * a @ b, for a matrix.

    Args:
        take: `jaxquant.take` with its indices and hints.
        a: a matrix.
        axis, fill_value: as for `jaxquant.take`.

    Raises:
        ValueError: the request is not for rows of a matrix.
    """
    if a.ndim != 2 or axis not in (0, -2):
        raise ValueError(
            "take from an array with adapters is for rows of a matrix, axis 0; got axis "
            f"{axis} of {a!r}. Merge it first, with jaxquant.training.merge."
        )
    rows = take(lax.stop_gradient(a.base), axis=0, fill_value=fill_value)
    # `rows` already contains the filled values.
    narrow = take(a.a, axis=0, fill_value=0).astype(rows.dtype)
    low_rank = jnp.tensordot(narrow, a.b.astype(rows.dtype), 1)
    return rows + a.factor * low_rank
