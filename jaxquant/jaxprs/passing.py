"""Which results of a program are inputs that it only passes on."""

from collections.abc import Sequence
from typing import Any

from .params import (
    Literal,
    called_program,
    carried_operands,
    closed,
    scan_counts,
    while_counts,
)


def passed_on(program: Any) -> list[int | None]:
    """For each result of a program the number of the input that it is, or None.

    Looks into calls, checkpoints, loops and branches. An output of a scan that consists of all
    slices of an input is that input.

    Args:
        program: a jaxpr, with its constants or without any.
    """
    jaxpr = closed(program).jaxpr
    sources = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for result, place in zip(eqn.outvars, passed_operands(eqn), strict=True):
            operand = None if place is None else eqn.invars[place]
            if _is_variable(operand) and operand in sources:
                sources[result] = sources[operand]
    return [sources.get(v) if _is_variable(v) else None for v in jaxpr.outvars]


def passed_operands(eqn: Any) -> Sequence[int | None]:
    """For each result of an equation the number of the operand that it is, or None."""
    rule = _RULES.get(eqn.primitive.name)
    return [None] * len(eqn.outvars) if rule is None else rule(eqn)


def _call(eqn):
    """Of a primitive that runs a program once, on its operands."""
    program = called_program(eqn.params)
    return [None] * len(eqn.outvars) if program is None else passed_on(program)


def _scan(eqn):
    num_consts, num_carried = scan_counts(eqn.params)
    first = num_consts + num_carried
    places = passed_on(called_program(eqn.params))
    carried = [p if p == num_consts + i else None for i, p in enumerate(places[:num_carried])]
    outputs = [None if p is None or p < first else p for p in places[num_carried:]]
    return [*carried, *outputs]


def _while(eqn):
    carried = carried_operands(eqn)
    _, num_consts = while_counts(eqn.params)
    places = passed_on(eqn.params["body_jaxpr"])
    return [
        c if p == num_consts + i else None
        for i, (c, p) in enumerate(zip(carried, places, strict=True))
    ]


def _cond(eqn):
    branches = map(passed_on, eqn.params["branches"])
    every = [dict.fromkeys(places) for places in zip(*branches, strict=True)]
    same = [next(iter(places)) if len(places) == 1 else None for places in every]
    # The first operand selects the branch.
    return [None if p is None else p + 1 for p in same]


def _same(eqn):
    return range(len(eqn.outvars))


def _is_variable(atom):
    return atom is not None and not isinstance(atom, Literal)


_RULES = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
    "remat2": _call,
    "checkpoint": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "call_hi_primitive": _call,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
    "optimization_barrier": _same,
    "sharding_constraint": _same,
}
