"""`dot_general`, which multiplies quantized operands, and `matmul` on top of it.

Below `dot_general` all axes are those of the arrays as they are stored. The result is transposed to
the logical order of axes at the end, if it has another.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..core import LowRank, QTensor
from ..jaxprs import OutSharding, before_transpose
from . import dispatch
from .dot_spec import DotOptions, DotSpec
from .labels import hidden_labels, pair_axes
from .low_rank import with_low_rank
from .offset import adding_offsets
from .operands import Operand, OperandLike, as_operands, is_quantized
from .rows import cpu_blocks, cpu_native, dequantize, gpu_triton, integer, tpu_pallas, tpu_xla
from .stacks import stack_of


def matmul(
    a: OperandLike,
    b: OperandLike,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: OutSharding = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.numpy.matmul` on arrays and QTensors, in any mixture: (..., M, K) @ (..., K, N).

        out[..., m, n] = sum over k of a[..., m, k] * b[..., k, n]

    Args:
        a, b: float arrays or QTensors of at least one axis. Leading axes broadcast; an operand
            of one axis is a row on the left, a column on the right, and its axis is dropped.
        precision, preferred_element_type, out_sharding, implementation: as for `dot_general`,
            which has the details.

    Returns:
        Array of shape (..., M, N).

    Raises:
        ValueError: an operand is a scalar, lengths do not fit, or as for `dot_general`.

    Gradients and error: those of `dot_general`.
    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 7.

    Example:
        >>> w = jq.quantize(jnp.ones((8, 4)), jq.ArrayConfig(), axis=0)
        >>> jq.matmul(jnp.ones((2, 8)), w).shape
        (2, 4)
    """
    lhs, rhs = as_operands((a, b), implementation)
    if not (is_quantized(lhs) or is_quantized(rhs)):
        return jnp.matmul(
            lhs,  # pyright: ignore[reportArgumentType] (an array)
            rhs,  # pyright: ignore[reportArgumentType] (an array)
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    if lhs.ndim == 0 or rhs.ndim == 0:
        raise ValueError(
            f"matmul needs operands of at least one axis; got {lhs.shape} and {rhs.shape}."
        )
    options = DotOptions(precision, preferred_element_type, out_sharding, implementation)
    inner = lhs.ndim - 1, max(rhs.ndim - 2, 0)
    if rhs.ndim > 2 or lhs.shape[inner[0]] != rhs.shape[inner[1]]:
        return _batched_matmul(lhs, rhs, options)
    return dot_operands(lhs, rhs, (((inner[0],), (inner[1],)), ((), ())), options)


def dot_general(
    lhs: OperandLike,
    rhs: OperandLike,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    out_sharding: OutSharding = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` on arrays and QTensors, in any mixture.

        out = sum over the contracted axes of dequantize(lhs) * dequantize(rhs)

    If a QTensor has `inputs`, the float operand it is multiplied with is quantized accordingly
    first. Integer codes with no scale grouped along the contracted axes are multiplied as integers:
    with sums over k of n contracted elements,

        out = scale_l * scale_r * (sum c_l c_r - z_l sum c_r - z_r sum c_l + n z_l z_r)

    Args:
        lhs, rhs: float arrays or QTensors, one perhaps with adapters (`training.lora_init`);
            axes are logical ones, whatever their `order`.
        dimension_numbers: ((lhs contracted, rhs contracted), (lhs batch, rhs batch)).
        precision, out_sharding: as for `jax.lax.dot_general`.
        preferred_element_type: floating dtype of the result; None for what promotion gives
            the dtypes of both operands.
        implementation: "native", "pallas", "triton", "blocks", "integer", "scaled", "fused"
            or "dequantize", to force one; None to select by operands and platform.

    Returns:
        Array of shape (batch, lhs free, rhs free).

    Raises:
        ValueError: `implementation` cannot run these operands, or a dtype is not floating-point.
        TypeError: the shapes do not fit; from `jax.lax.dot_general`.

    Gradients: a float operand gets the gradient of the float product with the dequantized
        other, rounding counting as the identity; so do scales of 16 bits or more.
    Error: integer products are exact in int32 (sums that might leave it, of 131072 or more
        products of int8 codes, are not computed so) and rounded once, by the scales in
        float32. Others are those of `jax.lax.dot_general` on dequantized operands. Devices of a
        mesh with explicit axes that share the contracted axes of a result of 16 bits round their
        parts of it, and add these, in 16 bits, if it is large or kernels multiply. Kernels for
        TPUs that read weights in the stack of `scan` quantize few rows themselves: each device
        the part of a row that it has, with its own scale.
    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 7.

    Example:
        >>> w = jq.quantize(jnp.ones((8, 4)), jq.ArrayConfig(), axis=0)
        >>> jq.dot_general(jnp.ones((2, 8)), w, (((1,), (0,)), ((), ()))).shape
        (2, 4)
    """
    lhs, rhs = as_operands((lhs, rhs), implementation)
    options = DotOptions(precision, preferred_element_type, out_sharding, implementation)
    return dot_operands(lhs, rhs, dimension_numbers, options)


def dot_operands(
    lhs: Operand | LowRank,
    rhs: Operand | LowRank,
    dimension_numbers: lax.DotDimensionNumbers,
    options: DotOptions,
) -> jax.Array:
    """`dot_general` of operands that were checked."""
    if isinstance(lhs, LowRank) or isinstance(rhs, LowRank):
        return with_low_rank(dot_operands, lhs, rhs, dimension_numbers, options)
    if not (is_quantized(lhs) or is_quantized(rhs)):
        return lax.dot_general(
            lhs,  # pyright: ignore[reportArgumentType] (an array)
            rhs,  # pyright: ignore[reportArgumentType] (an array)
            dimension_numbers,
            options.precision,
            options.preferred_element_type,
            out_sharding=options.out_sharding,
        )
    spec = DotSpec.of_logical_axes(lhs, rhs, dimension_numbers, options)
    stack, layer = stack_of(rhs) or (None, None)
    return _dot_general(lhs, rhs, stack, layer, spec, options.implementation)


def dot_by_labels(
    lhs: Operand | LowRank,
    lhs_labels: Sequence[str],
    rhs: Operand | LowRank,
    rhs_labels: Sequence[str],
    out_labels: Sequence[str],
    options: DotOptions,
) -> jax.Array:
    """Product of two labelled operands, summed over the labels that are not in the output."""
    lhs, rhs, numbers, order = pair_axes(lhs, lhs_labels, rhs, rhs_labels, out_labels)
    sharding = before_transpose(options.out_sharding, order)
    options = dataclasses.replace(options, out_sharding=sharding)
    out = dot_operands(lhs, rhs, numbers, options)
    return out if order == tuple(range(out.ndim)) else out.transpose(order)


def _batched_matmul(
    lhs: Operand | LowRank, rhs: Operand | LowRank, options: DotOptions
) -> jax.Array:
    """`matmul` whose leading axes broadcast."""
    lhs_labels = [*hidden_labels(lhs.ndim - 2), *["m", "k"][-lhs.ndim :]]
    rhs_labels = [*hidden_labels(rhs.ndim - 2), *["k", "n"][: rhs.ndim]]
    outer = hidden_labels(max(lhs.ndim, rhs.ndim) - 2)
    out_labels = [*outer, *["m"] * (lhs.ndim > 1), *["n"] * (rhs.ndim > 1)]
    return dot_by_labels(lhs, lhs_labels, rhs, rhs_labels, out_labels, options)


@partial(jax.jit, static_argnames=("spec", "implementation"))
def _dot_general(
    lhs: Operand,
    rhs: Operand,
    stack: QTensor | None,
    layer: jax.Array | None,
    spec: DotSpec,
    implementation: str | None,
) -> jax.Array:
    has_offset = any(isinstance(x, QTensor) and x.offset is not None for x in (lhs, rhs))
    table = _WITH_OFFSETS if has_offset else _TABLE
    return dispatch.run(table, lhs, rhs, spec, implementation, stack, layer)


# Rows that XLA can partition among devices.
_PARTITIONED = (integer.ROW, tpu_xla.SCALED, tpu_xla.FUSED, dequantize.ROW)
_BY_XLA = (cpu_blocks.row(_PARTITIONED), *_PARTITIONED)
_TABLE = (
    cpu_native.row(_BY_XLA),
    tpu_pallas.row(_BY_XLA),
    gpu_triton.row(_BY_XLA),
    *_BY_XLA,
)
_WITH_OFFSETS = tuple(row if row.adds_offsets else adding_offsets(row) for row in _TABLE)
