"""Which results of a program are inputs that it only passes on."""

from typing import Any

from .evaluate import closed
from .params import Literal, scan_counts

# Primitives that run one program once, on their operands, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


def passed_on(program: Any) -> list[int | None]:
    """For each result of a program the number of the input that it is, or None.

    Looks into calls, checkpoints and scans. An output of a scan that consists of all slices of an
    input is that input.

    Args:
        program: a jaxpr, with its constants or without any.
    """
    jaxpr = closed(program).jaxpr
    sources = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for result, place in zip(eqn.outvars, _passed_on_by(eqn), strict=True):
            operand = None if place is None else eqn.invars[place]
            if _is_variable(operand) and operand in sources:
                sources[result] = sources[operand]
    return [sources.get(v) if _is_variable(v) else None for v in jaxpr.outvars]


def _passed_on_by(eqn):
    name, nothing = eqn.primitive.name, [None] * len(eqn.outvars)
    if name == "scan":
        return _passed_on_by_scan(eqn)
    program = eqn.params.get(_CALLS.get(name))
    return nothing if program is None else passed_on(program)


def _passed_on_by_scan(eqn):
    num_consts, num_carried = scan_counts(eqn.params)
    first = num_consts + num_carried
    places = passed_on(eqn.params["jaxpr"])
    carried = [p if p == num_consts + i else None for i, p in enumerate(places[:num_carried])]
    outputs = [None if p is None or p < first else p for p in places[num_carried:]]
    return [*carried, *outputs]


def _is_variable(atom):
    return atom is not None and not isinstance(atom, Literal)
