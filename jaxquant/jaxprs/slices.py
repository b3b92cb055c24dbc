"""Which arrays of a program are slices of others with elements of less than a byte.

XLA on CPU copies such elements one at a time: `jaxquant/ops/scan.py` has what that costs.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core.primitives import scan_p

from ..core import bits_of


def is_narrow(x: Any) -> bool:
    """Whether an array, or what stands for one, has elements of less than a byte."""
    dtype = getattr(x, "dtype", np.dtype(bool))
    is_number = any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating))
    return is_number and bits_of(dtype) < 8


def count_before_slices(params: dict[str, Any]) -> int:
    """How many operands a `scan` has, by its parameters, before those that it goes over."""
    return params["num_consts"] + params["num_carry"]


def is_sliced(variables: Sequence[Var | Literal], sliced: set[Var]) -> bool:
    """Whether one of several operands is among the slices."""
    return any(_is_in(v, sliced) for v in variables)


def sliced_within(eqn: JaxprEqn, inner: Jaxpr, sliced: set[Var]) -> set[Var]:
    """Slices among the inputs of a program inside of an operation, given those outside."""
    # Some operations have further inputs, all before those of the program. Our own loop, which
    # copies bytes, is no `scan_p`.
    pairs = zip(reversed(eqn.invars), reversed(inner.invars), strict=False)
    loops_over = inner.invars[count_before_slices(eqn.params) :] if eqn.primitive is scan_p else []
    narrow = {v for v in loops_over if is_narrow(v.aval)}
    return narrow | {v for outer, v in pairs if _is_in(outer, sliced)}


def sliced_by(eqn: JaxprEqn, sliced: set[Var]) -> set[Var]:
    """Narrow results of an operation that are cut from larger arrays, or made of slices."""
    results = {v for v in eqn.outvars if is_narrow(v.aval)}
    if is_sliced(eqn.invars, sliced):
        return results
    largest = max((_size(v) for v in eqn.invars if is_narrow(v.aval)), default=0)
    return {v for v in results if _size(v) < largest}


def _size(variable):
    return math.prod(variable.aval.shape)


def _is_in(variable, sliced):
    return isinstance(variable, Var) and variable in sliced
