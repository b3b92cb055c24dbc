"""The row that runs the Pallas kernel for TPUs: rows times grouped 4-bit weights."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from ...core import QTensor, scale_values
from ...jaxprs import on_one_tpu
from ...kernels import pallas_tpu
from ..dispatch import Implementation, Table
from ..dot_spec import DotSpec, to_logical_order
from ..operands import Operand, repeat_groups
from . import integer
from .kernel import (
    FloatSupport,
    codes_and_scale,
    kernel_or_xla,
    why_unsupported_float64,
    why_unsupported_int4,
    why_unsupported_matrix,
)

# Rows of activations up to which the kernel beats XLA: with grouped scales, and with one per
# column. 4096 x 4096, microseconds: the larger of what the kernel's scheduled instructions and its
# bytes take, against XLA's own estimate. Groups of 128: v5e 12 against 24 for 8 rows, 44 against 53
# for 256, 690 against 757 for 4096; v6e 6 against 73, 14 against 84, 221 against 390. One per
# column: v5e 11 against 22, 44 against 63; v6e 5 against 15, 12 against 22, 200 against 191.
_MOST_ROWS: dict[str | None, tuple[float, float]] = {"v5e": (256, 256), "v6e": (math.inf, 256)}
FLOATS = FloatSupport((jnp.float32, jnp.bfloat16), pallas_tpu.ONE_PASS)


def row(fallback: Table) -> Implementation:
    """The row "pallas", with rows of XLA for programs that cannot hold the kernel."""
    return Implementation(
        "pallas",
        partial(kernel_or_xla, kernel=_kernel, where=on_one_tpu, fallback=fallback, platform="tpu"),
        why_unsupported,
        ("tpu",),
        _why_slower,
        reads_packed=True,
        fallback=fallback,
    )


def run(
    lhs: Operand, rhs: QTensor, dtype: jax.typing.DTypeLike, *, interpret: bool = False
) -> jax.Array:
    """(..., K) by (K, N), in `dtype`; `interpret` computes without a TPU, for tests."""
    x, row_scale = codes_and_scale(lhs)
    columns = partial(repeat_groups, shape=rhs.codes.shape, axes=[1])
    if row_scale is not None:
        row_scale = jnp.broadcast_to(row_scale, (*x.shape[:-1], 1)).reshape(-1, 1)
    out = pallas_tpu.grouped_dot(
        x.reshape(-1, x.shape[-1]),
        rhs.codes,
        columns(scale_values(rhs.scale)),
        None if rhs.zero_point is None else columns(rhs.zero_point),
        row_scale,
        dtype=dtype if dtype in FLOATS.dtypes else jnp.float32,
        interpret=interpret,
    )
    return out.reshape(*x.shape[:-1], rhs.codes.shape[1]).astype(dtype)


def why_unsupported(lhs: Operand, rhs: QTensor, spec: DotSpec) -> str | None:
    """Why the kernel does not compute this, or None."""
    why_not = why_unsupported_matrix(lhs, rhs, spec, axis=0) or why_unsupported_float64(spec)
    why_not = why_not or why_unsupported_int4(rhs)
    why_not = why_not or FLOATS.why_unsupported(lhs, rhs, spec.precision)
    return why_not or pallas_tpu.why_unsupported_groups(rhs.codes.shape[0], rhs.scale.shape[0])


def _kernel(lhs: Operand, rhs: QTensor, spec: DotSpec) -> jax.Array:
    return to_logical_order(run(lhs, rhs, spec.dtype), spec)


def _why_slower(lhs: Operand, rhs: QTensor, spec: DotSpec, chip: str | None) -> str | None:
    if integer.is_supported(lhs, rhs, spec):
        return "XLA multiplies codes with one scale per column as integers"
    if chip not in _MOST_ROWS:
        return f"it is selected on {' and '.join(map(str, _MOST_ROWS))} only"
    most = _MOST_ROWS[chip][rhs.scale.shape[0] == 1]
    rows = lhs.size // rhs.codes.shape[0]
    return f"{rows} rows, more than {most}, are faster by XLA on {chip}" if rows > most else None
