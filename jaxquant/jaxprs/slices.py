"""Finds the arrays of a program that are slices of sub-byte arrays.

XLA on CPU copies such elements one at a time: see `jaxquant/ops/scan.py` for the cost.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from ..core import bits_of
from .params import count_before_slices, inner_jaxprs


def is_narrow(x: Any) -> bool:
    """Whether an array, or its shape and dtype, has elements of less than a byte."""
    dtype = getattr(x, "dtype", np.dtype(bool))
    is_number = any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating))
    return is_number and bits_of(dtype) < 8


def is_sliced(variables: Sequence[Var | Literal | None], sliced: frozenset[Var]) -> bool:
    """Whether one of several operands is among the slices."""
    return any(isinstance(v, Var) and v in sliced for v in variables)


def add_slices(eqn: JaxprEqn, sliced: frozenset[Var]) -> frozenset[Var]:
    """The slices known before an equation, with its results and the inputs of its inner jaxprs.

    Call it on each equation in the order of `walk`. A jaxpr can be called several times with
    different operands, so variables that are not slices in this call are removed.
    """
    known = dict.fromkeys(eqn.outvars, False) | dict.fromkeys(_slices_made_by(eqn, sliced), True)
    first = count_before_slices(eqn)
    for jaxpr, operands, _ in inner_jaxprs(eqn):
        for place, (variable, operand) in enumerate(zip(jaxpr.invars, operands, strict=True)):
            is_cut = place >= first and is_narrow(variable.aval)
            known[variable] = is_cut or is_sliced([operand], sliced)
    return (sliced - known.keys()) | {v for v, is_slice in known.items() if is_slice}


def _slices_made_by(eqn: JaxprEqn, sliced: frozenset[Var]) -> list[Var]:
    """Narrow results that are smaller than the largest narrow operand, or computed from slices."""
    results = [v for v in eqn.outvars if is_narrow(v.aval)]
    if is_sliced(eqn.invars, sliced):
        return results
    largest = max((_size(v) for v in eqn.invars if is_narrow(v.aval)), default=0)
    return [v for v in results if _size(v) < largest]


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)
