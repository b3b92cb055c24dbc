"""Which products the Pallas kernels for GPUs take, on arrays as they are stored."""

import jax
import jax.numpy as jnp
from jax import lax

from ..core import QTensor, scale_values
from ..kernels import pallas_gpu
from .dispatch import Operand
from .operands import refuses_length
from .pallas import Floats, codes_and_scale, refuses_codes_of_4_bits

# What XLA on a GPU does with float32 unless it is asked for more: TF32.
_TF32 = (None, lax.Precision.DEFAULT, "default", "fastest", "bfloat16", "tensorfloat32")
_FLOATS = Floats((jnp.float32, jnp.bfloat16, jnp.float16), _TF32)


def product(
    lhs: Operand, rhs: QTensor, dtype: jax.typing.DTypeLike, *, interpret: bool = False
) -> jax.Array:
    """(..., K) by (N, K), in `dtype`; `interpret` computes without a GPU, for tests."""
    if rhs.format.bits == 4:
        return _grouped(lhs, rhs, interpret).astype(dtype)
    return _scaled(lhs, rhs, dtype, interpret).astype(dtype)


def refuses(lhs: Operand, rhs: QTensor, precision: lax.PrecisionLike) -> str | None:
    """Why `product` does not take these operands, or None."""
    why_not = pallas_gpu.refuses_platform() or pallas_gpu.refuses_sizes(lhs.size, rhs.size)
    if why_not is not None:
        return why_not
    if rhs.format.bits != 4:
        return _refuses_codes(lhs, rhs, precision)
    why_not = refuses_codes_of_4_bits(rhs) or _FLOATS.refuses(lhs, rhs, precision)
    return why_not or pallas_gpu.refuses_groups(rhs.codes.shape[1], rhs.scale.shape[1])


def loses(*_: object) -> str:
    """Why XLA is left to compute."""
    return "not measured on a GPU yet"


def _grouped(lhs, rhs, interpret):
    """By 4-bit weights, in float32."""
    x, scale = codes_and_scale(lhs)
    rows = x.reshape(-1, x.shape[-1])
    out = pallas_gpu.grouped_dot(
        # Codes of 8 bits are exact in bfloat16.
        rows if scale is None else rows.astype(jnp.bfloat16),
        rhs.codes,
        _spread(scale_values(rhs.scale), rhs.codes.shape[:1]),
        None if rhs.zero_point is None else _spread(rhs.zero_point, rhs.codes.shape[:1]),
        interpret=interpret,
    )
    out = out.reshape(*x.shape[:-1], rhs.codes.shape[0])
    return out if scale is None else out * scale


def _scaled(lhs, rhs, dtype, interpret):
    """Codes by codes of 8 bits, in `dtype` if the kernel writes it."""
    *rows, length = lhs.codes.shape
    scales = [
        _spread(scale_values(x.scale).astype(jnp.float32), x.codes.shape[:-1]).reshape(-1)
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


def _refuses_codes(lhs, rhs, precision):
    """Why `_scaled` does not take these operands, or None."""
    if not isinstance(lhs, QTensor):
        return f"an operand of {lhs.dtype} has no codes to multiply with {rhs.format} codes"
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
    why_not = refuses_length(rhs.codes.shape[1], lhs, rhs) if is_exact else None
    wanted = lax.Precision.DEFAULT if is_exact else precision
    return why_not or _FLOATS.refuses(lhs, rhs, wanted)


def _spread(values, lengths):
    """Scales or zero points, repeated along the first axes to their `lengths`."""
    for axis, length in enumerate(lengths):
        values = jnp.repeat(values, length // values.shape[axis], axis)
    return values
