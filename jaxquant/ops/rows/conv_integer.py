"""The row that convolves int8 codes by XLA, and what rows by codes share."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ...core import QTensor, scale_values
from ..dispatch import Implementation
from ..operands import why_unsupported_codes, why_unsupported_length


def run(lhs: QTensor, rhs: QTensor, spec: Any) -> jax.Array:
    """The convolution of the codes, scaled."""
    acc = spec.run(lhs.codes.astype(jnp.int8), rhs.codes.astype(jnp.int8), jnp.int32)
    return scaled(acc, lhs, rhs, spec)


def scaled(acc: jax.Array, lhs: QTensor, rhs: QTensor, spec: Any) -> jax.Array:
    """Sums of codes, in units of the result."""
    compute = jnp.float64 if spec.dtype == jnp.float64 else jnp.float32
    out = acc.astype(compute)
    for x, axis in zip((lhs, rhs), spec.dimension_numbers.out_spec, strict=False):
        shape = [-1 if a == axis else 1 for a in range(out.ndim)]
        out = out * scale_values(x.scale).astype(compute).reshape(shape)
    return out.astype(spec.dtype)


def why_unsupported(lhs: Any, rhs: Any, spec: Any) -> str | None:
    """Why these operands cannot be convolved as integers, or None."""
    for x, axes in zip((lhs, rhs), spec.dimension_numbers, strict=False):
        why_not = why_unsupported_codes(x)
        if why_not is not None or x.zero_point is not None:
            return why_not or "padding does not have a zero point"
        if (
            x.scale.size not in (1, x.codes.shape[axes[0]])
            or x.scale.shape[axes[0]] != x.scale.size
        ):
            return f"scales {x.scale.shape} change within an example or an output channel"
    if dict(spec.options)["batch_group_count"] != 1:
        return "batch groups mix the scales of examples"
    length = math.prod(rhs.codes.shape[a] for a in spec.dimension_numbers.rhs_spec[1:])
    return why_unsupported_length(length, lhs, rhs)


# XLA's GPU backend lacks the convolution of int8 to int32 (jax#7637).
ROW = Implementation("integer", run, why_unsupported, ("tpu",), is_integer=lambda *_: True)
