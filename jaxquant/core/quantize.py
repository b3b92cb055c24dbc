"""Arrays to quantized arrays."""

from functools import partial

import jax
import jax.numpy as jnp

from .blocks import Axes, Groups, blocks_between, split_groups
from .config import ArrayConfig
from .qtensor import QTensor
from .ranges import AbsMax, Percentile
from .steps import encode, fit_range, fit_scale, fit_zero_point, group, is_finite, scale_unit


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
    _check(x, config)
    groups = group(x, config, axis)
    low, high = fit_range(groups, config)
    scale = fit_scale(groups, low, high, config, scale_unit(groups, config))
    return encode(groups, scale, fit_zero_point(groups, low, scale, config), config, key)


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
    _check(x, config)
    groups = group(x, config, axis)
    low, high = _given_range(groups, low, high, config)
    scale = fit_scale(groups, low, high, config)
    return encode(groups, scale, fit_zero_point(groups, low, scale, config), config, key)


def _given_range(groups: Groups, low: jax.Array, high: jax.Array, config: ArrayConfig):
    """The ends of a given range, widened to hold zero, and NaN where it is not a range."""
    counts = groups.scale_shape
    for end in (low, high):
        if end.ndim and end.shape != counts:
            raise ValueError(
                f"low and high must be scalars or have the shape of the scales, {counts}; got "
                f"{end.shape} for x {groups.shape}."
            )
    low, high = (groups.per_element(jnp.broadcast_to(end, counts)) for end in (low, high))
    if config.symmetric:
        low = -high
    is_range = (low <= high) & (high < jnp.inf) & (low > -jnp.inf)
    low, high = (jnp.where(is_range, end, jnp.nan) for end in (low, high))
    return jnp.where(low > 0, 0, low), jnp.where(high < 0, 0, high)


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
        config: its format and value range are used; groups are those of scale.

    Returns:
        QTensor with that scale in float32 (float64 for float64), and NaN in the place of a
        scale that is not positive, or whose block or zero point is NaN or Inf.

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
    groups = split_groups(x, blocks_between(x.shape, shape))
    scale = scale.reshape(shape).astype(groups.values.dtype)
    is_valid = groups.per_group(is_finite(groups)) & (scale > 0)
    if zero_point is not None:
        zero_point = zero_point.reshape(shape)
        is_valid &= jnp.isfinite(zero_point)
        zero_point = jnp.clip(jnp.round(jnp.where(is_valid, zero_point, 0)), *config.bounds)
        zero_point = zero_point.astype(config.format.dtype)
    return encode(groups, jnp.where(is_valid, scale, jnp.nan), zero_point, config)


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
