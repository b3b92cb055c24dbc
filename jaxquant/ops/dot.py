"""The product that all others are made of: `dot_general` on quantized operands.

Everything below `dot_general` works on arrays as they are stored; the logical order of axes
returns at the end, by a transpose of the result if there is need of one.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ..core import LowRank, QTensor, scale_values
from ..jaxprs import (
    OutSharding,
    before_transpose,
    is_sharded,
    on_one_gpu,
    on_one_tpu,
    unless_exported,
    vary_alike,
)
from ..kernels import integer_dot
from . import blocks, dispatch, native, pallas, tpu, triton
from .dispatch import Factor, Implementation
from .dot_spec import DotSpec, in_result, logical
from .low_rank import with_low_rank
from .operands import (
    as_array,
    check_factors,
    refuses_codes,
    refuses_length,
    result_dtype,
    stored_axes,
    with_dequantized_gradient,
)


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
        lambda lhs, rhs: _dequantized(lhs, rhs, spec),
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


def _dequantized(lhs, rhs, spec):
    """Dequantizes both sides as they are stored; XLA fuses that into the product if it can."""
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    out = lax.dot_general(
        as_array(lhs).astype(dtype),
        as_array(rhs).astype(dtype),
        (spec.contract, spec.batch),
        precision=spec.precision,
        preferred_element_type=spec.dtype,
        out_sharding=spec.out_sharding,
    )
    return logical(out, spec)


def _integer(lhs, rhs, spec, dot=integer_dot):
    """Multiplies the codes as integers and scales the result."""
    acc = dot(
        lhs.codes.astype(jnp.int8),
        rhs.codes.astype(jnp.int8),
        (spec.contract, spec.batch),
        spec.out_sharding,
    )
    acc = acc + _zero_point_terms(lhs, rhs, spec)
    compute = jnp.float64 if spec.dtype == jnp.float64 else jnp.float32
    out = acc.astype(compute)
    for side, x in enumerate((lhs, rhs)):
        scale = scale_values(x.scale).astype(compute)
        out = out * in_result(scale, side, (lhs, rhs), spec)
    return logical(out.astype(spec.dtype), spec)


def _zero_point_terms(lhs, rhs, spec):
    """-z_l sum c_r - z_r sum (c_l - z_l): sums of rows and columns, not a second product."""
    view = partial(in_result, operands=(lhs, rhs), spec=spec)
    lhs_sum, rhs_sum = (
        jnp.sum(x.codes.astype(jnp.int32), axes, keepdims=True)
        for x, axes in zip((lhs, rhs), spec.contract, strict=True)
    )
    terms, lhs_centered = jnp.int32(0), view(lhs_sum, 0)
    if lhs.zero_point is not None:
        length = math.prod(lhs.codes.shape[a] for a in spec.contract[0])
        zero = view(lhs.zero_point.astype(jnp.int32), 0)
        terms, lhs_centered = terms - zero * view(rhs_sum, 1), lhs_centered - length * zero
    if rhs.zero_point is not None:
        terms = terms - view(rhs.zero_point.astype(jnp.int32), 1) * lhs_centered
    return terms


def _refuses_integer(lhs, rhs, spec):
    """int8 holds the codes, int32 their sums, and no scale changes along a sum."""
    for x, axes in zip((lhs, rhs), spec.contract, strict=True):
        why_not = refuses_codes(x)
        if why_not is not None:
            return why_not
        if any(x.scale.shape[a] > 1 for a in axes):
            return f"scales {x.scale.shape} change along the contracted axes"
    return refuses_length(math.prod(lhs.codes.shape[a] for a in spec.contract[0]), lhs, rhs)


def _native(lhs, rhs, spec):
    """By machine code of our own for CPUs."""
    if rhs.format.bits == 8 and _refuses_integer(lhs, rhs, spec) is None:
        return _natively_by_int8(lhs, rhs, spec)
    by_codes = native.takes_codes(lhs, rhs)
    scale = in_result(scale_values(lhs.scale), 0, (lhs, rhs), spec) if by_codes else None
    out = native.product(lhs, rhs, spec.dtype, scale)
    return logical(out.astype(spec.dtype), spec)


def _natively_by_int8(lhs, rhs, spec):
    zeros = lhs.zero_point, rhs.zero_point
    if spec.dtype == jnp.float64 or any(zero is not None for zero in zeros):
        return _integer(lhs, rhs, spec, native.int8_product)
    left, right = (x.codes.astype(jnp.int8) for x in (lhs, rhs))
    row, column = (
        in_result(scale_values(x.scale), side, (lhs, rhs), spec)
        for side, x in enumerate((lhs, rhs))
    )
    out = native.scaled_int8_product(left, right, row, column, spec.dtype)
    return logical(out.astype(spec.dtype), spec)


def _refuses_native(lhs, rhs, spec):
    why_not = _refuses_kernels(lhs, rhs, spec, 1)
    if why_not is not None:
        return why_not
    if rhs.format.bits == 8 and _refuses_integer(lhs, rhs, spec) is None:
        return native.refuses_size(lhs, rhs, by_codes=True)
    return "float64 is asked for" if spec.dtype == jnp.float64 else native.refuses(lhs, rhs)


def _refuses_kernels(lhs, rhs, spec, axis):
    """Why kernels of our own do not take these, for matrices that are contracted along `axis`."""
    if not isinstance(rhs, QTensor):
        return "the right operand is not quantized"
    if spec.batch[1] or (rhs.codes.ndim, spec.contract[1]) != (2, (axis,)):
        place = ("first", "last")[axis]
        return f"the right operand is not stored as a matrix whose {place} axis is contracted"
    if spec.contract[0] != (lhs.ndim - 1,):
        return "the left operand is not contracted along its last axis alone"
    leaves = jax.tree.leaves((lhs, rhs))
    if spec.out_sharding is not None or any(is_sharded(x) for x in leaves):
        return "the kernels take no sharded arrays"
    return None


def _pallas(lhs, rhs, spec, product):
    return logical(product(lhs, rhs, spec.dtype), spec)


def _by_kernel(lhs, rhs, spec, run, where, platform):
    """run(lhs, rhs, spec) in programs that may hold kernels of our own; in others, XLA's choice."""
    leaves, treedef = jax.tree.flatten((lhs, rhs))

    def here(*leaves):
        return run(*jax.tree.unflatten(treedef, leaves), spec)

    def elsewhere(*leaves):
        lhs, rhs = jax.tree.unflatten(treedef, leaves)
        return dispatch.run_on(_BY_XLA, lhs, rhs, spec, platform)

    return where(here, elsewhere, *vary_alike(leaves))


def _refuses_kernel(lhs, rhs, spec, refuses, axis):
    why_not = _refuses_kernels(lhs, rhs, spec, axis)
    if why_not is not None:
        return why_not
    return (
        "float64 is asked for" if spec.dtype == jnp.float64 else refuses(lhs, rhs, spec.precision)
    )


def _pallas_loses(lhs, rhs, spec, chip):
    if _refuses_integer(lhs, rhs, spec) is None:
        return "XLA multiplies codes with one scale per column as integers"
    return pallas.loses(lhs, rhs, chip)


def _scaled(lhs, rhs, spec):
    """Multiplies codes as floats where their scales can wait for the result, values elsewhere."""
    operands, dtype = (lhs, rhs), jnp.promote_types(lhs.dtype, rhs.dtype)
    waits = [tpu.can_wait(*pair) for pair in zip(operands, spec.contract, strict=True)]
    factors = [x.codes if w else as_array(x) for x, w in zip(operands, waits, strict=True)]
    if factors[0].dtype != factors[1].dtype or not jnp.issubdtype(factors[0].dtype, jnp.floating):
        factors = [x.astype(dtype) for x in factors]
    compute = jnp.float64 if spec.dtype == jnp.float64 else jnp.float32
    out = lax.dot_general(
        *factors,
        (spec.contract, spec.batch),
        precision=spec.precision,
        preferred_element_type=compute,
        out_sharding=spec.out_sharding,
    )
    for side, x in enumerate(operands):
        if waits[side]:
            out = out * in_result(scale_values(x.scale).astype(compute), side, operands, spec)
    return logical(out.astype(spec.dtype), spec)


def _refuses_scaled(lhs, rhs, spec):
    waits = [tpu.can_wait(*pair) for pair in zip((lhs, rhs), spec.contract, strict=True)]
    return None if any(waits) else "no operand has codes whose scale can wait for the result"


def _scaled_loses(lhs, rhs, spec, chip):
    is_by_float = not isinstance(lhs, QTensor)
    return tpu.dequantizes_faster(spec.rows(lhs, rhs), chip) if is_by_float else None


def _fused(lhs, rhs, spec):
    """Dequantizes one side while the other is multiplied with it."""
    lhs, rhs = (x if isinstance(x, QTensor) else tpu.computed(jnp.asarray(x)) for x in (lhs, rhs))
    return _dequantized(lhs, rhs, spec)


def _refuses_fused(lhs, rhs, spec):
    grouped = [tpu.is_grouped(*pair) for pair in zip((lhs, rhs), spec.contract, strict=True)]
    is_array = [not isinstance(x, QTensor) for x in (lhs, rhs)]
    return None if any(grouped) and any(is_array) else "it is for grouped scales by a float array"


def _blocks(lhs, rhs, spec):
    if _refuses_integer(lhs, rhs, spec) is None:
        return blocks.product(lhs, rhs, partial(_integer, spec=spec))
    # Once, not once per block.
    return blocks.product(as_array(lhs), rhs, partial(_dequantized, spec=spec))


def _refuses_blocks(lhs, rhs, spec):
    """Large weights on the right, their one free axis stored first, few rows on the left."""
    if not isinstance(rhs, QTensor):
        return "the right operand is not quantized"
    if spec.batch[1] or spec.free(rhs, 1) != [0]:
        return "the right operand is not stored with one free axis, first"
    if spec.out_sharding is not None or is_sharded(rhs.codes):
        return "blocks cannot be cut from sharded arrays"
    why_not = blocks.refuses(rhs, spec.rows(lhs, rhs) or 0)
    if why_not is not None:
        return why_not
    is_native = rhs.format.bits == 8 and _refuses_integer(lhs, rhs, spec) is None
    return "products of 8-bit codes need no blocks" if is_native else None


def _is_integer(lhs, rhs, spec):
    return _refuses_integer(lhs, rhs, spec) is None


def _is_integer_of_8_bits(lhs, rhs, spec):
    return rhs.format.bits == 8 and _is_integer(lhs, rhs, spec)


def _is_integer_natively(lhs, rhs, spec):
    return _is_integer_of_8_bits(lhs, rhs, spec) or native.takes_codes(lhs, rhs)


_BY_XLA = (
    Implementation("blocks", _blocks, _refuses_blocks, ("cpu",), is_integer=_is_integer),
    Implementation("integer", _integer, _refuses_integer, is_integer=_is_integer),
    Implementation("scaled", _scaled, _refuses_scaled, ("tpu",), _scaled_loses),
    Implementation("fused", _fused, _refuses_fused, ("tpu",)),
    Implementation("dequantize", _dequantized, lambda lhs, rhs, spec: None),
)
_TABLE = (
    Implementation(
        "native",
        partial(_by_kernel, run=_native, where=unless_exported, platform="cpu"),
        _refuses_native,
        ("cpu",),
        is_integer=_is_integer_natively,
        copies_no_codes=True,
    ),
    Implementation(
        "pallas",
        partial(
            _by_kernel,
            run=partial(_pallas, product=pallas.product),
            where=on_one_tpu,
            platform="tpu",
        ),
        partial(_refuses_kernel, refuses=pallas.refuses, axis=0),
        ("tpu",),
        _pallas_loses,
        copies_no_codes=True,
    ),
    Implementation(
        "triton",
        partial(
            _by_kernel,
            run=partial(_pallas, product=triton.product),
            where=on_one_gpu,
            platform="cuda",
        ),
        partial(_refuses_kernel, refuses=triton.refuses, axis=1),
        ("cuda",),
        triton.loses,
        _is_integer_of_8_bits,
        copies_no_codes=True,
    ),
    *_BY_XLA,
)
