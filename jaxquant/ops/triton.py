"""Which products the Pallas kernel for GPUs takes, on arrays as they are stored."""

import jax
import jax.numpy as jnp
from jax import lax

from ..core import QTensor, scale_values
from ..kernels import pallas_gpu
from .dispatch import Operand
from .pallas import codes_and_scale

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
# What XLA on a GPU does with float32 unless it is asked for more: TF32.
_TF32 = (None, lax.Precision.DEFAULT, "default", "fastest", "bfloat16", "tensorfloat32")


def product(
    lhs: Operand, rhs: QTensor, dtype: jax.typing.DTypeLike, *, interpret: bool = False
) -> jax.Array:
    """(..., K) by (N, K), in `dtype`; `interpret` computes without a GPU, for tests."""
    x, scale = codes_and_scale(lhs)
    rows = x.reshape(-1, x.shape[-1])
    out = pallas_gpu.grouped_dot(
        # Codes of 8 bits are exact in bfloat16.
        rows if scale is None else rows.astype(jnp.bfloat16),
        rhs.codes,
        _per_column(scale_values(rhs.scale), rhs),
        None if rhs.zero_point is None else _per_column(rhs.zero_point, rhs),
        interpret=interpret,
    )
    out = out.reshape(*x.shape[:-1], rhs.codes.shape[0])
    return (out if scale is None else out * scale).astype(dtype)


def refuses(lhs: Operand, rhs: QTensor, precision: lax.PrecisionLike) -> str | None:
    """Why `product` does not take these operands, or None."""
    if rhs.format.bits != 4 or not rhs.format.rounds:
        return f"{rhs.format} codes are not whole numbers of 4 bits"
    if lhs.dtype not in _FLOATS or rhs.dtype not in _FLOATS:
        return f"{lhs.dtype} by {rhs.dtype} are not floats of 16 or 32 bits"
    if jnp.float32 in (lhs.dtype, rhs.dtype):
        default = jax.default_matmul_precision.value
        wanted = precision if isinstance(precision, tuple) else (precision or default,)
        if any(p not in _TF32 for p in wanted):
            return f"a precision of {precision or default} takes more than TF32"
    if 0 in (*lhs.shape, *rhs.codes.shape):
        return "an operand is empty"
    return pallas_gpu.refuses_groups(rhs.codes.shape[1], rhs.scale.shape[1])


def loses(lhs: Operand, rhs: Operand) -> str:
    """Why XLA is left to compute."""
    return "not measured on a GPU yet"


def _per_column(values, rhs):
    """Scales or zero points, (N, groups)."""
    return jnp.repeat(values, rhs.codes.shape[0] // values.shape[0], 0)
