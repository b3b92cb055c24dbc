"""Quantizes arrays."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .blocks import Axes, Groups, blocks_between, check_axis, split_groups
from .config import ArrayConfig
from .noise import Seed
from .qtensor import QTensor
from .ranges import AbsMax, Percentile
from .steps import encode, fit, fit_scale, fit_zero_point, group, is_finite


def quantize(
    x: jax.Array | np.ndarray,
    config: ArrayConfig,
    axis: Axes = 0,
    key: jax.Array | Seed | None = None,
    *,
    importance: jax.Array | np.ndarray | None = None,
) -> QTensor:
    """Quantizes an array according to `config`.

        (low, high) = range of each group            from config.range
        scale       = high / min(-qmin, qmax)        (high - low) / (qmax - qmin) if asymmetric
        zero_point  = 0                              round(qmin - low / scale) if asymmetric
        codes       = clip(round(x / scale) + zero_point, qmin, qmax)
        x           ~ (codes - zero_point) * scale

    Scales and codes are computed in float32 (in float64 for float64 arrays). Codes are computed
    with the scale as it is stored. Floating-point formats round by casting, to nearest, ties to
    even. Codebook formats round to the nearest entry.

    Args:
        x: floating-point array of any rank and size.
        config: format, groups, range and dtype of the scales.
        axis: the axis, or a tuple of axes, along which elements share a scale, as in
            `jnp.sum(x, axis)`. For weights, pass the contracted axes. None for all axes. Static.
        key: random key for stochastic rounding to one of the two neighbouring codes, so that
            the expectation equals the value unless it is clipped. Scales are rounded up to their
            dtype, so that `AbsMax()` does not clip symmetric codes; with zero points, which are
            integers, it clips by at most half a step. None rounds to nearest.
        importance: nonnegative weights of the squared errors that `config.range` minimizes, such
            as the mean squares of the activations; with the rank of x, and lengths that are those
            of x or 1. None weights all elements alike.

    Returns:
        QTensor of
            codes: shape of x, dtype of the format;
            scale: one per group, in units of x per code; the rank of x, with length n/g for an
                axis of length n in groups of g; dtype `config.stored_scale_dtype`;
            zero_point: None if symmetric; otherwise in units of codes, with the shape of scale
                and the dtype of codes.
        An all-zero group has scale 1 (the smallest scale if scales are a QTensor) and codes that
        decode to exact zeros. A group that contains NaN or Inf has scale NaN, so that all of its
        elements dequantize to NaN.

    Raises:
        ValueError: x is not a floating-point array, config is not an ArrayConfig, axis is not an
            int, a tuple of ints or None, an axis is out of range, a group size does not divide
            its axis, importance has another shape, or it is given for a range that does not
            minimize an error.

    Error: with integer codes, at most scale/2 per element that is not clipped (at most scale with
        a key), up to float32 rounding. `AbsMax()` with float32 scales clips no element. A scale
        that is rounded down to a narrower dtype may clip the largest elements. Groups whose
        largest magnitude is below 1.2e-38 * qmax do not have a normal float32 scale and become
        zeros. The largest scale is 8.5e37, so formats with qmax = 1 clip larger values.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1; stochastic rounding: Gupta et al.
        2015, arXiv:1502.02551, section 3.1.

    Example:
        >>> q = jq.quantize(jnp.array([-127.0, 3.2, 5.9]), jq.ArrayConfig(format=jq.INT8))
        >>> q.codes.tolist(), q.scale.tolist()
        ([-127, 3, 6], [1.0])
        >>> q.dequantize().tolist()
        [-127.0, 3.0, 6.0]
    """
    check_axis(axis)
    _check(x, config)  # Before `jit`, which takes only pytrees.
    return _quantize(x, config, axis, key, importance)


@partial(jax.jit, static_argnames="axis")
def _quantize(
    x: jax.Array,
    config: ArrayConfig,
    axis: Axes,
    key: jax.Array | Seed | None,
    importance: jax.Array | None,
):
    groups = group(x, config, axis)
    scale, zero_point = fit(groups, config, _spread(importance, x), covers=key is not None)
    return encode(groups, scale, zero_point, config, key)


def _spread(importance: Any, x: jax.Array) -> jax.Array | None:
    """The importance of each element, or None."""
    if importance is None:
        return None
    lengths = zip(np.shape(importance), x.shape, strict=False)
    if np.ndim(importance) != x.ndim or any(n not in (1, length) for n, length in lengths):
        raise ValueError(
            "importance must have the rank of x, and lengths that are those of x or 1; got "
            f"{np.shape(importance)} for x {x.shape}."
        )
    return jnp.broadcast_to(importance, x.shape)


def quantize_with_range(
    x: jax.Array | np.ndarray,
    low: jax.Array | np.ndarray,
    high: jax.Array | np.ndarray,
    config: ArrayConfig,
    axis: Axes = 0,
    key: jax.Array | None = None,
) -> QTensor:
    """Quantizes so that the codes span a given range, such as an observed or learned one.

    Equals `quantize` with (low, high) in place of config.range; see there for details.

    Args:
        x: floating-point array of any rank.
        low, high: ends of the range of each group, in the shape of the scales, or scalars. An
            asymmetric range is widened to contain zero. A symmetric config uses only `high`. An
            empty range gets scale 1.
        config: format, groups and dtype of the scales.
        axis, key: as for `quantize`.

    Returns:
        QTensor. A group has scale NaN if its range is not finite, or if low > high (for a symmetric
        config, if high < 0).

    Raises:
        ValueError: as for `quantize`, or low or high has another shape.

    Error: with integer codes, at most scale/2 per element within the range.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.

    Example:
        >>> x, config = jnp.array([-300.0, 3.2, 127.0]), jq.ArrayConfig(format=jq.INT8)
        >>> jq.quantize_with_range(x, jnp.float32(-127), jnp.float32(127), config).codes.tolist()
        [-127, 3, 127]
    """
    check_axis(axis)
    return _quantize_with_range(x, low, high, config, axis, key)


@partial(jax.jit, static_argnames="axis")
def _quantize_with_range(x, low, high, config, axis, key):
    _check(x, config)
    groups = group(x, config, axis)
    low, high = _given_range(groups, low, high, config)
    scale = fit_scale(groups, low, high, config, covers=key is not None)
    return encode(groups, scale, fit_zero_point(groups, low, scale, config), config, key)


def _given_range(groups: Groups, low: jax.Array, high: jax.Array, config: ArrayConfig):
    """The ends of a given range, widened to contain zero; NaN where the range is not valid."""
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
    """Quantizes with a given scale, such as a calibrated one.

        codes = clip(round(x / scale) + zero_point, qmin, qmax)

    Args:
        x: floating-point array of any rank.
        scale: positive float array with the rank of x, whose axis lengths divide those of x, or
            a scalar.
        zero_point: array with the shape of scale, which is rounded to integers and clipped to
            the range of the codes; None for zero.
        config: only its format, value range and symmetry are used. The shape of scale determines
            the groups.

    Returns:
        QTensor with that scale in float32 (float64 for float64 arrays). The scale is NaN where
        it is not positive, or where its block or zero point contains NaN or Inf.

    Raises:
        ValueError: x is not a floating-point array, the axis lengths of scale do not divide those
            of x, the zero point has another shape, or it is given for a symmetric config.

    Error: with integer codes, at most scale/2 per element that is not clipped.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.

    Example:
        >>> x, config = jnp.array([-1.0, 0.6, 3.0]), jq.ArrayConfig(format=jq.INT8)
        >>> jq.quantize_with_scale(x, jnp.float32(0.5), None, config).codes.tolist()
        [-2, 1, 6]
    """
    _check(x, config)
    if zero_point is not None and (config.symmetric or zero_point.shape != scale.shape):
        raise ValueError(
            "zero_point must be None for a symmetric config, or have the shape of scale, "
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


def abs_max_quantize(x: jax.Array | np.ndarray, config: ArrayConfig, axis: Axes = 0) -> QTensor:
    """Quantizes so that the largest magnitude of each group maps to the outermost code.

        scale = max|x| / min(-qmin, qmax)        codes = round(x / scale)

    Equals `quantize` for configs whose range is `AbsMax()`; see there for details.

    Raises:
        ValueError: config.range is another range, or as for `quantize`.

    Error: with integer codes, at most scale/2 per element, up to float32 rounding.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1.

    Example:
        >>> q = jq.abs_max_quantize(jnp.array([-254.0, 4.0]), jq.ArrayConfig(format=jq.INT8))
        >>> q.codes.tolist(), q.scale.tolist()
        ([-127, 2], [2.0])
    """
    _check_range(config, AbsMax)
    return quantize(x, config, axis)


def percentile_quantize(x: jax.Array | np.ndarray, config: ArrayConfig, axis: Axes = 0) -> QTensor:
    """Quantizes so that the p-th percentile of |x| in each group maps to the outermost code.

        scale = percentile(|x|, p) / min(-qmin, qmax)        codes = clip(round(x / scale))

    Equals `quantize` for configs whose range is `Percentile(p)`; see there for details.

    Raises:
        ValueError: config.range is another range, or as for `quantize`.

    Error: with integer codes, at most scale/2 per element up to the percentile. Larger elements
        are clipped.
    Source: Wu et al. 2020, arXiv:2004.09602, section 5.2.

    Example:
        >>> config = jq.ArrayConfig(format=jq.INT8, range=jq.Percentile(75))
        >>> x = jnp.array([1.0, 2.0, 3.0, 127.0, 1000.0])
        >>> jq.percentile_quantize(x, config).codes.tolist()
        [1, 2, 3, 127, 127]
    """
    _check_range(config, Percentile)
    return quantize(x, config, axis)


def _check_range(config, wanted):
    if isinstance(config, ArrayConfig) and not isinstance(config.range, wanted):
        raise ValueError(
            f"config.range must be {wanted.__name__}(...) here; got {config.range!r}. "
            "quantize(x, config) supports any range."
        )


def _check(x: Any, config: Any) -> None:
    if isinstance(x, QTensor):
        raise ValueError(f"x is already quantized; got {x!r}. Dequantize it first.")
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        got = f"{x.dtype} of shape {x.shape}" if hasattr(x, "dtype") else type(x).__name__
        raise ValueError(f"x must be a floating-point array; got {got}. Use jnp.asarray(x, float).")
    if not isinstance(config, ArrayConfig):
        raise ValueError(
            f"config must be an ArrayConfig; got {config!r}. For a Scheme s, pass s.weights; for "
            "a Format f, pass ArrayConfig(format=f)."
        )
