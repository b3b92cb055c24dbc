"""The row that runs the Pallas kernels for TPUs: rows times grouped 4-bit weights.

Few rows are multiplied by 8-bit weights, too, where these are a slice of a stack: the kernel reads
them there, and XLA would slice them first.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from ...core import FP8_E4M3, QTensor, blocks_between, scale_values
from ...jaxprs import on_one_tpu
from ...kernels import pallas_tpu, pallas_tpu_experts
from ..dispatch import Implementation, Table
from ..dot_spec import DotSpec, to_logical_order
from ..operands import Operand, repeat_groups
from ..stacks import has_plain_scales
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
# Rows that are one tile of the kernel for stacks, so that it reads weights once.
_MOST_ROWS_IN_STACK = 256
FLOATS = FloatSupport((jnp.float32, jnp.bfloat16), pallas_tpu.ONE_PASS)


def row(fallback: Table) -> Implementation:
    """The row "pallas", with rows of XLA for programs that cannot hold the kernel."""
    return Implementation(
        "pallas",
        partial(kernel_or_xla, kernel=_kernel, where=on_one_tpu, fallback=fallback, platform="tpu"),
        why_unsupported,
        ("tpu",),
        _why_slower,
        is_integer=_is_integer,
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


def run_in_stack(
    lhs: Operand,
    rhs: QTensor,
    stack: QTensor,
    layer: jax.Array,
    dtype: jax.typing.DTypeLike,
    unquantized: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """(..., K) by rhs, the slice `layer` of (L, K, N), in `dtype`.

    Args:
        lhs, rhs, stack, layer: the operands. Of rhs, only what is not read in the stack is used:
            scales that must be repeated or converted, which would be done for those of all layers.
        dtype: of the result.
        unquantized: lhs before its rows were quantized, if the kernel may do this.
        interpret: as for `run`.
    """
    x, row_scale, row_codes = *rows_of(lhs), None
    if unquantized is not None and isinstance(lhs, QTensor):
        given = unquantized.reshape(-1, x.shape[-1])
        if pallas_tpu_experts.quantizes_in_place(given):
            row_codes = pallas_tpu_experts.RowCodes(lhs.format.dtype, lhs.format.qmax)
            x, row_scale = unquantized, None
    if row_scale is not None:
        row_scale = jnp.broadcast_to(row_scale, (*x.shape[:-1], 1)).reshape(-1, 1)
    scale, zero = stack.scale, stack.zero_point
    if not has_plain_scales(stack, (0, 2)):
        columns = partial(repeat_groups, shape=rhs.codes.shape, axes=[1])
        scale = columns(scale_values(rhs.scale))[None]
        zero = None if rhs.zero_point is None else columns(rhs.zero_point)[None]
    assert not isinstance(scale, QTensor), "those are not plain"
    out = pallas_tpu_experts.stacked_dot(
        x.reshape(-1, x.shape[-1]),
        stack.codes,
        scale,
        zero,
        row_scale,
        layer,
        row_codes=row_codes,
        dtype=dtype if dtype in FLOATS.dtypes else jnp.float32,
        interpret=interpret,
    )
    return out.reshape(*x.shape[:-1], stack.codes.shape[2]).astype(dtype)


def why_unsupported(lhs: Operand, rhs: QTensor, spec: DotSpec) -> str | None:
    """Why the kernels do not compute this, or None."""
    why_not = why_unsupported_matrix(lhs, rhs, spec, axis=0) or why_unsupported_float64(spec)
    if why_not is None and not _is_in_stack(lhs, rhs, spec):
        why_not = why_unsupported_int4(rhs)
    why_not = why_not or FLOATS.why_unsupported(lhs, rhs, spec.precision)
    return why_not or pallas_tpu.why_unsupported_groups(rhs.codes.shape[0], rhs.scale.shape[0])


def why_unsupported_stack(rhs: QTensor) -> str | None:
    """Why the kernel for stacks does not read these codes, or None."""
    format, floats = rhs.format, (jnp.float8_e4m3fn, jnp.float8_e5m2)
    is_float = format.codebook is None and jnp.dtype(format.dtype) in floats
    if is_float or (format.rounds and format.bits in (4, 8)):
        return None
    return f"{format} codes are not integers of 4 or 8 bits, or floats of 8 bits"


def rows_of(lhs: Operand) -> tuple[jax.Array, jax.Array | None]:
    """`codes_and_scale`, with the codes of 8-bit floats as bfloat16, which has all of them."""
    if isinstance(lhs, QTensor) and lhs.format == FP8_E4M3 and lhs.offset is None:
        *blocks, of_row = blocks_between(lhs.codes.shape, lhs.scale.shape)
        is_per_row = of_row == lhs.codes.shape[-1]
        if is_per_row and all(b in (1, n) for b, n in zip(blocks, lhs.codes.shape, strict=False)):
            return lhs.codes.astype(jnp.bfloat16), scale_values(lhs.scale)
    return codes_and_scale(lhs)


def _is_in_stack(lhs: Operand, rhs: QTensor, spec: DotSpec) -> bool:
    """Whether few rows meet codes that are a slice of a stack."""
    is_few = lhs.size <= _MOST_ROWS_IN_STACK * rhs.codes.shape[0]
    if spec.stack is None or not is_few or rhs.offset is not None:
        return False
    # XLA would copy a stack whose columns do not fill tiles of 128 into another layout.
    return why_unsupported_stack(rhs) is None and rhs.codes.shape[1] % 128 == 0


def _is_integer(lhs: Operand, rhs: QTensor, spec: DotSpec) -> bool:
    codes, row_scale = codes_and_scale(lhs)
    is_whole = rhs.scale.shape[0] == 1 and rhs.zero_point is None
    return row_scale is not None and codes.dtype == rhs.codes.dtype == jnp.int8 and is_whole


def _kernel(lhs: Operand, rhs: QTensor, spec: DotSpec) -> jax.Array:
    if spec.stack is not None and spec.layer is not None and _is_in_stack(lhs, rhs, spec):
        out = run_in_stack(lhs, rhs, spec.stack, spec.layer, spec.dtype, spec.unquantized)
    else:
        out = run(lhs, rhs, spec.dtype)
    return to_logical_order(out, spec)


def _why_slower(lhs: Operand, rhs: QTensor, spec: DotSpec, chip: str | None) -> str | None:
    if chip not in _MOST_ROWS:
        return f"it is selected on {' and '.join(map(str, _MOST_ROWS))} only"
    if _is_in_stack(lhs, rhs, spec):
        return None
    if integer.is_supported(lhs, rhs, spec):
        return "XLA multiplies codes with one scale per column as integers"
    most = _MOST_ROWS[chip][rhs.scale.shape[0] == 1]
    rows = lhs.size // rhs.codes.shape[0]
    return f"{rows} rows, more than {most}, are faster by XLA on {chip}" if rows > most else None
