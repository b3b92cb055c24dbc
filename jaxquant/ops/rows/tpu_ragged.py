"""The row that runs the Pallas kernel for TPUs: rows times the quantized matrix of their expert."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...core import QTensor, scale_values
from ...jaxprs import chips, on_one_tpu
from ...kernels import pallas_tpu, pallas_tpu_experts
from ..dispatch import Implementation, Table
from ..operands import Operand, repeat_groups
from .kernel import codes_and_scale, kernel_or_xla, why_unsupported_experts
from .tpu_pallas import FLOATS, rows_of, why_unsupported_stack

# Where experts (G, K, N) are stored with columns last.
_AXES = (0, 1, 2)


def row(fallback: Table) -> Implementation:
    """The row "pallas", with rows of XLA for programs that cannot hold the kernel.

    XLA dequantizes all experts, and multiplies few rows by all of them; the kernel reads the codes
    of the experts that have rows.
    """
    return Implementation(
        "pallas",
        partial(kernel_or_xla, kernel=_run, where=on_one_tpu, fallback=fallback, platform="tpu"),
        _why_unsupported,
        ("tpu",),
        _why_slower,
        is_integer=_is_integer,
        reads_packed=True,
        fallback=fallback,
    )


def run(
    lhs: Operand,
    rhs: QTensor,
    sizes: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    codes: jax.Array | None = None,
    most: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """(M, K) by (E, K, N), in `dtype`; `interpret` computes without a TPU, for tests.

    Args:
        lhs, rhs: the operands.
        sizes: rows of each expert.
        dtype: of the result.
        codes: of all experts, if rhs is the layer of a stack whose experts have rows; None for
            those of rhs.
        most: how many of the experts may have rows; None for all.
        interpret: runs without a TPU, slowly, for tests.
    """
    x, row_scale = rows_of(lhs)
    if row_scale is not None:
        row_scale = jnp.broadcast_to(row_scale, (x.shape[0], 1))
    per_column = partial(repeat_groups, shape=rhs.codes.shape, axes=(0, 2))
    out = pallas_tpu_experts.ragged_dot(
        x,
        rhs.codes if codes is None else codes,
        per_column(scale_values(rhs.scale)),
        None if rhs.zero_point is None else per_column(rhs.zero_point),
        row_scale,
        sizes,
        most=most,
        dtype=dtype if dtype in FLOATS.dtypes else jnp.float32,
        interpret=interpret,
    )
    return out.astype(dtype)


def _run(lhs: Operand, rhs: QTensor, spec: Any) -> jax.Array:
    experts, _ = spec.in_place(rhs)
    codes, sizes = spec.codes_in_place(rhs)
    return run(lhs, experts, sizes, spec.dtype, codes=codes, most=rhs.shape[0])


def _why_unsupported(lhs: Operand, rhs: Any, spec: Any) -> str | None:
    why_not = why_unsupported_experts(lhs, rhs, spec, _AXES)
    if why_not is not None:
        return why_not
    why_not = why_unsupported_stack(rhs) or FLOATS.why_unsupported(lhs, rhs, spec.precision)
    return why_not or pallas_tpu.why_unsupported_groups(rhs.codes.shape[1], rhs.scale.shape[1])


def _is_integer(lhs: Operand, rhs: QTensor, spec: Any) -> bool:
    codes, row_scale = codes_and_scale(lhs)
    is_whole = rhs.scale.shape[1] == 1 and rhs.zero_point is None
    return row_scale is not None and codes.dtype == rhs.codes.dtype == jnp.int8 and is_whole


def _why_slower(lhs: Operand, rhs: QTensor, spec: Any, chip: str | None) -> str | None:
    if rhs.codes.shape[2] % 128:
        return "XLA would copy experts whose columns do not fill tiles of 128 into another layout"
    if chip in chips.TUNED:
        return None
    return f"it is selected on {' and '.join(chips.TUNED)} only"
