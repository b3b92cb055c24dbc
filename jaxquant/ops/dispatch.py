"""Which computation runs: rows of a table, tried in order, per operands and platform."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax import lax

from ..core import Deferred, LowRank, QTensor
from ..jaxprs import chips, is_sharded, mark
from . import record
from .record import Choice, Record

Operand = jax.Array | np.ndarray | QTensor
# What an operation may be given for an operand.
Factor = Operand | Deferred | LowRank


class Spec(Protocol):
    """What an operation is asked for, beside its operands."""

    @property
    def operation(self) -> str:
        """Name of the function of `jax.lax`."""
        ...

    def length(self, lhs: Any, rhs: Any) -> int:
        """Products that are added for one element of the result."""
        ...

    def rows(self, lhs: Any, rhs: Any) -> int | None:
        """Rows of inputs, where one matrix on the right multiplies them all; else None."""
        ...


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation on quantized operands: a row of the operation's table.

    Attributes:
        name: what `implementation=` forces.
        run: (lhs, rhs, spec) -> result.
        why_unsupported: (lhs, rhs, spec) -> why it cannot compute these operands, or None.
        platforms: where it is selected automatically; None for everywhere.
        why_slower: (lhs, rhs, spec, chip) -> why it is not selected automatically although
            supported, or None; chip is a TPU generation in `chips.TUNED`, or None for all others.
        is_integer: (lhs, rhs, spec) -> whether it multiplies codes as integers.
        reads_packed: whether it reads sub-byte codes packed, without unpacking them first.
        fallback: rows that it tries instead, in order, where XLA partitions the program; empty if
            XLA can partition this row.
    """

    name: str
    run: Callable[[Operand, Operand, Any], jax.Array]
    why_unsupported: Callable[[Operand, Operand, Any], str | None]
    platforms: tuple[str, ...] | None = None
    why_slower: Callable[[Operand, Operand, Any, str | None], str | None] = lambda *_: None
    is_integer: Callable[[Operand, Operand, Any], bool] = lambda lhs, rhs, spec: False
    reads_packed: bool = False
    fallback: "Table" = ()


Table = tuple[Implementation, ...]

# Platforms with rows of their own, and their chips that have; all others share a choice.
_PLATFORMS: dict[str, tuple[str, ...]] = {"cpu": (), "tpu": chips.TUNED, "cuda": ()}
_OTHERS = "default"


def run(
    table: Table, lhs: Operand, rhs: Operand, spec: Spec, implementation: str | None
) -> jax.Array:
    """Runs the first row that can compute the operation, or the one that is asked for.

    Raises:
        ValueError: no row has the name `implementation`, or that row cannot run these operands.
    """
    platforms = (*_PLATFORMS, _OTHERS)
    if implementation is None:
        found = {p: _choose_by_chip(table, lhs, rhs, spec, p) for p in platforms}
    else:
        forced = _forced(table, lhs, rhs, spec, implementation), ()
        found = {p: {None: forced} for p in platforms}
    out = _computed(found, lhs, rhs, spec)

    def make_record():
        return _record(lhs, rhs, spec, out, found, is_forced=implementation is not None)

    return mark(out, _stored(lhs), _stored(rhs), make_record)


def run_on(table: Table, lhs: Operand, rhs: Operand, spec: Any, platform: str) -> jax.Array:
    """Runs the first row that can compute the operation in programs for one platform."""
    return _by_chip(_choose_by_chip(table, lhs, rhs, spec, platform), lhs, rhs, spec)


def _stored(x):
    return x.codes if isinstance(x, QTensor) else x


def _computed(found, lhs, rhs, spec):
    ((default, _),) = found[_OTHERS].values()
    # A platform that does as all others do needs no branch, which would be traced again.
    own = {p: rows for p, rows in found.items() if any(row != default for row, _ in rows.values())}
    if not own:
        return default.run(lhs, rhs, spec)

    def runner(rows):
        return lambda lhs, rhs: _by_chip(rows, lhs, rhs, spec)

    branches = {p: runner(rows) for p, rows in own.items()}
    return lax.platform_dependent(lhs, rhs, **branches, default=runner(found[_OTHERS]))


def _by_chip(found, lhs, rhs, spec):
    """Runs the row of the chip that the program is compiled for."""
    default, _ = found[None]
    own = {chip: row for chip, (row, _) in found.items() if row != default}
    if not own:
        return default.run(lhs, rhs, spec)
    leaves, treedef = jax.tree.flatten((lhs, rhs))

    def runner(row):
        return lambda *leaves: row.run(*jax.tree.unflatten(treedef, leaves), spec)

    branches = {chip: runner(row) for chip, row in own.items()}
    return chips.by_generation(branches, runner(default), *leaves)


def _record(lhs, rhs, spec, out, found, is_forced):
    return Record(
        operation=spec.operation,
        lhs=record.operand_record(lhs),
        rhs=record.operand_record(rhs),
        shape=out.shape,
        result_bytes=out.size * out.dtype.itemsize,
        length=spec.length(lhs, rhs),
        rows=spec.rows(lhs, rhs),
        choices=tuple(_choices(found, lhs, rhs, spec)),
        is_forced=is_forced,
    )


def _choices(found, lhs, rhs, spec):
    for platform, rows in found.items():
        for chip, (row, not_selected) in rows.items():
            yield _choice(row, not_selected, lhs, rhs, spec, platform, chip, False)
            if not row.fallback:
                continue
            while row.fallback:
                last = row.name, "XLA cannot partition it among devices"
                row, more = _choose(row.fallback, lhs, rhs, spec, platform, chip)
                not_selected = (*not_selected, last, *more)
            yield _choice(row, not_selected, lhs, rhs, spec, platform, chip, True)


def _choice(row, not_selected, lhs, rhs, spec, platform, chip, is_partitioned):
    return Choice(
        platform=platform if platform in _PLATFORMS else None,
        chip=chip,
        is_partitioned=is_partitioned,
        implementation=row.name,
        is_integer=row.is_integer(lhs, rhs, spec),
        reads_packed=row.reads_packed,
        not_selected=not_selected,
    )


def choose(
    table: Table, lhs: Operand, rhs: Operand, spec: Any, platform: str, chip: str | None = None
) -> Implementation:
    """The first row for the platform that can compute the operation. The last always can."""
    return _choose(table, lhs, rhs, spec, platform, chip)[0]


def _choose_by_chip(table, lhs, rhs, spec, platform):
    """What `_choose` finds, by the chips of a platform; None for all that are not named."""
    # What is chosen as a program is lowered is traced outside of a mesh with explicit axes.
    is_explicit = any(is_sharded(x) for x in jax.tree.leaves((lhs, rhs)))
    named = () if is_explicit else _PLATFORMS.get(platform, ())
    return {chip: _choose(table, lhs, rhs, spec, platform, chip) for chip in (None, *named)}


def _choose(table, lhs, rhs, spec, platform, chip):
    """The row, and why those before it that are for the platform were not taken."""
    not_selected = []
    for row in table[:-1]:
        if row.platforms is not None and platform not in row.platforms:
            continue
        why_not = row.why_unsupported(lhs, rhs, spec) or row.why_slower(lhs, rhs, spec, chip)
        if why_not is None:
            return row, tuple(not_selected)
        not_selected.append((row.name, why_not))
    return table[-1], tuple(not_selected)


def _forced(table, lhs, rhs, spec, name):
    rows = {row.name: row for row in table}
    if name not in rows:
        raise ValueError(
            f"implementation must be one of {', '.join(rows)}, or None to choose; got {name!r}."
        )
    why_not = rows[name].why_unsupported(lhs, rhs, spec)
    if why_not is not None:
        chip = chips.generation()
        able = [
            row.name
            for row in table
            if (row.why_unsupported(lhs, rhs, spec) or row.why_slower(lhs, rhs, spec, chip)) is None
        ]
        raise ValueError(
            f"implementation={name!r} cannot run {_describe(lhs)} by {_describe(rhs)}: "
            f"{why_not}. Choose {' or '.join(able)}, or None."
        )
    return rows[name]


def _describe(x):
    return repr(x) if isinstance(x, QTensor) else f"{x.dtype} {x.shape}"
