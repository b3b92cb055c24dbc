"""The steps of quantization: group, fit the range, fit the scale and zero point, encode.

    groups     = group(x, config, axis)
    low, high  = fit_range(groups, config)
    scale      = fit_scale(groups, low, high, config, scale_unit(groups, config))
    zero_point = fit_zero_point(groups, low, scale, config)
    q          = encode(groups, scale, zero_point, config)

These five lines are the body of `quantize`; `fit` is the three in the middle. An algorithm that
chooses ranges, scales or codes differently replaces one of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import affine
from .blocks import Axes, Groups, block_shape, join, split_groups, to_blocks
from .config import ArrayConfig
from .formats import FP8_E4M3, bits_of
from .noise import Seed
from .qtensor import QTensor, scale_values
from .ranges import AbsMax, Percentile, largest_magnitude

_E4M3 = ArrayConfig(format=FP8_E4M3)


def group(x: jax.Array, config: ArrayConfig, axis: Axes = 0) -> Groups:
    """Splits an array into the groups that share a scale.

    Raises:
        ValueError: an axis is out of range, or a group size does not divide its axis.
    """
    return split_groups(x, block_shape(x.shape, config, axis))


def fit(
    groups: Groups,
    config: ArrayConfig,
    importance: jax.Array | None = None,
    unit: jax.Array | None = None,
    *,
    covers: bool = False,
) -> tuple[jax.Array | QTensor, jax.Array | None]:
    """The stored scales and the zero points that `config` leads to.

    Args:
        groups: the array, from `group`.
        config: format, range and scale dtype.
        importance: as for `fit_range`.
        unit: from `scale_unit` of an array that the groups are a part of; None if they are all.
        covers: as for `fit_scale`.
    """
    unit = scale_unit(groups, config) if unit is None else unit
    low, high = fit_range(groups, config, importance, unit)
    scale = fit_scale(groups, low, high, config, unit, covers=covers)
    return scale, fit_zero_point(groups, low, scale, config)


def fit_range(
    groups: Groups,
    config: ArrayConfig,
    importance: jax.Array | None = None,
    unit: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The range (low, high) of each group from `config.range`; broadcasts with the values.

    Candidate ranges are scored by their squared error with the scale and zero point as stored,
    weighted with `importance`, which has the shape of the array; None weights all alike. `unit` is
    as for `fit`.

    Raises:
        ValueError: importance is given for a range that does not minimize an error.
    """
    if importance is not None and isinstance(config.range, AbsMax | Percentile):
        raise ValueError(
            "importance weights the errors that a range minimizes; got importance with "
            f"range={config.range!r}, which minimizes none. Use range=MinMSE()."
        )
    values = groups.values
    unit = scale_unit(groups, config) if unit is None else unit
    weights = None if importance is None else relative_importance(groups, importance)
    error_of = squared_error(groups, weights)

    def error(low, high):
        scale = groups.per_group(affine.fit_scale(low, high, config))
        scale = store_scale(scale, config, unit)
        step = groups.per_element(scale_values(scale))
        zero_point = None if config.symmetric else affine.fit_zero_point(low, step, config)
        codes = affine.encode(values, step, zero_point, config)
        return error_of(affine.decode(codes, step, zero_point, config.format))

    return config.range(values, groups.axes, config.symmetric, error)


def relative_importance(groups: Groups, importance: jax.Array) -> jax.Array:
    """The importance of each value of the groups, relative to the largest in its group."""
    weights = split_groups(importance, groups.blocks).values
    top = jnp.max(weights, groups.axes, keepdims=True, initial=0)
    return weights / jnp.where(top > 0, top, 1)


def squared_error(groups: Groups, weights: jax.Array | None) -> Callable[[jax.Array], jax.Array]:
    """A function: decoded values -> the squared error of each group, weighted.

    Errors are in units of the largest magnitude of their group, because squares of 1e-20 or 1e20
    are out of the range of float32.
    """
    peak = jnp.max(jnp.abs(groups.values), groups.axes, keepdims=True, initial=0)
    peak = jnp.where(peak > 0, peak, 1)

    def error(decoded):
        errors = jnp.square((decoded - groups.values) / peak)
        errors = errors if weights is None else errors * weights
        return jnp.sum(errors, groups.axes, keepdims=True)

    return error


def scale_unit(groups: Groups, config: ArrayConfig) -> jax.Array | None:
    """The outer scale of nested scales; None if scales are not nested.

    It is computed from the abs-max ranges, regardless of `config.range`. Otherwise it would depend
    on the ranges of all groups, and the candidate ranges of one group could not be scored with the
    scale as stored.
    """
    if not _is_nested(config.stored_scale_dtype):
        return None

    def no_error(low, high):
        raise AssertionError(f"AbsMax does not score ranges; got {low} to {high}.")

    low, high = AbsMax()(groups.values, groups.axes, config.symmetric, no_error)
    scale = jnp.where(is_finite(groups), affine.fit_scale(low, high, config), 0)
    return _unit_of(groups.per_group(scale))


def fit_scale(
    groups: Groups,
    low: jax.Array,
    high: jax.Array,
    config: ArrayConfig,
    unit: jax.Array | None = None,
    *,
    covers: bool = False,
) -> jax.Array | QTensor:
    """The scales at which the codes span [low, high], as they are stored.

    Args:
        groups: the array, from `group`.
        low, high: from `fit_range`.
        config: format and scale dtype.
        unit: from `scale_unit`; None computes the outer scale from the scales.
        covers: whether scales are rounded up to their dtype, so that the codes span no less than
            the range. Otherwise they are rounded to nearest, which may clip.

    Returns:
        One scale per group; NaN for a group that contains NaN or Inf.
    """
    scale = affine.fit_scale(low, high, config, covers=covers)
    # Tested here and not in the ranges, so that custom ranges cannot hide NaN or Inf.
    scale = jnp.where(is_finite(groups), scale, jnp.nan)
    return store_scale(groups.per_group(scale), config, unit, covers=covers)


def fit_zero_point(
    groups: Groups, low: jax.Array, scale: jax.Array | QTensor, config: ArrayConfig
) -> jax.Array | None:
    """The zero points that go with the stored scales; None for a symmetric config."""
    if config.symmetric:
        return None
    step = groups.per_element(scale_values(scale))
    return groups.per_group(affine.fit_zero_point(low, step, config))


def encode(
    groups: Groups,
    scale: jax.Array | QTensor,
    zero_point: jax.Array | None,
    config: ArrayConfig,
    key: jax.Array | Seed | None = None,
) -> QTensor:
    """The nearest codes for the stored scales; with a key, codes are rounded stochastically."""
    step = groups.per_element(scale_values(scale))
    zero = None if zero_point is None else to_blocks(zero_point, groups.blocks)
    codes = affine.encode(groups.values, step, zero, config, key)
    codes = join(codes, groups.shape, groups.blocks)
    return QTensor(codes, scale, zero_point, format=config.format, dtype=groups.dtype)


def is_finite(groups: Groups) -> jax.Array:
    """Whether all elements of a group are finite. Shares its reduction with AbsMax()."""
    return largest_magnitude(groups.values, groups.axes) < jnp.inf


def _is_nested(dtype: str) -> bool:
    """Whether scales of this dtype are stored as a QTensor, with an outer scale."""
    return bits_of(dtype) == 8 and not affine.has_exponent_only(dtype)


def store_scale(
    scale: jax.Array, config: ArrayConfig, unit: jax.Array | None, *, covers: bool = False
) -> jax.Array | QTensor:
    """Casts scales to their stored dtype, or to a QTensor if the range of the dtype is too small.

    Magnitudes below the smallest positive number of the dtype are raised to it, so that none
    becomes zero. Magnitudes above the largest number become NaN, because their groups would be
    clipped. A scale of 0, from an empty range, becomes 1, or the smallest positive number if the
    format does not represent zero. `covers` is as for `fit_scale`.
    """
    dtype = config.stored_scale_dtype
    if _is_nested(dtype):
        return _store_nested(scale, _unit_of(scale) if unit is None else unit, covers)
    info = jnp.finfo(dtype)
    # Subnormals of float32 and bfloat16 are flushed to zero, but those of float16 are not.
    smallest = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    scale = jnp.where(scale == 0, 1 if config.format.has_zero else smallest, scale)
    if info.bits >= jnp.finfo(scale.dtype).bits or affine.has_exponent_only(dtype):
        return scale.astype(dtype)
    scale = jnp.where(jnp.abs(scale) > float(info.max), jnp.nan, scale)
    raised = jnp.where(scale < 0, jnp.minimum(scale, -smallest), jnp.maximum(scale, smallest))
    return (affine.round_up(raised, dtype) if covers else raised).astype(dtype)


def _unit_of(scale: jax.Array) -> jax.Array:
    """The outer scale of nested scales, one per matrix: maps the largest scale to qmax."""
    # Leading axes keep separate scales, so that stacked layers can be scanned.
    matrix = tuple(range(max(scale.ndim - 2, 0), scale.ndim))
    top = jnp.max(jnp.where(jnp.isnan(scale), 0, scale), matrix, keepdims=True, initial=0)
    unit = affine.fit_scale(-top, top, _E4M3)
    return jnp.where(unit == 0, 1, unit)


def _store_nested(scale: jax.Array, unit: jax.Array, covers: bool) -> QTensor:
    """Quantizes scales to FP8_E4M3 with an outer scale per matrix. NaN scales stay NaN."""
    is_nan = jnp.isnan(scale)
    if covers:
        scale = affine.round_up(scale / unit, FP8_E4M3.dtype) * unit
    codes = affine.encode(jnp.where(is_nan, 0, scale), unit, None, _E4M3).astype(scale.dtype)
    # Groups of zeros or tiny values get the smallest positive code, because a zero scale would
    # divide by zero. A scale of 1 could be far larger than all other scales.
    codes = jnp.where(is_nan, jnp.nan, jnp.maximum(codes, 2.0**-9)).astype(FP8_E4M3.dtype)
    return QTensor(codes, unit.astype(jnp.float32), format=FP8_E4M3, dtype=scale.dtype)
