"""Operands of products, and slow float64 references for what the library makes of them."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import (
    FORMATS,
    FP8_E4M3,
    INT2,
    INT4,
    INT8,
    MXFP8,
    AbsMax,
    ArrayConfig,
    QTensor,
    quantize,
)
from jaxquant.ops.dot_spec import DotSpec

from .. import oracles
from ..cases import Case, as_case

# No two lengths are equal, and no operand is centered, so that nothing can be swapped or dropped.
M, K, N = 5, 64, 24

# Configs of a (K, N) weight, for scales along axis 0, or Cases. Every number format is here by its
# row in FORMATS.
WEIGHTS = {f.name: ArrayConfig(format=f) for f in FORMATS.values()} | {
    "int8-tensor": ArrayConfig(per_tensor=True),
    "int8-asym": ArrayConfig(symmetric=False),
    "int8-asym-tensor": ArrayConfig(per_tensor=True, symmetric=False),
    "int8-g16": ArrayConfig(group_size=16),
    "int8-blocks": Case(ArrayConfig(group_size=(32, 8)), (0, 1)),
    "int8-columns": Case(ArrayConfig(group_size=(K, 8), symmetric=False), (0, 1)),
    "int4-g32": ArrayConfig(format=INT4, group_size=32),
    "int4-asym": ArrayConfig(format=INT4, symmetric=False),
    "int4-asym-g32": ArrayConfig(format=INT4, group_size=32, symmetric=False),
    "int4-nested": ArrayConfig(format=INT4, scale_dtype="float8_e4m3fn"),
    "int2-asym-g16": ArrayConfig(format=INT2, group_size=16, symmetric=False),
}
# Configs of an (M, K) operand that meets it, for scales along axis -1; None leaves it in float.
INPUTS = {
    "float": None,
    "int8": ArrayConfig(),
    "int8-tensor": ArrayConfig(per_tensor=True),
    "int8-asym": ArrayConfig(symmetric=False),
    "fp8": ArrayConfig(format=FP8_E4M3),
    "mxfp8": ArrayConfig(format=MXFP8),
}
# One of each kind, for tests that compile each case again.
FEW = ("int8", "int8-asym", "int8-blocks", "int4-asym-g32", "fp8_e4m3", "nf4", "nvfp4")
ORDERS = (None, (-1, -2))


def normal(*shape: int, seed=0, center=0.3, dtype: Any = np.float32) -> np.ndarray:
    """Float values around `center`, whose last axis has entries of different size."""
    random = np.random.default_rng(seed)
    sizes = np.exp2(np.linspace(-2, 2, shape[-1])) if shape else 1.0
    return ((random.normal(size=shape) + center) * sizes).astype(dtype)


def weight(case, shape=(K, N), seed=1):
    """An array quantized by a Case, or by a config along axis 0."""
    return jax.tree.map(jnp.asarray, _weight(as_case(case), tuple(shape), seed))


@functools.cache
def _weight(case, shape, seed):
    return _quantized(normal(*shape, seed=seed), *case)


def quantized(x, config, axis: Any = 0) -> QTensor:
    """What `quantize` returns, up to the last bit of scales.

    NumPy computes it, because `quantize` is compiled for each config and shape.
    """
    if x.size == 0:
        return quantize(x, config, axis)
    return jax.tree.map(jnp.asarray, _quantized(x, config, axis))


def _quantized(x, config, axis) -> QTensor:
    assert isinstance(config.range, AbsMax), config
    format, scale_dtype = config.format, config.scale_dtype or config.format.scale_dtype
    dtype = x.dtype if x.dtype == np.float64 else np.dtype(np.float32)
    codes: Any
    stored: Any
    codes, scale, zero = oracles.abs_max_quantize(np.asarray(x).astype(dtype), config, axis)
    if scale_dtype == FP8_E4M3.dtype:
        assert x.ndim <= 2, "one outer scale per matrix"
        top = np.float32(scale.max() / 448).reshape((1,) * x.ndim)
        fine: Any = (scale / top).astype(jnp.dtype(scale_dtype))
        stored = QTensor(fine, top, format=FP8_E4M3, dtype=np.dtype(dtype))
    else:
        stored = scale.astype(jnp.dtype(scale_dtype))
    zero_point: Any = None if config.symmetric else zero.astype(jnp.dtype(format.dtype))
    codes = codes.astype(jnp.dtype(format.dtype))
    return QTensor(codes, stored, zero_point, format=format, dtype=np.dtype(x.dtype))


def with_unit_scale(codes, zero_point=None):
    """A QTensor that stands for its int8 codes, less the zero point."""
    ones = (1,) * codes.ndim
    zero_point = None if zero_point is None else jnp.asarray(np.full(ones, zero_point, np.int8))
    scale = jnp.asarray(np.ones(ones, np.float32))
    return QTensor(jnp.asarray(codes), scale, zero_point, format=INT8, dtype=np.dtype(np.float32))


def spec_of_rows(axis: int, precision: Any = None, dtype: Any = np.float32) -> DotSpec:
    """That of (M, K) rows times a matrix whose stored `axis` is contracted."""
    return DotSpec(((1,), (axis,)), ((), ()), (0, 1), np.dtype(dtype), precision, None)


def with_inputs(q, inputs):
    return dataclasses.replace(q, inputs=inputs)


def values(x):
    """What an operand stands for, in float64 and logical axes."""
    return oracles.dequantize(x) if isinstance(x, QTensor) else np.asarray(x).astype(np.float64)


def assert_close(got, want, size, tolerance=2e-6):
    """Errors of at most `tolerance`, relative to the sum of the magnitudes that were added."""
    got, size = np.asarray(got).astype(np.float64), np.asarray(size)
    assert got.shape == want.shape
    np.testing.assert_array_less(np.abs(got - want), tolerance * size + 1e-30)


def assert_product(got, equation, *operands, tolerance=2e-6):
    """`got` is np.einsum of what the operands stand for, up to the rounding of float32 sums."""
    arrays = [values(x) for x in operands]
    size = np.einsum(equation, *map(np.abs, arrays))
    assert_close(got, np.einsum(equation, *arrays), size, tolerance)


def conv(lhs, rhs, strides, padding, lhs_dilation=(1, 1), rhs_dilation=(1, 1), groups=1):
    """Convolution of (N, H, W, C) images with (H, W, C / groups, O) kernels, point by point."""
    batch, height, width, channels = lhs.shape
    rows, columns, depth, outputs = rhs.shape
    wide = np.zeros(
        (
            batch,
            padding[0][0] + (height - 1) * lhs_dilation[0] + 1 + padding[0][1],
            padding[1][0] + (width - 1) * lhs_dilation[1] + 1 + padding[1][1],
            channels,
        )
    )
    for y, x in itertools.product(range(height), range(width)):
        row, column = padding[0][0] + y * lhs_dilation[0], padding[1][0] + x * lhs_dilation[1]
        wide[:, row, column] = lhs[:, y, x]
    extent = (rows - 1) * rhs_dilation[0] + 1, (columns - 1) * rhs_dilation[1] + 1
    lengths = [(wide.shape[1 + i] - extent[i]) // strides[i] + 1 for i in range(2)]
    out = np.zeros((batch, *lengths, outputs))
    for y, x, o in itertools.product(*map(range, lengths), range(outputs)):
        first = o // (outputs // groups) * depth
        for i, j in itertools.product(range(rows), range(columns)):
            row, column = y * strides[0] + i * rhs_dilation[0], x * strides[1] + j * rhs_dilation[1]
            pixels = wide[:, row, column, first : first + depth]
            out[:, y, x, o] += pixels @ rhs[i, j, :, o]
    return out


def ragged_dot(lhs, rhs, group_sizes):
    """One product per group of rows; zeros below the last group."""
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    start = 0
    for matrix, size in zip(rhs, np.asarray(group_sizes), strict=True):
        out[start : start + size] = lhs[start : start + size] @ matrix
        start += size
    return out
