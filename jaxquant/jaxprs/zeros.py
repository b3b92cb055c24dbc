"""Finds the results of a function that are zeros, without computing them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.core.primitives import broadcast_in_dim_p, convert_element_type_p, copy_p, jit_p

# Their results are zeros if their operands are.
_KEEP_ZEROS = (broadcast_in_dim_p, convert_element_type_p, copy_p)


def zero_results(function: Callable[..., Any], *args: Any) -> list[bool]:
    """For each array that `function(*args)` returns, whether it is certainly zero.

    Args:
        function: a traceable function, such as the `init` of an optimizer.
        args: its arguments, or abstract arrays.
    """
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _zeros_of(jaxpr, [False] * len(jaxpr.invars))


def _zeros_of(jaxpr: Jaxpr, inputs: list[bool]) -> list[bool]:
    """Which results of a jaxpr are zeros, from which of its inputs are."""
    zeros = {v for v, is_in in zip(jaxpr.invars, inputs, strict=True) if is_in}

    def is_zero(atom):
        if isinstance(atom, Literal):
            return bool(np.all(np.asarray(atom.val) == 0))
        return atom in zeros

    for eqn in jaxpr.eqns:
        found = _results_of(eqn, [is_zero(atom) for atom in eqn.invars])
        zeros.update(v for v, is_in in zip(eqn.outvars, found, strict=True) if is_in)
    return [is_zero(atom) for atom in jaxpr.outvars]


def _results_of(eqn: JaxprEqn, operands: list[bool]) -> list[bool]:
    if eqn.primitive in _KEEP_ZEROS:
        return [all(operands)]
    if eqn.primitive is jit_p:
        return _zeros_of(eqn.params["jaxpr"].jaxpr, operands)
    return [False] * len(eqn.outvars)
