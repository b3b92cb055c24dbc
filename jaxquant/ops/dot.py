"""The product that all others are made of: `dot_general` on quantized operands.

Everything below `dot_general` works on arrays as they are stored; the logical order of axes
returns at the end, by a transpose of the result if there is need of one.
"""

from functools import partial

import jax
from jax import lax

from ..core import LowRank, QTensor
from ..jaxprs import OutSharding, before_transpose
from . import dispatch
from .dispatch import Factor
from .dot_spec import DotSpec
from .low_rank import with_low_rank
from .operands import check_factors, result_dtype, stored_axes, with_dequantized_gradient
from .rows import cpu_blocks, cpu_native, dequantize, gpu_triton, integer, tpu_pallas, tpu_xla


def dot_general(
    lhs: Factor,
    rhs: Factor,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    out_sharding: OutSharding = None,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.dot_general` on arrays and QTensors, in any mixture.

        out = sum over the contracted axes of dequantize(lhs) * dequantize(rhs)

    A float operand that meets a QTensor with `inputs` is first treated as these say. Codes of
    whole numbers with no scale grouped along the contracted axes are multiplied as integers:
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
            or "dequantize", to force one; None to choose by operands and platform.

    Returns:
        Array of shape (batch, lhs free, rhs free).

    Raises:
        ValueError: `implementation` cannot run these operands, or a dtype is not floating.
        TypeError: the shapes do not fit; from `jax.lax.dot_general`.

    Gradients: a float operand gets the gradient of the float product with the dequantized
        other, rounding counting as the identity; so do scales of 16 bits or more.
    Error: integer products are exact in int32 (sums that might leave it, of 131072 or more
        products of int8 codes, are not computed so) and rounded once, by the scales in
        float32. Others are those of `jax.lax.dot_general` on dequantized operands.
    Source: Jacob et al. 2018, arXiv:1712.05877, eq. 7.
    """
    lhs, rhs = check_factors((lhs, rhs), implementation)
    if isinstance(lhs, LowRank) or isinstance(rhs, LowRank):
        options = preferred_element_type, precision, out_sharding
        product = partial(dot_general, implementation=implementation)
        return with_low_rank(product, lhs, rhs, dimension_numbers, *options)
    if not (isinstance(lhs, QTensor) or isinstance(rhs, QTensor)):
        return lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            out_sharding=out_sharding,
        )
    contract, batch = (
        (stored_axes(lhs, pair[0]), stored_axes(rhs, pair[1])) for pair in dimension_numbers
    )
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    permutation = _permutation(lhs, rhs, dimension_numbers)
    stored_sharding = before_transpose(out_sharding, permutation)
    spec = DotSpec(contract, batch, permutation, dtype, precision, stored_sharding)
    return _dot_general(lhs, rhs, spec, implementation)


@partial(jax.jit, static_argnames=("spec", "implementation"))
def _dot_general(lhs, rhs, spec, implementation):
    return with_dequantized_gradient(
        lambda lhs, rhs: dispatch.run(_TABLE, lhs, rhs, spec, implementation),
        lambda lhs, rhs: dequantize.run(lhs, rhs, spec),
        (lhs, rhs),
        spec.contract,
    )


def _permutation(lhs, rhs, dimension_numbers):
    """Where the axes of the result lie in the product of the stored arrays."""
    contract, batch = dimension_numbers
    order = list(range(len(batch[0])))
    for x, *taken in zip((lhs, rhs), contract, batch, strict=True):
        taken = {a % x.ndim for axes in taken for a in axes}
        stored = stored_axes(x, [a for a in range(x.ndim) if a not in taken])
        order += [len(order) + sorted(stored).index(a) for a in stored]
    return tuple(order)


# Rows that XLA can partition among devices.
_PARTITIONED = (integer.ROW, tpu_xla.SCALED, tpu_xla.FUSED, dequantize.ROW)
_BY_XLA = (cpu_blocks.row(_PARTITIONED), *_PARTITIONED)
_TABLE = (
    cpu_native.row(_BY_XLA),
    tpu_pallas.row(_BY_XLA),
    gpu_triton.row(_BY_XLA),
    *_BY_XLA,
)
