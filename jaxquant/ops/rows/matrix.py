"""Products along several axes, such as those of attention, as rows times one matrix.

Where the weights are stored with their contracted axes last, such as (heads, size, K), they are a
matrix (N, K) without being copied.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from ...core import QTensor, scale_values
from ..dot_spec import DotSpec, to_logical_order
from ..operands import Operand, repeat_groups


def why_not_a_matrix(lhs: Operand, rhs: Any, spec: DotSpec) -> str | None:
    """Why this is not rows times one matrix, stored with its contracted axes last, or None."""
    if not isinstance(rhs, QTensor):
        return "the right operand is not quantized"
    pairs = sorted(zip(*reversed(spec.contract), strict=True))
    axes = [list(side) for side in zip(*pairs, strict=True)]
    last = [[*range(x.ndim - len(pairs), x.ndim)] for x in (rhs, lhs)]
    if spec.batch[1] or not 0 < len(pairs) < rhs.ndim or axes[0] != last[0]:
        return "the right operand is not stored as a matrix whose last axis is contracted"
    if axes[1] != last[1]:
        return "the left operand is not contracted along its last axes, in their order"
    return None


def as_matrix(lhs: Operand, rhs: QTensor, spec: DotSpec) -> tuple[Operand, QTensor, DotSpec]:
    """The same product as rows (..., K) times a matrix (N, K).

    Args:
        lhs, rhs, spec: as `why_not_a_matrix` supports them.
    """
    count = len(spec.contract[1])
    if rhs.ndim == 2:
        return lhs, rhs, spec
    rows, columns = lhs.ndim - count, rhs.ndim - count
    lhs = _joined(lhs, [*([a] for a in range(rows)), [*range(rows, lhs.ndim)]])
    rhs = _joined(rhs, [[*range(columns)], [*range(columns, rhs.ndim)]])
    spec = dataclasses.replace(
        spec, contract=((rows,), (1,)), permutation=tuple(range(rows + 1)), out_sharding=None
    )
    return lhs, rhs, spec


def by_matrix(
    run: Callable[..., jax.Array], lhs: Operand, rhs: QTensor, spec: DotSpec
) -> jax.Array:
    """The product by `run`, which multiplies what `as_matrix` returns."""
    out = run(*as_matrix(lhs, rhs, spec))
    if rhs.ndim == 2:
        return out
    lengths = [rhs.codes.shape[a] for a in spec.free(rhs, 1)]
    return to_logical_order(out.reshape(*out.shape[:-1], *lengths), spec)


def about(question: Callable[..., Any], view: Callable[..., Any], lhs: Any, rhs: Any) -> Any:
    """question(*view(lhs, rhs)), by shapes and dtypes alone: nothing becomes part of a program."""
    answers = []

    def ask(lhs: Any, rhs: Any) -> None:
        answers.append(question(*view(lhs, rhs)))

    jax.eval_shape(ask, lhs, rhs)
    return answers[0]


def _joined(x: Any, groups: list[list[int]]) -> Any:
    """An operand, or what it has per block, whose axes of each group have become one."""
    if not isinstance(x, QTensor):
        return x.reshape([math.prod(x.shape[a] for a in group) for group in groups])

    def per_block(values: Any) -> Any:
        return (
            None if values is None else _joined(_mergeable(values, x.codes.shape, groups), groups)
        )

    return dataclasses.replace(
        x,
        codes=_joined(x.codes, groups),
        scale=per_block(scale_values(x.scale) if isinstance(x.scale, QTensor) else x.scale),
        zero_point=per_block(x.zero_point),
        inputs=None,
        order=None,
    )


def _mergeable(values: jax.Array, shape: tuple[int, ...], groups: list[list[int]]) -> jax.Array:
    """Values per block, repeated so that blocks lie within the last axis of a group that varies."""
    for group in groups:
        varying = [a for a in group if values.shape[a] > 1]
        values = repeat_groups(values, shape, [a for a in group if a < max(varying, default=0)])
    return values
