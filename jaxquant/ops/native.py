"""Which products the native kernels of the CPU take, on arrays as they are stored."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..core import Format, QTensor, blocks_between, scale_values
from ..kernels import native
from .dispatch import Operand
from .operands import as_array, refuses_codes

# Smaller weights were not measured, and are left to XLA.
_LEAST_SIZE = 2**15
# Rows up to which the kernels beat XLA, by bits of the weights and whether the inputs are codes, if
# there is a limit. Measured at 4096 x 4096 on 2 cores, as speeds in units of XLA's
# float32, kernels against XLA's best form of the same product. AVX512: codes by 8 bits 3.0 against
# 1.7 at 64 rows, 3.8 against 1.7 at 512; floats 1.1 against 0.9 at 512. AVX2: codes by 8 bits 2.3
# against 2.1 at 8 rows, 1.7 against 1.8 at 16; floats by 8 bits 1.4 against 1.3 at 8, 0.9 against
# 1.1 at 16; codes by 4 bits 1.3 against 0.7 at 32; floats by 4 bits 1.0 against 0.7 at 8, 0.6
# against 0.7 at 16. NEON was not measured, and is taken for an AVX2.
_FEW_ROWS = {(8, True): 8, (8, False): 8, (4, True): 32, (4, False): 8}
_MOST_ROWS = {"AVX512-VNNI": {}, "AVX2": _FEW_ROWS, "NEON": _FEW_ROWS}


# What the kernels round their results to.
_RESULTS = (jnp.float32, jnp.bfloat16)


def int8_product(lhs: jax.Array, rhs: jax.Array, *_) -> jax.Array:
    """Exact sums of int8 codes: (..., K) by (N, K), in int32."""
    return native.int8_dot(_rows(lhs), rhs).reshape(*lhs.shape[:-1], rhs.shape[0])


def scaled_int8_product(
    lhs: jax.Array,
    rhs: jax.Array,
    lhs_scale: jax.Array,
    rhs_scale: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`int8_product` times scales that broadcast with it, the left one first, by one call."""
    row = _per_row(lhs_scale, lhs.shape)
    column = jnp.broadcast_to(rhs_scale.reshape(-1), rhs.shape[:1])
    out = native.scaled_int8_dot(_rows(lhs), rhs, row, column, _result(dtype))
    return out.reshape(*lhs.shape[:-1], rhs.shape[0])


def refuses_size(lhs: Operand, rhs: QTensor, by_codes: bool) -> str | None:
    """Why the kernels leave a product with so many rows and weights to XLA, or None."""
    if native.unavailable() is not None:
        return native.unavailable()
    if rhs.size < _LEAST_SIZE:
        return f"fewer than {_LEAST_SIZE} weights"
    instructions, bits = native.instruction_sets()[0], rhs.format.bits
    most = _MOST_ROWS[instructions].get((bits, by_codes), math.inf)
    if lhs.size // rhs.codes.shape[1] > most:
        inputs = "codes" if by_codes else "floats"
        return f"more than {most} rows of {inputs} by {bits} bits, with {instructions}"
    return None


def takes_codes(lhs: Operand, rhs: QTensor) -> bool:
    """Whether `product` multiplies the codes of the left operand, without their scale."""
    if not isinstance(lhs, QTensor) or lhs.zero_point is not None or rhs.format.bits != 4:
        return False
    # The kernel makes codes unsigned by an offset.
    is_signed = jnp.issubdtype(rhs.format.dtype, jnp.signedinteger)
    is_whole = refuses_codes(lhs) is None and rhs.format.rounds
    return is_whole and is_signed and lhs.scale.shape[-1] == 1


def product(
    lhs: Operand,
    rhs: QTensor,
    dtype: jax.typing.DTypeLike,
    lhs_scale: jax.Array | None = None,
) -> jax.Array:
    """(..., K) by (N, K), in float32 or already in `dtype`.

    `lhs_scale` is that of the codes that `takes_codes` admits, to broadcast with the result.
    """
    scale = _by_row(scale_values(rhs.scale), rhs)
    zero = None if rhs.zero_point is None else _by_row(rhs.zero_point, rhs)
    x = as_array(lhs)
    if isinstance(lhs, QTensor) and lhs_scale is not None:
        x = lhs.codes.astype(jnp.int8)
        row = _per_row(lhs_scale, x.shape)
        out = native.int4_dot(_rows(x), rhs.codes, scale, zero, row, _result(dtype))
    elif rhs.format.bits == 4:
        table = jnp.asarray(_table(rhs.format))
        out = native.lookup_dot(_rows(x), rhs.codes, scale, zero, table)
    else:
        out = native.widen_dot(_rows(x), rhs.codes) * scale.reshape(1, -1)
    return out.reshape(*x.shape[:-1], rhs.codes.shape[0])


def refuses(lhs: Operand, rhs: QTensor) -> str | None:
    """Why `product` does not take these operands, or None."""
    length, groups = rhs.codes.shape[1], rhs.scale.shape[1]
    why_not = refuses_size(lhs, rhs, takes_codes(lhs, rhs))
    if why_not is not None:
        return why_not
    if rhs.format.bits == 4:
        return native.refuses_groups(length, groups)
    if rhs.format.bits != 8:
        return f"{rhs.format} weights have codes of neither 4 nor 8 bits"
    if refuses_codes(rhs) is not None or rhs.zero_point is not None or groups > 1:
        return "8-bit weights by floats must have whole numbers, one scale per column and no zero"
    return None


def _rows(x):
    return jnp.asarray(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _per_row(scale, shape):
    return jnp.broadcast_to(scale, (*shape[:-1], 1)).reshape(-1)


def _result(dtype):
    return dtype if dtype in _RESULTS else jnp.float32


def _by_row(values, rhs):
    """Scales or zero points, (N, groups)."""
    block = blocks_between(rhs.codes.shape, values.shape)[0]
    return values if block == 1 else jnp.repeat(values, block, 0)


def _table(format: Format):
    """What each pattern of 4 bits stands for before it is scaled."""
    bits = np.arange(16, dtype=np.uint8)
    if not jnp.issubdtype(format.dtype, jnp.integer):
        return bits.view(jnp.dtype(format.dtype)).astype(np.float32)
    is_signed = jnp.issubdtype(format.dtype, jnp.signedinteger)
    codes = (bits ^ 8).astype(np.int32) - 8 if is_signed else bits.astype(np.int32)
    if format.codebook is None:
        return codes
    # A codebook may have fewer entries: the other patterns do not occur.
    return np.take(np.asarray(format.codebook), codes, mode="clip")
