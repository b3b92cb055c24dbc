"""The row that runs the native kernels for CPUs, one expert after another."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...core import QTensor, scale_values
from ...jaxprs import on_one_cpu
from ...kernels import cpu
from ..dispatch import Implementation, Table
from ..operands import Operand, as_array, repeat_groups
from .cpu_native import multiplies_codes, native_dtype, values_of_codes, why_unsupported_weights
from .kernel import kernel_or_xla, why_unsupported_experts

# Where experts (G, K, N) are stored with the contracted axis last.
_AXES = (0, 2, 1)


def row(fallback: Table) -> Implementation:
    """The row "native", with rows of XLA for programs that cannot hold kernels.

    XLA multiplies all rows by all experts, and dequantizes all of these; kernels multiply the rows
    of each expert by it, and read none without rows.
    """
    return Implementation(
        "native",
        partial(kernel_or_xla, kernel=_run, where=on_one_cpu, fallback=fallback, platform="cpu"),
        _why_unsupported,
        ("cpu",),
        is_integer=lambda lhs, rhs, spec: multiplies_codes(lhs, rhs),
        reads_packed=True,
        fallback=fallback,
    )


def _run(lhs: Operand, rhs: QTensor, spec: Any) -> jax.Array:
    rhs, sizes = spec.in_place(rhs)
    columns = partial(repeat_groups, shape=rhs.codes.shape, axes=(0, 1))
    scale = columns(scale_values(rhs.scale))
    zero = None if rhs.zero_point is None else columns(rhs.zero_point)
    table = jnp.asarray(values_of_codes(rhs.format)) if rhs.format.bits == 4 else None
    x, per_row, dtype = as_array(lhs), None, jnp.float32
    if isinstance(lhs, QTensor) and multiplies_codes(lhs, rhs):
        x, table, dtype = lhs.codes.astype(jnp.int8), None, native_dtype(spec.dtype)
        per_row = repeat_groups(scale_values(lhs.scale), lhs.codes.shape, (0,))[:, 0]
    out = cpu.ragged_dot(jnp.asarray(x), rhs.codes, scale, zero, sizes, per_row, table, dtype)
    return out.astype(spec.dtype)


def _why_unsupported(lhs: Operand, rhs: Any, spec: Any) -> str | None:
    why_not = why_unsupported_experts(lhs, rhs, spec, _AXES)
    if why_not is not None:
        return why_not
    if rhs.format.bits == 4 and rhs.codes.shape[2] % 2:
        return f"rows of {rhs.codes.shape[2]} codes of 4 bits do not fill whole bytes"
    by_codes = multiplies_codes(lhs, rhs)
    lengths = rhs.codes.shape[2], rhs.scale.shape[2]
    return why_unsupported_weights(rhs, by_codes, lengths) or cpu.unavailable()
