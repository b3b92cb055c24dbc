"""The row that runs the Pallas kernels for GPUs, compiled by Triton."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...core import QTensor, scale_values
from ...jaxprs import on_one_gpu
from ...kernels import pallas_gpu
from ..dispatch import Implementation, Table
from ..dot_spec import DotSpec, to_logical_order
from ..operands import Operand, repeat_groups, why_unsupported_length
from . import integer
from .kernel import (
    FloatSupport,
    codes_and_scale,
    kernel_or_xla,
    why_unsupported_float64,
    why_unsupported_int4,
    why_unsupported_matrix,
)

# The default float32 precision of XLA on GPUs: TF32.
_TF32 = (None, lax.Precision.DEFAULT, "default", "fastest", "bfloat16", "tensorfloat32")
_FLOATS = FloatSupport((jnp.float32, jnp.bfloat16, jnp.float16), _TF32)


def row(fallback: Table) -> Implementation:
    """The row "triton", with rows of XLA for programs that cannot hold the kernels."""
    return Implementation(
        "triton",
        partial(
            kernel_or_xla, kernel=_kernel, where=on_one_gpu, fallback=fallback, platform="cuda"
        ),
        why_unsupported,
        ("cuda",),
        lambda *_: "not measured on a GPU yet",
        integer.is_of_8_bits,
        reads_packed=True,
        fallback=fallback,
    )


def run(
    lhs: Operand, rhs: QTensor, dtype: jax.typing.DTypeLike, *, interpret: bool = False
) -> jax.Array:
    """(..., K) by (N, K), in `dtype`; `interpret` computes without a GPU, for tests."""
    if rhs.format.bits == 4:
        return _grouped(lhs, rhs, interpret).astype(dtype)
    return _scaled(lhs, rhs, dtype, interpret).astype(dtype)


def why_unsupported(lhs: Operand, rhs: QTensor, spec: DotSpec) -> str | None:
    """Why the kernels do not compute this, or None."""
    why_not = why_unsupported_matrix(lhs, rhs, spec, axis=1) or why_unsupported_float64(spec)
    why_not = why_not or pallas_gpu.why_unsupported_platform()
    why_not = why_not or pallas_gpu.why_unsupported_sizes(lhs.size, rhs.size)
    if why_not is not None:
        return why_not
    if rhs.format.bits != 4:
        return _why_unsupported_codes(lhs, rhs, spec.precision)
    why_not = why_unsupported_int4(rhs) or _FLOATS.why_unsupported(lhs, rhs, spec.precision)
    return why_not or pallas_gpu.why_unsupported_groups(rhs.codes.shape[1], rhs.scale.shape[1])


def _kernel(lhs: Operand, rhs: QTensor, spec: DotSpec) -> jax.Array:
    return to_logical_order(run(lhs, rhs, spec.dtype), spec)


def _grouped(lhs: Operand, rhs: QTensor, interpret: bool) -> jax.Array:
    """By 4-bit weights, in float32."""
    x, scale = codes_and_scale(lhs)
    rows = x.reshape(-1, x.shape[-1])
    columns = partial(repeat_groups, shape=rhs.codes.shape, axes=[0])
    out = pallas_gpu.grouped_dot(
        # Codes of 8 bits are exact in bfloat16.
        rows if scale is None else rows.astype(jnp.bfloat16),
        rhs.codes,
        columns(scale_values(rhs.scale)),
        None if rhs.zero_point is None else columns(rhs.zero_point),
        interpret=interpret,
    )
    out = out.reshape(*x.shape[:-1], rhs.codes.shape[0])
    return out if scale is None else out * scale


def _scaled(lhs: Any, rhs: QTensor, dtype: jax.typing.DTypeLike, interpret: bool) -> jax.Array:
    """Codes by codes of 8 bits, in `dtype` if the kernel writes it."""
    *rows, length = lhs.codes.shape
    scales = [
        repeat_groups(
            scale_values(x.scale).astype(jnp.float32), x.codes.shape, range(x.ndim - 1)
        ).reshape(-1)
        for x in (lhs, rhs)
    ]
    out = pallas_gpu.scaled_dot(
        lhs.codes.reshape(-1, length),
        rhs.codes,
        *scales,
        dtype=dtype if dtype in _FLOATS.dtypes else jnp.float32,
        interpret=interpret,
    )
    return out.reshape(*rows, rhs.codes.shape[0])


def _why_unsupported_codes(lhs: Operand, rhs: QTensor, precision: lax.PrecisionLike) -> str | None:
    """Why `_scaled` does not multiply these operands, or None."""
    if not isinstance(lhs, QTensor):
        return f"an operand of {lhs.dtype} does not have codes to multiply with {rhs.format} codes"
    kinds = {None if x.format.codebook is not None else x.codes.dtype for x in (lhs, rhs)}
    if len(kinds) > 1 or not kinds <= set(pallas_gpu.SUMS):
        names = " or both ".join(d.name for d in pallas_gpu.SUMS)
        return f"{lhs.format} by {rhs.format} codes are not both {names}"
    for x in (lhs, rhs):
        if x.zero_point is not None:
            return f"{x.format} codes have zero points"
        if x.scale.shape[-1] > 1:
            return f"scales {x.scale.shape} change along the contracted axes"
    is_exact = rhs.format.rounds
    why_not = why_unsupported_length(rhs.codes.shape[1], lhs, rhs) if is_exact else None
    wanted = lax.Precision.DEFAULT if is_exact else precision
    return why_not or _FLOATS.why_unsupported(lhs, rhs, wanted)
