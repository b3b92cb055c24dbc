"""Which computation runs: rows of a table, tried in order, per operands and platform."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np
from jax import lax

from ..core import QTensor

Operand = jax.Array | np.ndarray | QTensor


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation on quantized operands: a row of the operation's table.

    Attributes:
        name: what `implementation=` forces.
        run: (lhs, rhs, spec) -> result.
        refusal: (lhs, rhs, spec) -> why these operands cannot be computed so, or None.
        platforms: where it is chosen by itself; None for everywhere.
        loses: (lhs, rhs, spec) -> why it is not chosen by itself where it could be, or None.
    """

    name: str
    run: Callable[[Operand, Operand, Any], jax.Array]
    refusal: Callable[[Operand, Operand, Any], str | None]
    platforms: tuple[str, ...] | None = None
    loses: Callable[[Operand, Operand, Any], str | None] = lambda lhs, rhs, spec: None


Table = tuple[Implementation, ...]

# Platforms with rows of their own; all others share a choice.
_PLATFORMS = ("cpu", "tpu")


def run(
    table: Table, lhs: Operand, rhs: Operand, spec: Hashable, implementation: str | None
) -> jax.Array:
    """Runs the first row that can compute the operation, or the one that is asked for.

    Raises:
        ValueError: no row has the name `implementation`, or that row cannot run these operands.
    """
    if implementation is not None:
        return _forced(table, lhs, rhs, spec, implementation).run(lhs, rhs, spec)
    rows = {p: choose(table, lhs, rhs, spec, p) for p in (*_PLATFORMS, "default")}
    if len(set(rows.values())) == 1:
        return rows["default"].run(lhs, rhs, spec)

    def runner(row):
        return lambda lhs, rhs: row.run(lhs, rhs, spec)

    return lax.platform_dependent(lhs, rhs, **{p: runner(row) for p, row in rows.items()})


def choose(
    table: Table, lhs: Operand, rhs: Operand, spec: Hashable, platform: str
) -> Implementation:
    """The first row for the platform that can compute the operation. The last always can."""
    for row in table[:-1]:
        is_for_platform = row.platforms is None or platform in row.platforms
        if not is_for_platform or row.refusal(lhs, rhs, spec) is not None:
            continue
        if row.loses(lhs, rhs, spec) is None:
            return row
    return table[-1]


def _forced(table, lhs, rhs, spec, name):
    rows = {row.name: row for row in table}
    if name not in rows:
        raise ValueError(
            f"implementation must be one of {', '.join(rows)}, or None to choose; got {name!r}."
        )
    why_not = rows[name].refusal(lhs, rhs, spec)
    if why_not is not None:
        able = [r.name for r in table if r.refusal(lhs, rhs, spec) is None]
        raise ValueError(
            f"implementation={name!r} cannot run {_describe(lhs)} by {_describe(rhs)}: "
            f"{why_not}. Choose {' or '.join(able)}, or None."
        )
    return rows[name]


def _describe(x):
    return repr(x) if isinstance(x, QTensor) else f"{x.dtype} {x.shape}"
