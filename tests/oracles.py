"""Slow, obvious NumPy versions, written from the definitions and not from the library.

Configs and quantized arrays are read field by field; none of their methods is called.
"""

import math
from typing import Any

import ml_dtypes
import numpy as np

E4M3_SMALLEST, E4M3_LARGEST = 2.0**-9, 448.0


def sqnr(x, y) -> float:
    """Signal to quantization noise in dB: 10 log10(sum x^2 / sum (x - y)^2)."""
    x, y = np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64)
    return float(10 * np.log10(np.sum(x**2) / np.sum((x - y) ** 2)))


def dequantize(q) -> np.ndarray:
    """(codes - zero_point) * scale + offset in float64 and logical axes, from the stored fields."""
    values = code_values(q.codes, q.format)
    scale = dequantize(q.scale) if hasattr(q.scale, "codes") else np.asarray(q.scale, np.float64)
    if q.zero_point is not None:
        values = values - repeat_groups(np.asarray(q.zero_point).astype(np.float64), values.shape)
    values = values * repeat_groups(scale, values.shape)
    if q.offset is not None:
        nested = hasattr(q.offset, "codes")
        offset = dequantize(q.offset) if nested else np.asarray(q.offset, np.float64)
        values = values + repeat_groups(offset, values.shape)
    order = q.order or ()
    first = values.ndim - len(order)
    logical = [*range(first), *(values.ndim + axis for axis in order)]
    return values.transpose(np.argsort(logical)) if logical else values


def code_values(codes, format):
    """What each code stands for when the scale is 1."""
    codes = np.asarray(codes)
    if format.codebook is not None:
        index = codes.astype(np.int64) % 2**format.bits
        return np.asarray(format.codebook, np.float64)[index]
    return codes.astype(np.float64)


def repeat_groups(scale, shape):
    """Repeats each element over its block."""
    for axis, (count, length) in enumerate(zip(scale.shape, shape, strict=True)):
        scale = np.repeat(scale, length // count if count else 1, axis)
    return scale


def blocks(shape, config, axis: Any):
    """Scale counts, and a list of (index of the scale, slices of its elements)."""
    counts = scale_counts(shape, config, axis)
    return counts, blocks_of(shape, counts)


def scale_counts(shape, config, axis: Any):
    """How many scales lie along each axis."""
    named = axis if isinstance(axis, tuple) else (axis,)
    is_all = config.per_tensor or axis is None
    axes = list(range(len(shape))) if is_all else [a % len(shape) for a in named]
    sizes = config.group_size or config.format.group_size
    sizes = sizes if isinstance(sizes, tuple) else [sizes] * len(axes)
    lengths = [1] * len(shape)
    for axis, size in zip(axes, sizes, strict=True):
        lengths[axis] = size or shape[axis]
    return [n // g for n, g in zip(shape, lengths, strict=True)]


def blocks_of(shape, counts):
    """(Index of the scale, slices of its elements) where so many scales lie along each axis."""
    lengths = [n // count for n, count in zip(shape, counts, strict=True)]
    return [
        (index, tuple(slice(i * g, i * g + g) for i, g in zip(index, lengths, strict=True)))
        for index in np.ndindex(*counts)
    ]


def bounds(config):
    return config.value_range or (config.format.qmin, config.format.qmax)


def abs_max_range(group, symmetric):
    if symmetric:
        return -np.abs(group).max(), np.abs(group).max()
    return min(group.min(), 0), max(group.max(), 0)


def percentile_range(group, symmetric, p):
    group = np.asarray(group, np.float64)
    if symmetric:
        high = np.percentile(np.abs(group), p)
        return -high, high
    return min(np.percentile(group, 100 - p), 0), max(np.percentile(group, p), 0)


def ideal_scale(low, high, config):
    """Jacob et al. 2018, eq. 1; 0 for an empty range. e8m0: the next power of two above, but for
    codes that are floats the rule of OCP MX v1.0, section 6.3."""
    qmin, qmax = bounds(config)
    code_span = qmax - qmin if not config.symmetric else min(-qmin, qmax) if qmin < 0 else qmax
    span = high if config.symmetric else high - low
    scale_dtype = config.scale_dtype or config.format.scale_dtype
    if scale_dtype == "float8_e8m0fnu" and span > 0:
        if config.format.rounds or config.format.codebook is not None:
            return 2.0 ** math.ceil(math.log2(np.float32(span) / np.float32(code_span)))
        return 2.0 ** (math.floor(math.log2(span)) - math.floor(math.log2(code_span)))
    return float(span) / code_span


def stored_scale(scale, dtype, largest):
    """Scales rounded to their dtype. e4m3: NVFP4's two levels, amax/(6*448) under amax/6.

    `largest` is the largest scale of the abs-max ranges, which the outer scale represents.
    """
    if dtype == "float8_e4m3fn":
        top = np.float32(largest / E4M3_LARGEST if largest > 0 else 1)
        fine = np.clip(scale / top, E4M3_SMALLEST, E4M3_LARGEST)
        return fine.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * top
    scale = np.where(scale == 0, 1, scale)
    if dtype == "float16":
        limits = np.finfo(np.float16)
        scale = np.where(scale > limits.max, np.nan, np.maximum(scale, limits.smallest_subnormal))
    return scale.astype(getattr(ml_dtypes, dtype, None) or dtype).astype(np.float64)


def encode(group, scale, zero_point, config):
    """Nearest code, clipped."""
    values = np.asarray(group, np.float64) / scale
    if config.format.codebook is not None:
        distance = np.abs(values[..., None] - np.asarray(config.format.codebook))
        codes = distance.argmin(-1)
        # A codebook without negative numbers keeps what is positive.
        return codes if config.format.codebook[0] < 0 else np.maximum(codes, values > 0)
    qmin, qmax = bounds(config)
    if not config.format.dtype.startswith(("int", "uint")):
        cast = np.clip(values, qmin, qmax).astype(getattr(ml_dtypes, config.format.dtype))
        return cast.astype(np.float64)
    return np.clip(np.round(values) + zero_point, qmin, qmax)


def quantize(x, config, axis, range_of):
    """Group by group. Returns codes, scale and zero point, each in float64.

    `range_of(group, symmetric)` is one of the ranges above.
    """
    counts, all_blocks = blocks(x.shape, config, axis)
    ranges = {index: range_of(x[where], config.symmetric) for index, where in all_blocks}
    scale = np.zeros(counts)
    for index, (low, high) in ranges.items():
        scale[index] = ideal_scale(low, high, config)
    widest = [abs_max_range(x[where], config.symmetric) for _, where in all_blocks]
    largest = max((ideal_scale(*ends, config) for ends in widest), default=0)
    scale = stored_scale(scale, config.scale_dtype or config.format.scale_dtype, largest)
    zero_point = np.zeros(counts)
    if not config.symmetric:
        qmin, qmax = bounds(config)
        for index, (low, _) in ranges.items():
            zero_point[index] = np.clip(np.round(qmin - low / scale[index]), qmin, qmax)
    return encode_all(x, scale, zero_point, config), scale, zero_point


def encode_all(x, scale, zero_point, config):
    scale, zero_point = (repeat_groups(a, x.shape) for a in (scale, zero_point))
    return encode(x, scale, zero_point, config)


def best_squared_error(group, config, ratios):
    """Least squared error of a symmetric group over ratios of its abs-max range."""
    _, high = abs_max_range(group, symmetric=True)
    errors = []
    for ratio in ratios:
        scale = ideal_scale(-high * ratio, high * ratio, config)
        values = code_values(encode(group, scale, 0, config), config.format) * scale
        errors.append(np.sum((values - group) ** 2))
    return min(errors)


def pack(codes, axis, bits):
    """Code by code: the first of each byte in its lowest bits. Bytes as uint8."""
    per_byte = 8 // bits

    def pack_line(line):
        line = [int(code) % 2**bits for code in line] + [0] * (-len(line) % per_byte)
        fields = [line[i : i + per_byte] for i in range(0, len(line), per_byte)]
        return np.array([sum(c << (bits * i) for i, c in enumerate(f)) for f in fields], np.uint8)

    return np.apply_along_axis(pack_line, axis, np.asarray(codes))


def straight_through(x, scale, zero_point, config):
    """(value, d value / d x, d value / d scale, d value / d zero_point) for each element.

    LSQ, Esser et al. 2020, eq. 1 and 3, and LSQ+, Bhalgat et al. 2020, eq. 5, with an offset in
    units of codes. Scale and zero point are as long as x.
    """
    qmin, qmax = bounds(config)
    v = x / scale + zero_point
    value, of_x, of_scale, of_zero = (np.zeros(x.shape) for _ in range(4))
    for i in np.ndindex(x.shape):
        s, z = scale[i], zero_point[i]
        if v[i] < qmin or v[i] > qmax:
            end = qmin if v[i] < qmin else qmax
            value[i], of_scale[i], of_zero[i] = (end - z) * s, end - z, -s
        else:
            value[i], of_x[i] = (np.round(v[i]) - z) * s, 1
            of_scale[i] = np.round(v[i]) - v[i]
    return value, of_x, of_scale, of_zero


def sum_blocks(x, counts):
    """Sums over the elements that share a scale, of which there are so many along each axis."""
    return reduce_blocks(np.add, x, counts)


def reduce_blocks(ufunc, x, counts):
    """Reduces over the elements that share a scale."""
    for axis, count in enumerate(counts):
        x = ufunc.reduceat(x, np.arange(count) * (x.shape[axis] // count), axis)
    return x


def abs_max_quantize(x, config, axis):
    """`quantize` with `abs_max_range`, of all groups at once."""
    counts, x = scale_counts(x.shape, config, axis), x.astype(np.float64)
    if config.symmetric:
        high = reduce_blocks(np.maximum, np.abs(x), counts)
        low = -high
    else:
        low = np.minimum(reduce_blocks(np.minimum, x, counts), 0)
        high = np.maximum(reduce_blocks(np.maximum, x, counts), 0)
    scale = np.vectorize(lambda a, b: ideal_scale(a, b, config), otypes=[float])(low, high)
    scale_dtype = config.scale_dtype or config.format.scale_dtype
    scale = stored_scale(scale, scale_dtype, scale.max())
    qmin, qmax = bounds(config)
    zero_point = np.zeros(counts)
    if not config.symmetric:
        zero_point = np.clip(np.round(qmin - low / scale), qmin, qmax)
    return encode_all(x, scale, zero_point, config), scale, zero_point
