"""Finds the arrays of a program that are slices of sub-byte integers, or of floats in loops.

XLA on CPU copies the former one element at a time, and converts the whole stack of floats of 8 bits
or fewer: see `jaxquant/ops/scan.py` for the cost.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, Var

from ..core import bits_of
from .params import count_before_slices, inner_jaxprs
from .walker import Site


def is_narrow(x: Any) -> bool:
    """Whether XLA on CPU is slow to slice an array, or one of its shape and dtype, in loops."""
    return is_narrow_float(x) or _is_narrow_integer(x)


def _is_narrow_integer(x: Any) -> bool:
    dtype = getattr(x, "dtype", np.dtype(bool))
    return jnp.issubdtype(dtype, jnp.integer) and bits_of(dtype) < 8


def is_narrow_float(x: Any) -> bool:
    """Whether an array, or its shape and dtype, has floats of 8 bits or fewer."""
    dtype = getattr(x, "dtype", np.dtype(bool))
    return jnp.issubdtype(dtype, jnp.floating) and bits_of(dtype) <= 8


def is_sliced(variables: Sequence[Var | Literal | None], sliced: frozenset[Var]) -> bool:
    """Whether one of several operands is among the slices."""
    return any(isinstance(v, Var) and v in sliced for v in variables)


def add_slices(site: Site, sliced: frozenset[Var]) -> frozenset[Var]:
    """The slices known before an equation, with its results and the inputs of its inner jaxprs.

    Call it on each equation in the order of `walk`. A jaxpr can be called several times with
    different operands, so variables that are not slices in this call are removed.
    """
    eqn = site.eqn
    known = dict.fromkeys(eqn.outvars, False) | dict.fromkeys(_slices_made_by(site, sliced), True)
    first = count_before_slices(eqn)
    for jaxpr, operands, _ in inner_jaxprs(eqn):
        for place, (variable, operand) in enumerate(zip(jaxpr.invars, operands, strict=True)):
            is_cut = place >= first and is_narrow(variable.aval)
            known[variable] = is_cut or is_sliced([operand], sliced)
    return (sliced - known.keys()) | {v for v, is_slice in known.items() if is_slice}


def _slices_made_by(site: Site, sliced: frozenset[Var]) -> list[Var]:
    """Narrow results that are computed from slices, or smaller than the largest narrow operand.

    Elsewhere than in loops, XLA converts no more of an array of floats than what it slices.
    """
    eqn, is_slow = site.eqn, _is_narrow_integer if site.times == 1 else is_narrow
    if is_sliced(eqn.invars, sliced):
        return [v for v in eqn.outvars if is_narrow(v.aval)]
    largest = max((_size(v) for v in eqn.invars if is_slow(v.aval)), default=0)
    return [v for v in eqn.outvars if is_slow(v.aval) and _size(v) < largest]


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)
