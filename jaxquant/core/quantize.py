"""Arrays to quantized arrays."""

from functools import partial

import jax
import jax.numpy as jnp

from . import affine
from .blocks import Axes, block_shape, blocks_between, from_blocks, scale_shape, split, to_blocks
from .config import ArrayConfig
from .formats import FP8_E4M3, bits_of
from .qtensor import QTensor, scale_values
from .ranges import AbsMax, Percentile, largest_magnitude


@partial(jax.jit, static_argnames="axis")
def quantize(
    x: jax.Array, config: ArrayConfig, axis: Axes = 0, key: jax.Array | None = None
) -> QTensor:
    """Quantizes an array as `config` says.

        (low, high) = range of each group            by config.range
        scale       = high / min(-qmin, qmax)        (high - low) / (qmax - qmin) if asymmetric
        zero_point  = 0                              round(qmin - low / scale) if asymmetric
        codes       = clip(round(x / scale) + zero_point, qmin, qmax)
        x           ~ (codes - zero_point) * scale

    Scale and codes are computed in float32 (in float64 for float64), and codes with the scale
    as it is stored. In formats of floats the cast rounds, to nearest, ties to even; codebook
    formats take the nearest entry.

    Args:
        x: floating array of any rank and size.
        config: format, groups, range and dtype of the scales.
        axis: the axis, or a tuple of axes, along which elements share a scale, as in
            `jnp.sum(x, axis)`: the contracted axes of a weight. None for all axes. Static.
        key: random key, to round stochastically: to one of the two codes around a value, so
            that the expectation is the value where it is not clipped. None rounds to nearest.

    Returns:
        QTensor of
            codes: shape of x, dtype of the format;
            scale: one per group, in units of x per code: the rank of x, and n/g in place of
                the length n of an axis with groups of g; dtype `config.stored_scale_dtype`;
            zero_point: None, or the shape of scale and the dtype of codes, in units of codes.
        An all-zero group has scale 1 (the smallest one where scales are a QTensor) and codes
        that decode to exact zeros. A group with NaN or Inf has scale NaN, so all of it
        dequantizes to NaN.

    Raises:
        ValueError: x is not a floating array, config is not an ArrayConfig, an axis is out of
            range, or a group size does not divide its axis.

    Error: at most scale/2 per element that is not clipped, in formats of whole numbers, and scale
        with a key; up to float32 rounding. `AbsMax()` with float32 scales clips none; a scale
        that is rounded down to a narrower dtype clips what it no longer reaches. Groups whose
        largest magnitude is under 1.2e-38 * qmax have no normal float32 scale and come back as
        zeros; scales end at 8.5e37, so in formats with qmax = 1 values beyond it are clipped.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1; stochastic rounding: Gupta et al.
        2015, arXiv:1502.02551, section 3.1.
    """
    groups, axes, blocks = _groups(x, config, axis)
    peak = jnp.max(jnp.abs(groups), axes, keepdims=True, initial=0)
    peak = jnp.where(peak > 0, peak, 1)

    def error(low, high):
        scale, zero_point = parameters(low, high)
        codes = affine.encode(groups, scale, zero_point, config)
        values = affine.decode(codes, scale, zero_point, config.format)
        # In units of the peak, because squares of 1e-20 or 1e20 are no float32.
        return jnp.sum(jnp.square((values - groups) / peak), axes, keepdims=True)

    def parameters(low, high):
        scale = _store_scale(affine.fit_scale(low, high, config), config.stored_scale_dtype)
        scale = scale_values(scale).astype(groups.dtype)
        zero_point = None if config.symmetric else affine.fit_zero_point(low, scale, config)
        return scale, zero_point

    low, high = config.range(groups, axes, config.symmetric, error)
    return _quantize_groups(x, groups, axes, blocks, low, high, config, key)


@partial(jax.jit, static_argnames="axis")
def quantize_with_range(
    x: jax.Array,
    low: jax.Array,
    high: jax.Array,
    config: ArrayConfig,
    axis: Axes = 0,
    key: jax.Array | None = None,
) -> QTensor:
    """Quantizes so that the codes span a range that is given, such as an observed or learned one.

    This is `quantize`, which has the details, with (low, high) in place of config.range.

    Args:
        x: floating array of any rank.
        low, high: ends of each group's range, one per scale in the shape that the scales have,
            or scalars. An asymmetric range is widened to hold zero; of a symmetric one `high`
            counts alone. A range without width gets scale 1.
        config: format, groups and dtype of the scales.
        axis, key: as for `quantize`.

    Returns:
        QTensor. A group whose range is not finite or negative has scale NaN.

    Raises:
        ValueError: as for `quantize`, or a range has another shape.

    Error: at most scale/2 per element within the range, in formats of whole numbers.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.
    """
    groups, axes, blocks = _groups(x, config, axis)
    counts = scale_shape(x.shape, blocks)
    for end in (low, high):
        if end.ndim and end.shape != counts:
            raise ValueError(
                f"low and high must be scalars or have the shape of the scales, {counts}; got "
                f"{end.shape} for x {x.shape}."
            )
    ends = (jnp.broadcast_to(end, counts).astype(groups.dtype) for end in (low, high))
    low, high = (to_blocks(end, blocks) for end in ends)
    if config.symmetric:
        low = -high
    is_range = (low <= high) & (high < jnp.inf) & (low > -jnp.inf)
    low, high = (jnp.where(is_range, end, jnp.nan) for end in (low, high))
    low, high = jnp.where(low > 0, 0, low), jnp.where(high < 0, 0, high)
    return _quantize_groups(x, groups, axes, blocks, low, high, config, key)


def _quantize_groups(x, groups, axes, blocks, low, high, config, key):
    """Codes of x, split into `groups`, that span [low, high]."""
    scale = affine.fit_scale(low, high, config)
    # Here, not in the ranges: no range may hide NaN or Inf, whoever wrote it.
    scale = jnp.where(_is_finite(groups, axes), scale, jnp.nan)
    scale = _store_scale(from_blocks(scale, x.shape, blocks), config.stored_scale_dtype)
    step = to_blocks(scale_values(scale).astype(groups.dtype), blocks)
    zero_point = None if config.symmetric else affine.fit_zero_point(low, step, config)
    codes = affine.encode(groups, step, zero_point, config, key).reshape(x.shape)
    if zero_point is not None:
        zero_point = from_blocks(zero_point, x.shape, blocks)
    return QTensor(codes, scale, zero_point, format=config.format, dtype=x.dtype)


@jax.jit
def quantize_with_scale(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array | None, config: ArrayConfig
) -> QTensor:
    """Quantizes with a scale that is given, such as a calibrated one.

        codes = clip(round(x / scale) + zero_point, qmin, qmax)

    Args:
        x: floating array of any rank.
        scale: positive float array of the rank of x whose lengths divide those of x, or a
            scalar.
        zero_point: in the shape of scale, rounded to whole numbers and clipped to the codes; None
            for zero.
        config: its format and value range are used; its axis, group size and range are not.

    Returns:
        QTensor with that scale in float32 (float64 for float64), and NaN in the place of a
        scale that is not positive, or whose block holds NaN or Inf.

    Raises:
        ValueError: x is not floating, the lengths of scale do not divide those of x, or there
            is a zero point of another shape, or for a symmetric config.

    Error: at most scale/2 per element that is not clipped, in formats of whole numbers.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.
    """
    _check(x, config)
    if zero_point is not None and (config.symmetric or zero_point.shape != scale.shape):
        raise ValueError(
            "zero_point must be None for a symmetric config, and else have the shape of scale, "
            f"{scale.shape}; got shape {zero_point.shape} and symmetric={config.symmetric}."
        )
    shape = scale.shape if scale.ndim else (1,) * x.ndim
    divides = len(shape) == x.ndim and all(
        n % s == 0 if s else n == 0 for n, s in zip(x.shape, shape, strict=True)
    )
    if not divides:
        raise ValueError(
            "scale must be a scalar, or have the rank of x and lengths that divide those of x; "
            f"got scale {scale.shape} for x {x.shape}."
        )
    blocks = blocks_between(x.shape, shape)
    groups, axes = split(x.astype(_compute_dtype(x)), blocks)
    step = to_blocks(scale.reshape(shape).astype(groups.dtype), blocks)
    step = jnp.where(_is_finite(groups, axes) & (step > 0), step, jnp.nan)
    if zero_point is not None:
        zero_point = jnp.clip(jnp.round(zero_point.reshape(shape)), *config.bounds)
        zero_point = zero_point.astype(config.format.dtype)
    spread_zero = None if zero_point is None else to_blocks(zero_point, blocks)
    codes = affine.encode(groups, step, spread_zero, config).reshape(x.shape)
    return QTensor(codes, step.reshape(shape), zero_point, format=config.format, dtype=x.dtype)


def abs_max_quantize(x: jax.Array, config: ArrayConfig, axis: Axes = 0) -> QTensor:
    """Quantizes so that the largest magnitude of each group lands on the outermost code.

        scale = max|x| / min(-qmin, qmax)        codes = round(x / scale)

    This is `quantize`, which has the details, for configs whose range is `AbsMax()`.

    Raises:
        ValueError: config.range is another one, or as for `quantize`.

    Error: at most scale/2 per element, in formats of whole numbers, up to float32 rounding.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.
    """
    _check_range(config, AbsMax)
    return quantize(x, config, axis)


def percentile_quantize(x: jax.Array, config: ArrayConfig, axis: Axes = 0) -> QTensor:
    """Quantizes so that the p-th percentile of |x| in each group lands on the outermost code.

        scale = percentile(|x|, p) / min(-qmin, qmax)        codes = clip(round(x / scale))

    This is `quantize`, which has the details, for configs whose range is `Percentile(p)`.

    Raises:
        ValueError: config.range is another one, or as for `quantize`.

    Error: at most scale/2 per element up to the percentile; those beyond it are clipped.
    Source: Wu et al. 2020, arXiv:2004.09602, section 5.2.
    """
    _check_range(config, Percentile)
    return quantize(x, config, axis)


def _check_range(config, wanted):
    if isinstance(config, ArrayConfig) and not isinstance(config.range, wanted):
        raise ValueError(
            f"config.range must be {wanted.__name__}(...) here; got {config.range!r}. "
            "quantize(x, config) takes any range."
        )


def _check(x, config):
    if isinstance(x, QTensor):
        raise ValueError(f"x is quantized already; got {x!r}. Dequantize it first.")
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        got = f"{x.dtype} of shape {x.shape}" if hasattr(x, "dtype") else type(x).__name__
        raise ValueError(f"x must be a floating array; got {got}. Use jnp.asarray(x, float).")
    if not isinstance(config, ArrayConfig):
        raise ValueError(
            f"config must be an ArrayConfig; got {config!r}. Of a Scheme, pass its weights; of a "
            "Format f, ArrayConfig(format=f)."
        )


def _compute_dtype(x):
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _groups(x, config, axis):
    """x in the dtype of the computation and split into groups, their axes, and blocks."""
    _check(x, config)
    blocks = block_shape(x.shape, config, axis)
    return *split(x.astype(_compute_dtype(x)), blocks), blocks


def _is_finite(groups, axes):
    """Whether all of each group is. By what AbsMax() computes too, so that XLA does it once."""
    return largest_magnitude(groups, axes) < jnp.inf


def _store_scale(scale, dtype):
    """Scales in their dtype; those too narrow for it as a QTensor under one float scale.

    No scale vanishes: it is at least the smallest number of the dtype. One that is too large is
    NaN, since its group would be clipped. That of an empty range, 0, becomes 1.
    """
    info = jnp.finfo(dtype)
    if bits_of(dtype) == 8 and not affine.has_exponent_only(dtype):
        return _store_nested(scale)
    scale = jnp.where(scale == 0, 1, scale)
    if info.bits >= jnp.finfo(scale.dtype).bits or affine.has_exponent_only(dtype):
        return scale.astype(dtype)
    # Subnormals of float32, and so of bfloat16, are flushed to zero; those of float16 are not.
    smallest = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    scale = jnp.where(scale > float(info.max), jnp.nan, scale)
    return jnp.maximum(scale, smallest).astype(dtype)


def _store_nested(scale):
    """Scales as FP8_E4M3 codes under one scale per matrix. NaN stays with its group."""
    is_nan = jnp.isnan(scale)
    # Leading axes keep scales of their own, so that stacked layers can be scanned.
    matrix = tuple(range(max(scale.ndim - 2, 0), scale.ndim))
    q = quantize(jnp.where(is_nan, 0, scale), ArrayConfig(format=FP8_E4M3), matrix)
    # A group of tiny values or of zeros gets the smallest positive code: 0 would divide by zero.
    # Not 1, which would be the largest of all where the other scales are small.
    codes = jnp.maximum(q.codes.astype(scale.dtype), 2.0**-9)
    codes = jnp.where(is_nan, jnp.nan, codes).astype(q.codes.dtype)
    return QTensor(codes, q.scale, format=q.format, dtype=scale.dtype)
