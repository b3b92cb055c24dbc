"""The rows that write a product the way XLA's TPU compiler runs it fastest.

"scaled" multiplies codes as floating-point values and applies their scales to the result; "fused"
dequantizes grouped weights inside the product. Figures are microseconds of the compiler's estimate,
not measured: 4096 x 4096 weights, bfloat16 activations, from `python -m benchmarks --suite
tpu-compile`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...core import QTensor, scale_values
from ...jaxprs import by_generation
from ..dispatch import Implementation
from ..dot_spec import DotSpec, in_result, to_logical_order
from ..operands import Operand, as_array
from . import dequantize

# Fewest and most rows of float activations by 8-bit weights for which codes are scaled after the
# product; with others weights are dequantized inside it. v5e, 8, 64, 128 and 256 rows: 31, 36, 48,
# 72 against 34, 38, 43, 59. v6e, 8, 64, 128, 256 and 2048: 19, 20, 21, 26, 99 against 16, 18, 21,
# 25, 145; for 2048 x 8192 weights and 128 rows 22 against 24.
_SCALED_ROWS: dict[str | None, tuple[float, float]] = {"v5e": (0, 64), "v6e": (65, math.inf)}


def scales_result(x: Operand, axes: tuple[int, ...]) -> bool:
    """Whether a product over `axes` can multiply the codes of x and apply the scales afterwards.

    Codes of 8 bits are exact in every 16-bit floating-point dtype: integers up to 256 in bfloat16.
    2048 rows by int8 weights, on v6e 99 against 145 if they are dequantized first.
    """
    if not isinstance(x, QTensor) or x.format.codebook is not None:
        return False
    if x.zero_point is not None or x.offset is not None:
        return False
    return x.format.bits <= 8 and all(x.scale.shape[a] == 1 for a in axes)


def scaled(lhs: Any, rhs: Any, spec: DotSpec) -> jax.Array:
    """Multiplies codes where their scales can be applied to the result, values elsewhere."""
    operands, dtype = (lhs, rhs), jnp.promote_types(lhs.dtype, rhs.dtype)
    is_scaled = [scales_result(*pair) for pair in zip(operands, spec.contract, strict=True)]
    left, right = (x.codes if s else as_array(x) for x, s in zip(operands, is_scaled, strict=True))
    if left.dtype != right.dtype or not jnp.issubdtype(left.dtype, jnp.floating):
        left, right = left.astype(dtype), right.astype(dtype)
    compute = jnp.float64 if spec.dtype == jnp.float64 else jnp.float32
    out = lax.dot_general(
        left,
        right,
        (spec.contract, spec.batch),
        precision=spec.precision,
        preferred_element_type=compute,
        out_sharding=spec.out_sharding,
    )
    for side, x in enumerate(operands):
        if is_scaled[side]:
            out = out * in_result(scale_values(x.scale).astype(compute), side, operands, spec)
    return to_logical_order(out.astype(spec.dtype), spec)


def force_fusion(x: jax.Array) -> jax.Array:
    """x, computed where it is used, so that the product dequantizes the other operand inside.

    If one operand of a product is already in memory, v6e writes the other to memory before it
    starts. With grouped int4 weights, at 8, 128 and 2048 rows: 73, 81, 209; with this 14, 17, 115
    (bfloat16: 28, 30, 109). On v5e it would cost: 28 against 24 at 8 rows.
    """
    return by_generation({"v6e": times_one, "7x": times_one}, lambda x: x, x)


def times_one(x: jax.Array) -> jax.Array:
    """x * 1, which XLA does not simplify: the barrier hides the value of the 1.

    It keeps every value, except that XLA may flush subnormal ones to zero as in any product.
    """
    return x * lax.optimization_barrier(jnp.ones((1,) * x.ndim, x.dtype))


def _why_scaled_unsupported(lhs: Operand, rhs: Operand, spec: DotSpec) -> str | None:
    is_scaled = [scales_result(*pair) for pair in zip((lhs, rhs), spec.contract, strict=True)]
    return None if any(is_scaled) else "no operand has codes that can be scaled after the product"


def _why_scaled_slower(lhs: Operand, rhs: Operand, spec: DotSpec, chip: str | None) -> str | None:
    rows = None if isinstance(lhs, QTensor) else spec.rows(lhs, rhs)
    least, most = _SCALED_ROWS.get(chip, (0, math.inf))
    if rows is None or least <= rows <= most:
        return None
    side = f"fewer than {least}" if rows < least else f"more than {most}"
    return f"{rows} rows, {side}, are faster dequantized on {chip}"


def _fused(lhs: Operand, rhs: Operand, spec: DotSpec) -> jax.Array:
    """Dequantizes one operand while the other is multiplied with it."""
    lhs, rhs = (x if isinstance(x, QTensor) else force_fusion(jnp.asarray(x)) for x in (lhs, rhs))
    return dequantize.run(lhs, rhs, spec)


def _why_fused_unsupported(lhs: Operand, rhs: Operand, spec: DotSpec) -> str | None:
    is_array = [not isinstance(x, QTensor) for x in (lhs, rhs)]
    is_grouped = any(
        isinstance(x, QTensor) and any(x.scale.shape[a] > 1 for a in axes)
        for x, axes in zip((lhs, rhs), spec.contract, strict=True)
    )
    return None if is_grouped and any(is_array) else "it is for grouped scales by a float array"


SCALED = Implementation("scaled", scaled, _why_scaled_unsupported, ("tpu",), _why_scaled_slower)
FUSED = Implementation("fused", _fused, _why_fused_unsupported, ("tpu",), adds_offsets=True)
