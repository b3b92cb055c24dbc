"""Selects the row of a table that computes an operation, by operands and platform, and runs it."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import jax
from jax import lax

from ..core import QTensor
from ..jaxprs import Function, chips, is_sharded, mark
from . import record
from .gradient import tangent_of
from .inputs import observe, treat, treat_straight_through
from .operands import Operand, as_array, as_stored, has_symbolic_shape
from .record import Choice, Record
from .shares import Shares, on_own_parts, own_shapes
from .spec import Spec


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation on quantized operands: a row of the operation's table.

    Attributes:
        name: the value of `implementation=` that forces it.
        run: (lhs, rhs, spec) -> result.
        why_unsupported: (lhs, rhs, spec) -> why it cannot compute these operands, or None.
        platforms: where it is selected automatically; None for everywhere.
        why_slower: (lhs, rhs, spec, chip) -> why it is not selected automatically although
            supported, or None; chip is a TPU generation in `chips.TUNED`, or None for all others.
        is_integer: (lhs, rhs, spec) -> whether it multiplies codes as integers.
        reads_packed: whether it reads sub-byte codes packed, without unpacking them first.
        adds_offsets: whether it supports operands with an offset.
        fallback: rows that it tries instead, in order, where XLA partitions the program; empty if
            XLA can partition this row.
        parts: (lhs, rhs, spec) -> (number of parts along each stored axis of rhs, shapes of the
            parts of both) for each way to divide them. Given if each device runs it on its part of
            what XLA partitions, outside `shard_map`, and `fallback` on parts that it does not
            support.
    """

    name: str
    run: Callable[..., jax.Array]
    why_unsupported: Callable[..., str | None]
    platforms: tuple[str, ...] | None = None
    why_slower: Callable[..., str | None] = lambda *_: None
    is_integer: Callable[..., bool] = lambda lhs, rhs, spec: False
    reads_packed: bool = False
    adds_offsets: bool = False
    fallback: "Table" = ()
    parts: Callable[..., Iterator[tuple[tuple[int, ...], Any, Any]]] | None = None


Table = tuple[Implementation, ...]
# (name, why it was passed over) of the rows before the one that is selected.
NotSelected = tuple[tuple[str, str], ...]
# The selected row by the chips of a platform; None for all that are not named.
Rows = dict[str | None, tuple[Implementation, NotSelected]]
Selected = dict[str, Rows]

# Platforms and chips that have their own rows; all others share one choice.
_PLATFORMS: dict[str, tuple[str, ...]] = {"cpu": (), "tpu": chips.TUNED, "cuda": ()}
_OTHERS = "default"


def run(
    table: Table,
    lhs: Operand,
    rhs: Operand,
    spec: Spec,
    implementation: str | None,
    *arrays: Any,
) -> jax.Array:
    """Runs the first row that supports the operands, or the one that is named.

    First, `inputs` are applied to the operands. The derivative is that of the last row on
    dequantized operands (see `gradient`).

    Args:
        table: rows, tried in order.
        lhs, rhs: at least one QTensor.
        spec: other arguments of the operation, hashable.
        implementation: the name of a row, or None.
        arrays: further arguments of the operation, without gradient.

    Raises:
        ValueError: no row has the name `implementation`, or that row does not support the operands.
    """
    if any(_is_tapped(x) for x in (lhs, rhs)):
        lhs, rhs, changed = observe(lhs, rhs, spec.with_arrays(*arrays))
        return changed(_run(lhs, rhs, arrays, table, spec, implementation))
    return _run(lhs, rhs, arrays, table, spec, implementation)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _run(
    lhs: Operand,
    rhs: Operand,
    arrays: tuple[Any, ...],
    table: Table,
    spec: Spec,
    implementation: str | None,
) -> jax.Array:
    spec = spec.with_arrays(*arrays)
    lhs, rhs = _without_values(lhs), _without_values(rhs)
    lhs, rhs, rows = treat(lhs, rhs, spec.contract, spec.channels)
    spec = spec.with_unquantized(rows)
    run_part = partial(_run_selected, table, implementation)
    shares, weights = spec.shares(lhs, rhs), cast(QTensor, rhs)
    if shares is not None and _is_for_parts(table, implementation, shares, lhs, rhs):
        return on_own_parts(shares, lhs, weights, run_part)
    return run_part(lhs, rhs, spec)


def _run_selected(
    table: Table, implementation: str | None, lhs: Operand, rhs: Operand, spec: Spec
) -> jax.Array:
    selected = _selected(table, lhs, rhs, spec, implementation)
    out = _on_platforms(selected, lhs, rhs, spec)

    def make_record():
        return _record(lhs, rhs, spec, out, selected, is_forced=implementation is not None)

    return mark(out, as_stored(lhs), as_stored(rhs), make_record)


def _is_for_parts(
    table: Table, implementation: str | None, shares: Shares, lhs: Operand, rhs: Any
) -> bool:
    """Whether devices multiply their parts: by kernels, or if they add less than XLA would."""
    spec, found = shares.own_spec, []

    def ask(lhs: Operand, rhs: QTensor) -> None:
        if implementation is None:
            selected = _selected(table, lhs, rhs, spec, None)
            found.extend(row for rows in selected.values() for row, _ in rows.values())
        else:
            found.extend(row for row in table if row.name == implementation)

        found[:] = [r for r in found if r.fallback and not r.why_unsupported(lhs, rhs, spec)]

    jax.eval_shape(ask, *own_shapes(shares, lhs, rhs))
    return bool(found) or shares.adds_halves(lhs, rhs)


def _selected(
    table: Table, lhs: Operand, rhs: Operand, spec: Spec, implementation: str | None
) -> Selected:
    """The rows that the platforms select, or the one that is named."""
    platforms = (*_PLATFORMS, _OTHERS)
    if implementation is None:
        return {p: select_rows(table, lhs, rhs, spec, p) for p in platforms}
    forced = _forced(table, lhs, rhs, spec, implementation), ()
    return {p: {None: forced} for p in platforms}


@partial(_run.defjvp, symbolic_zeros=True)
def _(
    table: Table, spec: Spec, implementation: str | None, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    def reference(lhs: Operand, rhs: Operand, arrays: tuple[Any, ...]) -> jax.Array:
        lhs, rhs = treat_straight_through(lhs, rhs, spec.contract, spec.channels)
        return table[-1].run(as_array(lhs), as_array(rhs), spec.with_arrays(*arrays))

    out = _run(*primals, table, spec, implementation)
    return out, tangent_of(reference, primals, tangents, out)


def run_on(table: Table, lhs: Operand, rhs: Operand, spec: Any, platform: str) -> jax.Array:
    """Runs the first row that supports the operands in programs for one platform."""
    return _on_chips(select_rows(table, lhs, rhs, spec, platform), lhs, rhs, spec)


def select_rows(table: Table, lhs: Operand, rhs: Operand, spec: Any, platform: str) -> Rows:
    """`select_row` by the chips of a platform; None for all that are not named."""
    # A row selected at lowering is traced outside of a mesh with explicit axes.
    is_explicit = any(is_sharded(x) for x in jax.tree.leaves((lhs, rhs)))
    named = () if is_explicit else _PLATFORMS.get(platform, ())
    return {chip: select_row(table, lhs, rhs, spec, platform, chip) for chip in (None, *named)}


def select_row(
    table: Table, lhs: Operand, rhs: Operand, spec: Any, platform: str, chip: str | None = None
) -> tuple[Implementation, NotSelected]:
    """The first row for a platform that supports the operands; the last row always does.

    Rows for some platforms only, which depend on sizes, are not for operands of symbolic shapes.

    Returns:
        The row, and (name, why it was passed over) of those before it that are for the platform.
    """
    not_selected = []
    platforms = () if has_symbolic_shape(lhs) or has_symbolic_shape(rhs) else (platform,)
    for row in table[:-1]:
        if row.platforms is not None and not {*platforms} & {*row.platforms}:
            continue
        why_not = row.why_unsupported(lhs, rhs, spec) or row.why_slower(lhs, rhs, spec, chip)
        if why_not is None:
            return row, tuple(not_selected)
        not_selected.append((row.name, why_not))
    return table[-1], tuple(not_selected)


def _is_tapped(x: Operand) -> bool:
    return isinstance(x, QTensor) and x.inputs is not None and x.inputs.tap is not None


def _without_values(x: Operand) -> Operand:
    return dataclasses.replace(x, values=None) if isinstance(x, QTensor) else x


def _on_platforms(selected: Selected, lhs: Operand, rhs: Operand, spec: Spec) -> jax.Array:
    """Runs the row of the platform that the program is lowered for."""
    ((default, _),) = selected[_OTHERS].values()
    # A platform with the same row as all others needs no branch, which would be traced again.
    own = {p: rows for p, rows in selected.items() if any(r != default for r, _ in rows.values())}
    if not own:
        return default.run(lhs, rhs, spec)

    def runner(rows: Rows) -> Function:
        return lambda lhs, rhs: _on_chips(rows, lhs, rhs, spec)

    branches = {p: runner(rows) for p, rows in own.items()}
    return lax.platform_dependent(lhs, rhs, **branches, default=runner(selected[_OTHERS]))


def _on_chips(rows: Rows, lhs: Operand, rhs: Operand, spec: Any) -> jax.Array:
    """Runs the row of the chip that the program is compiled for."""
    default, _ = rows[None]
    own = {chip: row for chip, (row, _) in rows.items() if chip and row != default}
    if not own:
        return default.run(lhs, rhs, spec)

    def runner(row: Implementation) -> Function:
        return lambda lhs, rhs, arrays: row.run(lhs, rhs, spec.with_arrays(*arrays))

    branches = {chip: runner(row) for chip, row in own.items()}
    return chips.by_generation(branches, runner(default), lhs, rhs, spec.arrays)


def _record(
    lhs: Operand, rhs: Operand, spec: Spec, out: jax.Array, selected: Selected, is_forced: bool
) -> Record:
    return Record(
        operation=spec.operation,
        lhs=record.operand_record(lhs),
        rhs=record.operand_record(rhs),
        shape=out.shape,
        result_bytes=out.size * out.dtype.itemsize,
        length=spec.length(lhs, rhs),
        rows=spec.rows(lhs, rhs),
        choices=tuple(_choices(selected, lhs, rhs, spec)),
        is_forced=is_forced,
        experts=None if spec.group_sizes is None else rhs.shape[0],
        convolution=spec.convolution(lhs, rhs),
    )


def _choices(selected: Selected, lhs: Operand, rhs: Operand, spec: Spec) -> Iterator[Choice]:
    for platform, rows in selected.items():
        for chip, (row, not_selected) in rows.items():
            choice = _choice(row, not_selected, lhs, rhs, spec, platform, chip)
            yield choice
            if not row.fallback:
                continue
            if row.parts is not None:
                others = tuple(_others_on_parts(row, lhs, rhs, spec, platform, chip))
                yield dataclasses.replace(
                    choice, is_partitioned=True, on_parts=True, others_on_parts=others
                )
            while row.fallback:
                last = row.name, "XLA cannot partition it among devices"
                row, more = select_row(row.fallback, lhs, rhs, spec, platform, chip)
                not_selected = (*not_selected, last, *more)
            choice = _choice(row, not_selected, lhs, rhs, spec, platform, chip)
            yield dataclasses.replace(choice, is_partitioned=True)


def _others_on_parts(
    row: Implementation,
    lhs: Operand,
    rhs: Operand,
    spec: Spec,
    platform: str,
    chip: str | None,
) -> Iterator[tuple[tuple[int, ...], Choice]]:
    """What runs on parts that a row does not support, by their numbers."""
    found: list[Choice] = []

    def select(lhs: Operand, rhs: Operand) -> None:
        why_not = row.why_unsupported(lhs, rhs, spec)
        if why_not is not None:
            other, more = select_row(row.fallback, lhs, rhs, spec, platform, chip)
            not_selected = (row.name, f"on parts of {as_stored(rhs).shape}: {why_not}"), *more
            found.append(_choice(other, not_selected, lhs, rhs, spec, platform, chip))

    for counts, left, right in row.parts(lhs, rhs, spec) if row.parts else ():
        found.clear()
        jax.eval_shape(select, left, right)
        yield from ((counts, choice) for choice in found)


def _choice(
    row: Implementation,
    not_selected: NotSelected,
    lhs: Operand,
    rhs: Operand,
    spec: Spec,
    platform: str,
    chip: str | None,
) -> Choice:
    return Choice(
        platform=platform if platform in _PLATFORMS else None,
        chip=chip,
        implementation=row.name,
        is_integer=row.is_integer(lhs, rhs, spec),
        reads_packed=row.reads_packed,
        not_selected=not_selected,
    )


def _forced(table: Table, lhs: Operand, rhs: Operand, spec: Spec, name: str) -> Implementation:
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


def _describe(x: Operand) -> str:
    return repr(x) if isinstance(x, QTensor) else f"{x.dtype} {x.shape}"
