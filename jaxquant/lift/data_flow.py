"""Which values of a program depend on its arguments, and not only on counters and constants."""

from collections.abc import Sequence
from typing import Any

from ..jaxprs import Literal, carried_operands, inner_jaxprs


def dependent_variables(jaxpr: Any, is_data: Sequence[bool]) -> set[Any]:
    """The variables of a jaxpr, without those of jaxprs inside of it, that depend on data.

    Args:
        jaxpr: an open jaxpr.
        is_data: whether each of its inputs is data.
    """
    found = {v for v, b in zip(jaxpr.invars, is_data, strict=True) if b}
    for eqn in jaxpr.eqns:
        flags = are_in(found, eqn.invars)
        if any(flags):
            found.update(v for v, b in zip(eqn.outvars, _results(eqn, flags), strict=True) if b)
    return found


def are_in(found: set[Any], atoms: Sequence[Any]) -> list[bool]:
    """Whether each of these variables and literals is a variable that was found."""
    return [not isinstance(v, Literal) and v in found for v in atoms]


def _results(eqn, flags):
    """Whether each result of an equation depends on data, if operands with a flag do."""
    found = _inner_results(eqn, after_steps(eqn, flags))
    return [True] * len(eqn.outvars) if found is None else found


def after_steps(eqn: Any, flags: Sequence[bool]) -> list[bool]:
    """Whether each operand depends on data, where what a loop carries does so after some steps."""
    flags, before = list(flags), None
    carried = carried_operands(eqn)
    while carried and flags != before:
        before = list(flags)
        for place, b in zip(carried, _inner_results(eqn, flags) or (), strict=False):
            flags[place] = flags[place] or b
    return flags


def _inner_results(eqn, flags):
    """The flags of results, by the jaxprs inside of an equation; None if all depend on data."""
    inner = inner_jaxprs(eqn)
    passed = {id(v) for each in inner for v in each.operands}
    if any(b and id(v) not in passed for v, b in zip(eqn.invars, flags, strict=True)):
        return None  # Such as the index that selects a branch.
    every = [
        are_in(dependent_variables(each.jaxpr, inner_flags(eqn, each, flags)), each.jaxpr.outvars)
        for each in inner
    ]
    # The condition of a loop is the first of two.
    results = every[-1:] if carried_operands(eqn) else every
    if not results or any(len(those) != len(eqn.outvars) for those in results):
        return None
    return [any(those) for those in zip(*results, strict=True)]


def inner_flags(eqn: Any, inner: Any, flags: Sequence[bool]) -> list[bool]:
    """Whether each input of a jaxpr inside of an equation depends on data, as its operand does."""
    known = {id(v): b for v, b in zip(eqn.invars, flags, strict=True)}
    return [v is not None and known.get(id(v), False) for v in inner.operands]
