"""What runs, and why: a row for each quantized product of a function."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxprs_in_params

from ..jaxprs import chips, is_sliced, marker_p, marking, sliced_by, sliced_within
from ..ops import Choice, Record, bytes_of, operations_of
from .machines import Machine, machine_for
from .speeds import Measurement, measurement_for, speeds_near
from .table import Explanation, ExplanationRow


def explain(fn: Callable[..., Any], *args: Any, platform: str | None = None) -> Explanation:
    """Says how each quantized product of fn(*args) is computed, and what that costs.

    Nothing is computed: `fn` is traced. A product is a call of `dot_general`, `matmul`, `einsum`,
    `conv_general_dilated` or `ragged_dot` with a QTensor, also inside jit, loops, `vmap`, gradients
    and Keras layers. `take` multiplies nothing, and has no row; nor have the float products that
    gradients are made of.

    Args:
        fn: a function of arrays and pytrees of arrays, jitted or not.
        args: what it is given, or `jax.ShapeDtypeStruct`s in place of arrays.
        platform: "cpu", "tpu" or "gpu", or a machine: "v5e", "v6e", "h200". None for the default
            device. It need not be here.

    Returns:
        Explanation with one row per product. Branches of `cond` are all in it.

    Raises:
        ValueError: `fn` is no function, or the platform is another one.
    """
    if not callable(fn):
        raise ValueError(
            "explain takes a function and its arguments, as in explain(jq.matmul, x, q); got "
            f"{fn!r}."
        )
    machine = machine_for(platform)
    chip = _chip(platform, machine)
    with marking():
        program = jax.make_jaxpr(fn)(*args)
    found = list(_marks(program.jaxpr, machine, set()))
    measured = [measurement_for(machine.name, mark.record.lhs.dtype) for mark in found]
    rows = [_row(mark, machine, chip, m) for mark, m in zip(found, measured, strict=True)]
    used = [m for row, m in zip(rows, measured, strict=True) if m is not None and row.speeds]
    distinct = [m for i, m in enumerate(used) if m not in used[:i]]
    return Explanation(machine, tuple(distinct), tuple(rows))


@dataclasses.dataclass(frozen=True)
class _Mark:
    """A record that was found in a program, and whether an operand is a slice of narrow codes."""

    record: Record
    copies: tuple[int, int, int]
    within: tuple[JaxprEqn, ...]
    times: int | None
    is_sliced: bool


def _marks(
    jaxpr: Jaxpr,
    machine: Machine,
    sliced: set[Var],
    within: tuple[JaxprEqn, ...] = (),
    times: int | None = 1,
) -> Iterator[_Mark]:
    """The records in a program and in those inside of it, in order; adds to `sliced`."""
    for eqn in jaxpr.eqns:
        inside = (*within, eqn)
        if eqn.primitive is marker_p:
            cut = is_sliced(eqn.invars, sliced)
            yield _Mark(eqn.params["record"], eqn.params["copies"], inside, times, cut)
        for inner, trips in _inner(eqn, machine):
            repeated = None if times is None or trips is None else times * trips
            there = sliced_within(eqn, inner, sliced)
            yield from _marks(inner, machine, there, inside, repeated)
        sliced |= sliced_by(eqn, sliced)


def _inner(eqn, machine) -> Iterator[tuple[Jaxpr, int | None]]:
    """The programs inside of an operation, and how often each runs; None for unknown."""
    trips = _TRIPS.get(eqn.primitive.name, lambda params: 1)(eqn.params)
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        yield from ((inner, trips) for inner in jaxprs_in_params(eqn.params))
        return
    # One branch per platform: `jax.lax.platform_dependent`. None names all others.
    is_ours = [names is not None and machine.lowering in names for names in platforms]
    chosen = is_ours.index(True) if any(is_ours) else platforms.index(None)
    yield eqn.params["branches"][chosen].jaxpr, trips


_TRIPS = dict.fromkeys(("scan", "copying_scan"), lambda params: params["length"])
_TRIPS |= {"while": lambda params: None}


def _row(
    mark: _Mark, machine: Machine, chip: str | None, measurement: Measurement | None
) -> ExplanationRow:
    record, choice = mark.record, _choice(mark.record, machine, chip)
    size, operations = bytes_of(record, mark.copies), operations_of(record, mark.copies)
    is_bound_by_memory = operations < size * machine.operations_per_byte(choice.is_integer)
    speeds = () if measurement is None else _speeds(mark, choice, measurement)
    trips = 1 if mark.times is None else mark.times
    return ExplanationRow(
        path=_path(mark.within),
        line=_line(mark.within),
        operation=record.operation,
        shapes=(record.lhs.shape, record.rhs.shape, record.shape),
        formats=_formats(record),
        implementation=choice.implementation,
        is_forced=record.is_forced,
        refusals=choice.refusals,
        is_integer=choice.is_integer,
        copies=mark.copies[0],
        times=mark.times,
        bytes=trips * size,
        operations=trips * operations,
        bound="memory" if is_bound_by_memory else "arithmetic",
        speeds=speeds,
        warning=_warning(mark, choice, machine, speeds, measurement),
    )


def _chip(platform: str | None, machine: Machine) -> str | None:
    """The chip that is asked about: this process' own, unless another one is named."""
    here = chips.generation() if platform in (None, machine.platform) else None
    return here or machine.name


def _choice(record: Record, machine: Machine, chip: str | None) -> Choice:
    """That of the chip, else that of its platform, else that of all others."""
    found = {(choice.platform, choice.chip): choice for choice in record.choices}
    keys = (machine.lowering, chip), (machine.lowering, None), (None, None)
    return next(found[key] for key in keys if key in found)


def _formats(record):
    """Inputs in the words for inputs, weights in those for weights."""
    lhs, rhs = record.lhs, record.rhs
    return (lhs.inputs, rhs.weights) if rhs.is_quantized else (lhs.weights, rhs.inputs)


def _speeds(mark, choice, measurement):
    record = mark.record
    if record.rows is None or mark.copies[0] > 1:
        return ()
    inputs = record.lhs.inputs if record.lhs.is_quantized else "float"
    key = (record.rhs.inputs, inputs, choice.implementation)
    lines = [s for s in measurement.speeds if (s.weights, s.inputs, s.implementation) == key]
    columns = math.prod(record.rhs.shape) // max(record.length, 1)
    return speeds_near(lines, (record.length, columns), record.rows)


def _warning(mark, choice, machine, speeds, measurement):
    """What is slower than it need be, or None."""
    words = []
    # Where a product copies codes itself, that costs as much as slices of them.
    if mark.is_sliced and choice.copies_no_codes and not machine.slices_4_bits:
        words.append(
            "XLA copies 4-bit weights one by one where it slices them: use jaxquant.scan "
            "(without gradients), or keep layers apart"
        )
    found = [speed for *_, speed in speeds]
    if found and min(found) < 1:
        verb = "is" if max(found) < 1 else "may be"
        source = ", by estimate" if measurement.is_estimate else ""
        words.append(f"{measurement.reference} {verb} faster{source}")
    return "; ".join(words) or None


def _path(within):
    """Name scopes and jitted functions, from the outside in, without the one that is our own."""
    names = []
    for place, eqn in enumerate(within):
        names.append(str(eqn.source_info.name_stack))
        is_users = _is_jit(eqn) and place != _own_jit(within)
        names.append(f"jit({eqn.params['name']})" if is_users else "")
    return "/".join(filter(None, names))


def _is_jit(eqn):
    return "in_shardings" in eqn.params


def _own_jit(within):
    """The place of our operation: the innermost jitted function. 0 under `jax.disable_jit`."""
    return max((i for i, eqn in enumerate(within) if _is_jit(eqn)), default=0)


# Ours, those installed beside JAX, and Python's own.
_LIBRARIES = tuple(
    f"{folder}{os.sep}"
    for folder in (
        pathlib.Path(__file__).parents[1],
        pathlib.Path(jax.__file__).parents[1],
        pathlib.Path(os.__file__).parent,
    )
)


def _line(within):
    """Where the innermost function that is in no library asked for the product.

    Inside our operation lines are those of the first call, as it is traced once for all.
    """
    traceback = within[_own_jit(within)].source_info.traceback
    frames = [] if traceback is None else traceback.frames
    users = (f for f in frames if not f.file_name.startswith(_LIBRARIES))
    return next((f"{os.path.basename(f.file_name)}:{f.line_num}" for f in users), "")
