"""Which products the Pallas kernel for TPUs takes, on arrays as they are stored."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from ..core import QTensor, blocks_between, scale_values
from ..kernels import pallas_tpu
from .dispatch import Operand
from .operands import refuses_codes

# Rows up to which the kernel beats XLA: with grouped scales, and with one per column. 4096 x 4096,
# microseconds: the larger of what the kernel's scheduled instructions and its bytes take, against
# XLA's own estimate. Groups of 128: v5e 12 against 24 for 8 rows, 44 against 53 for 256, 690
# against 757 for 4096; v6e 6 against 73, 14 against 84, 221 against 390. One per column: v5e 11
# against 22, 44 against 63; v6e 5 against 15, 12 against 22, 200 against 191.
_MOST_ROWS: dict[str | None, tuple[float, float]] = {"v5e": (256, 256), "v6e": (math.inf, 256)}
# What XLA on a TPU does with float32 unless it is asked for more: one pass of bfloat16.
_ONE_PASS = (None, lax.Precision.DEFAULT, "default", "fastest", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Floats:
    """What kernels on one platform multiply.

    Attributes:
        dtypes: of both operands, or of what their codes stand for.
        precisions: those at which float32 is multiplied, the highest of them last.
    """

    dtypes: tuple[jax.typing.DTypeLike, ...]
    precisions: tuple[lax.PrecisionLike, ...]

    def refuses(self, lhs: Operand, rhs: QTensor, precision: lax.PrecisionLike) -> str | None:
        """Why these operands are not taken, or None; a `precision` of None is JAX's default."""
        if lhs.dtype not in self.dtypes or rhs.dtype not in self.dtypes:
            names = " or ".join(jnp.dtype(d).name for d in self.dtypes)
            return f"{lhs.dtype} by {rhs.dtype} are not {names}"
        if jnp.float32 in (lhs.dtype, rhs.dtype):
            default = jax.default_matmul_precision.value
            wanted = precision if isinstance(precision, tuple) else (precision or default,)
            if any(p not in self.precisions for p in wanted):
                return f"a precision of {precision or default} is more than {self.precisions[-1]}"
        return "an operand is empty" if 0 in (*lhs.shape, *rhs.codes.shape) else None


_FLOATS = Floats((jnp.float32, jnp.bfloat16), _ONE_PASS)


def product(
    lhs: Operand, rhs: QTensor, dtype: jax.typing.DTypeLike, *, interpret: bool = False
) -> jax.Array:
    """(..., K) by (K, N), in `dtype`; `interpret` computes without a TPU, for tests."""
    x, row_scale = codes_and_scale(lhs)
    zero = None if rhs.zero_point is None else _per_column(rhs.zero_point, rhs)
    if row_scale is not None:
        row_scale = jnp.broadcast_to(row_scale, (*x.shape[:-1], 1)).reshape(-1, 1)
    out = pallas_tpu.grouped_dot(
        x.reshape(-1, x.shape[-1]),
        rhs.codes,
        _per_column(scale_values(rhs.scale), rhs),
        zero,
        row_scale,
        dtype=dtype if dtype in _FLOATS.dtypes else jnp.float32,
        interpret=interpret,
    )
    return out.reshape(*x.shape[:-1], rhs.codes.shape[1]).astype(dtype)


def refuses(lhs: Operand, rhs: QTensor, precision: lax.PrecisionLike) -> str | None:
    """Why `product` does not take these operands, or None."""
    why_not = refuses_codes_of_4_bits(rhs) or _FLOATS.refuses(lhs, rhs, precision)
    return why_not or pallas_tpu.refuses_groups(rhs.codes.shape[0], rhs.scale.shape[0])


def refuses_codes_of_4_bits(rhs: QTensor) -> str | None:
    """Why kernels for whole numbers of 4 bits do not take these weights, or None."""
    if rhs.format.bits == 4 and rhs.format.rounds:
        return None
    return f"{rhs.format} codes are not whole numbers of 4 bits"


def loses(lhs: Operand, rhs: QTensor, chip: str | None) -> str | None:
    """Why XLA is left to compute on a generation of TPUs, or None."""
    if chip not in _MOST_ROWS:
        return f"it is chosen on {' and '.join(map(str, _MOST_ROWS))} alone"
    most = _MOST_ROWS[chip][rhs.scale.shape[0] == 1]
    rows = lhs.size // rhs.codes.shape[0]
    return f"{rows} rows, more than {most}, are faster by XLA on {chip}" if rows > most else None


def codes_and_scale(lhs: Operand) -> tuple[jax.Array, jax.Array | None]:
    """Codes of the left operand and their scales per row, or its values and None."""
    if not isinstance(lhs, QTensor):
        return jnp.asarray(lhs), None
    blocks = blocks_between(lhs.codes.shape, lhs.scale.shape)
    is_per_row = all(b in (1, n) for b, n in zip(blocks, lhs.codes.shape, strict=True))
    is_plain = refuses_codes(lhs) is None and lhs.zero_point is None and is_per_row
    if is_plain and lhs.scale.shape[-1] == 1:
        return lhs.codes, scale_values(lhs.scale)
    return lhs.decode(), None


def _per_column(values, rhs):
    """Scales or zero points, (groups, N)."""
    return jnp.repeat(values, rhs.codes.shape[1] // values.shape[1], 1)
