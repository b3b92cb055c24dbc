"""Products with QTensors that have an offset, by rows of a table that do not add it.

    x @ (w + offset) = x @ w + block_sums(x) @ offset

The second product has 1/g of the work of the first, where g elements share an offset.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import QTensor, blocks_between, scale_values, split
from .dispatch import Implementation
from .dot_spec import DotSpec, to_logical_order
from .operands import Operand, as_array, repeat_groups


def adding_offsets(row: Implementation) -> Implementation:
    """A row that multiplies without offsets, with their products added to its result."""

    def of_stripped(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda lhs, rhs, *spec: function(_strip(lhs), _strip(rhs), *spec)

    return dataclasses.replace(
        row,
        run=partial(_run, row.run),
        why_unsupported=of_stripped(row.why_unsupported),
        why_slower=of_stripped(row.why_slower),
        is_integer=of_stripped(row.is_integer),
        adds_offsets=True,
        # For `explain`, which selects among them; `run` gives them operands without offsets.
        fallback=tuple(map(adding_offsets, row.fallback)),
    )


def _run(run: Callable[..., jax.Array], lhs: Operand, rhs: Operand, spec: DotSpec) -> jax.Array:
    bare = _strip(lhs), _strip(rhs)
    terms = []
    if bare[1] is not rhs:
        terms += [_product((_sums(lhs, 0, rhs, spec), _offset(rhs, 1, spec)), spec)]
    if bare[0] is not lhs:
        terms += [_product((_offset(lhs, 0, spec), _sums(bare[1], 1, lhs, spec)), spec)]
    # Rounded to 16 bits once, after the sum.
    compute = np.dtype(jnp.float64 if spec.dtype == jnp.float64 else jnp.float32)
    out = run(*bare, dataclasses.replace(spec, dtype=compute))
    return (out + sum(terms)).astype(spec.dtype)


def _strip(x: Operand) -> Operand:
    if not isinstance(x, QTensor) or x.offset is None:
        return x
    return dataclasses.replace(x, offset=None)


def _sums(x: Any, side: int, other: Any, spec: DotSpec) -> jax.Array:
    """Sums of x over the contracted elements that meet one offset of the other operand."""
    values = jnp.asarray(as_array(x))
    values = values.astype(jnp.float64 if values.dtype == jnp.float64 else jnp.float32)
    counts = list(values.shape)
    for axis, met in zip(spec.contract[side], spec.contract[1 - side], strict=True):
        counts[axis] = other.offset.shape[met]
    values, inner = split(values, blocks_between(values.shape, tuple(counts)))
    return values.sum(inner).reshape(counts)


def _offset(x: Any, side: int, spec: DotSpec) -> jax.Array:
    """Offsets of x: one per element along its axes that are not contracted."""
    axes = [a for a in range(x.ndim) if a not in spec.contract[side]]
    return repeat_groups(scale_values(x.offset), x.codes.shape, axes)


def _product(operands: tuple[jax.Array, jax.Array], spec: DotSpec) -> jax.Array:
    left, right = operands
    compute = jnp.promote_types(left.dtype, right.dtype)
    out = lax.dot_general(
        left.astype(compute),
        right.astype(compute),
        (spec.contract, spec.batch),
        precision=spec.precision,
        out_sharding=spec.out_sharding,
    )
    return to_logical_order(out, spec)
