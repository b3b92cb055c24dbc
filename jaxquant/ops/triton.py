"""Which products the Pallas kernel for GPUs takes, on arrays as they are stored."""

import jax
import jax.numpy as jnp
from jax import lax

from ..core import QTensor, scale_values
from ..kernels import pallas_gpu
from .dispatch import Operand
from .pallas import codes_and_scale, refuses_operands

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
    why_not = refuses_operands(lhs, rhs, precision, _FLOATS, _TF32)
    return why_not or pallas_gpu.refuses_groups(rhs.codes.shape[1], rhs.scale.shape[1])


def loses(*_: object) -> str:
    """Why XLA is left to compute."""
    return "not measured on a GPU yet"


def _per_column(values, rhs):
    """Scales or zero points, (N, groups)."""
    return jnp.repeat(values, rhs.codes.shape[0] // values.shape[0], 0)
