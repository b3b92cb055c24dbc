"""How the XLA compiler for TPUs wants a product with dequantized operands written.

Figures are microseconds of the compiler's estimate, not measured: 4096 x 4096 weights, bfloat16
inputs, from `python -m benchmarks --suite tpu-compile`.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from ..core import QTensor
from ..jaxprs import by_generation
from .dispatch import Operand

# Fewest and most rows of floats by 8-bit weights for which codes are scaled after the product; else
# weights are dequantized as they are multiplied. v5e, 8, 64, 128 and 256 rows: 31, 36, 48, 72
# against 34, 38, 43, 59. v6e, 8, 64, 128, 256 and 2048: 19, 20, 21, 26, 99 against 16, 18, 21, 25,
# 145; for 2048 x 8192 weights and 128 rows 22 against 24.
_SCALED_ROWS: dict[str | None, tuple[float, float]] = {"v5e": (0, 64), "v6e": (65, math.inf)}


def can_wait(x: Operand, axes: tuple[int, ...]) -> bool:
    """Whether a product over `axes` can take the codes as they are, and be scaled afterwards.

    Codes of 8 bits are exact in every float dtype of 16 bits: whole numbers up to 256 in bfloat16.
    2048 rows by int8 weights, on v6e 99 against 145 if they are dequantized first.
    """
    if not isinstance(x, QTensor) or x.zero_point is not None or x.format.codebook is not None:
        return False
    return x.format.bits <= 8 and all(x.scale.shape[a] == 1 for a in axes)


def dequantizes_faster(rows: int | None, chip: str | None) -> str | None:
    """Why so many rows of floats by codes that `can_wait` are dequantized on a chip, or None."""
    least, most = _SCALED_ROWS.get(chip, (0, math.inf))
    if rows is None or least <= rows <= most:
        return None
    side = f"fewer than {least}" if rows < least else f"more than {most}"
    return f"{rows} rows, {side}, are faster dequantized on {chip}"


def is_grouped(x: Operand, axes: tuple[int, ...]) -> bool:
    """Whether the scales of a quantized operand change along `axes`."""
    return isinstance(x, QTensor) and any(x.scale.shape[a] > 1 for a in axes)


def computed(x: jax.Array) -> jax.Array:
    """x itself, computed where it is used, so that the product takes its operands as it goes.

    On v6e a product whose one side lies ready in memory has the other side written out before it
    starts. With grouped int4 weights, at 8, 128 and 2048 rows: 73, 81, 209; so written 14, 17, 115
    (bfloat16: 28, 30, 109). On v5e it would cost: 28 against 24 at 8 rows.
    """
    return by_generation({"v6e": _times_one, "7x": _times_one}, lambda x: x, x)


def _times_one(x):
    # The barrier hides the value, else the product with it would be left out.
    return x * lax.optimization_barrier(jnp.ones((1,) * x.ndim, x.dtype))
