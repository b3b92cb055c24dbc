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
_LEAST_SIZE = 2**18
# Rows of float inputs, by bits of the weights, up to which codes widened one by one beat blocks of
# float weights. 4096 x 4096 on 2 cores, in units of XLA's float32: 8 bits 1.6 against 1.3 at 8
# rows, 0.97 against 1.09 at 16; 4 bits 1.6 against 0.74 at 16, 0.95 against 0.75 at 32.
_MOST_FLOAT_ROWS = {8: 8, 4: 32}
# Rows of 8-bit inputs up to which the kernels beat XLA, by bits of the weights and their number at
# least. 384 x 1536: 8 bits 2.1 against 1.9 at 8 rows, 1.2 against 1.4 at 64; 4 bits 0.9 against 0.6
# at 128, 0.7 against 0.9 at 512; 4096 x 4096: 4 bits 1.1 against 0.8 at 512.
_MOST_ROWS_OF_CODES = ((8, 0, 32), (4, 2**23, 512), (4, 0, 128))


def int8_product(lhs: jax.Array, rhs: jax.Array, *_) -> jax.Array:
    """Exact sums of int8 codes: (..., K) by (N, K), in int32."""
    return native.int8_dot(_rows(lhs), rhs).reshape(*lhs.shape[:-1], rhs.shape[0])


def refuses_codes_on_both_sides(lhs: Operand, rhs: QTensor) -> str | None:
    """Why the kernels leave a product of codes to XLA, or None."""
    bits = rhs.format.bits
    limits = [rows for b, size, rows in _MOST_ROWS_OF_CODES if b == bits and size <= rhs.size]
    if math.prod(lhs.shape[:-1]) > limits[0]:
        return f"more than {limits[0]} rows of codes by {rhs.size} weights of {bits} bits"
    return native.unavailable() or _is_small(rhs)


def takes_codes(lhs: Operand, rhs: QTensor) -> bool:
    """Whether `product` multiplies the codes of the left operand, without their scale."""
    if not isinstance(lhs, QTensor) or lhs.zero_point is not None or rhs.format.bits != 4:
        return False
    return refuses_codes(lhs) is None and rhs.format.rounds and lhs.scale.shape[-1] == 1


def product(lhs: Operand, rhs: QTensor) -> jax.Array:
    """(..., K) by (N, K), in float32."""
    scale = _by_row(scale_values(rhs.scale), rhs)
    zero = None if rhs.zero_point is None else _by_row(rhs.zero_point, rhs)
    if isinstance(lhs, QTensor) and takes_codes(lhs, rhs):
        out = native.int4_dot(_rows(lhs.codes.astype(jnp.int8)), rhs.codes, scale, zero)
    elif rhs.format.bits == 4:
        out = native.lookup_dot(
            _rows(as_array(lhs)), rhs.codes, scale, zero, jnp.asarray(_table(rhs.format))
        )
    else:
        out = native.widen_dot(_rows(as_array(lhs)), rhs.codes) * scale.reshape(1, -1)
    return out.reshape(*lhs.shape[:-1], rhs.codes.shape[0])


def refuses(lhs: Operand, rhs: QTensor) -> str | None:
    """Why `product` does not take these operands, or None."""
    length, groups = rhs.codes.shape[1], rhs.scale.shape[1]
    is_codes = takes_codes(lhs, rhs)
    why_not = refuses_codes_on_both_sides(lhs, rhs) if is_codes else _refuses_floats(lhs, rhs)
    if why_not is not None:
        return why_not
    if rhs.format.bits == 4:
        return native.refuses_groups(length, groups)
    if refuses_codes(rhs) is not None or rhs.zero_point is not None or groups > 1:
        return "8-bit weights by floats must have whole numbers, one scale per column and no zero"
    return None


def _refuses_floats(lhs, rhs):
    most = _MOST_FLOAT_ROWS.get(rhs.format.bits, 0)
    if math.prod(lhs.shape[:-1]) > most:
        return f"more than {most} rows of floats by weights of {rhs.format.bits} bits"
    return native.unavailable() or _is_small(rhs)


def _is_small(rhs):
    return f"fewer than {_LEAST_SIZE} weights" if rhs.size < _LEAST_SIZE else None


def _rows(x):
    return jnp.asarray(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


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
    return codes if format.codebook is None else np.asarray(format.codebook)[codes]
