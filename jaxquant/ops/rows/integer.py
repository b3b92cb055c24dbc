"""The row that multiplies codes as integers and scales the result.

With sums over k of n contracted elements,

    out = scale_l * scale_r * (sum c_l c_r - z_l sum c_r - z_r sum c_l + n z_l z_r)

Source: Jacob et al. 2018, arXiv:1712.05877, eq. 7.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...core import QTensor, scale_values
from ...kernels import integer_dot
from ..dispatch import Implementation
from ..dot_spec import DotSpec, in_result, to_logical_order
from ..operands import Operand, why_unsupported_codes, why_unsupported_length


def run(
    lhs: QTensor, rhs: QTensor, spec: DotSpec, dot: Callable[..., jax.Array] = integer_dot
) -> jax.Array:
    """Multiplies int8 codes by `dot`, subtracts the zero points' share and applies the scales."""
    out = dot(
        lhs.codes.astype(jnp.int8),
        rhs.codes.astype(jnp.int8),
        (spec.contract, spec.batch),
        spec.out_sharding,
    )
    out = out + _zero_point_terms(lhs, rhs, spec)
    compute = jnp.float64 if spec.dtype == jnp.float64 else jnp.float32
    out = out.astype(compute)
    for side, x in enumerate((lhs, rhs)):
        scale = scale_values(x.scale).astype(compute)
        out = out * in_result(scale, side, (lhs, rhs), spec)
    return to_logical_order(out.astype(spec.dtype), spec)


def why_unsupported(lhs: Any, rhs: Any, spec: DotSpec) -> str | None:
    """Why these operands cannot be multiplied as integers, or None."""
    for x, axes in zip((lhs, rhs), spec.contract, strict=True):
        why_not = why_unsupported_codes(x)
        if why_not is not None:
            return why_not
        if x.zero_point is not None and not jnp.issubdtype(x.zero_point.dtype, jnp.integer):
            return f"zero points of {x.zero_point.dtype} are not integers"
        if any(x.scale.shape[a] > 1 for a in axes):
            return f"scales {x.scale.shape} change along the contracted axes"
    length = math.prod(lhs.codes.shape[a] for a in spec.contract[0])
    return why_unsupported_length(length, lhs, rhs)


def is_supported(lhs: Operand, rhs: Operand, spec: DotSpec) -> bool:
    """Whether these operands can be multiplied as integers."""
    return why_unsupported(lhs, rhs, spec) is None


def is_of_8_bits(lhs: Operand, rhs: Any, spec: DotSpec) -> bool:
    """Whether they can, and the weights on the right have 8-bit codes."""
    return rhs.format.bits == 8 and is_supported(lhs, rhs, spec)


def _zero_point_terms(lhs: QTensor, rhs: QTensor, spec: DotSpec) -> jax.Array:
    """-z_l sum c_r - z_r sum (c_l - z_l): sums of rows and columns, not a second product."""
    view = partial(in_result, operands=(lhs, rhs), spec=spec)
    lhs_sum, rhs_sum = (
        jnp.sum(x.codes.astype(jnp.int32), axes, keepdims=True)
        for x, axes in zip((lhs, rhs), spec.contract, strict=True)
    )
    terms, lhs_centered = jnp.int32(0), view(lhs_sum, 0)
    if lhs.zero_point is not None:
        length = math.prod(lhs.codes.shape[a] for a in spec.contract[0])
        zero = view(lhs.zero_point.astype(jnp.int32), 0)
        terms, lhs_centered = terms - zero * view(rhs_sum, 1), lhs_centered - length * zero
    if rhs.zero_point is not None:
        terms = terms - view(rhs.zero_point.astype(jnp.int32), 1) * lhs_centered
    return terms


ROW = Implementation("integer", run, why_unsupported, is_integer=is_supported)
