"""The steps of quantization, one by one: group, fit the range, fit the scale, encode.

    groups     = group(x, config, axis)
    low, high  = fit_range(groups, config)
    scale      = fit_scale(groups, low, high, config, scale_unit(groups, config))
    zero_point = fit_zero_point(groups, low, scale, config)
    q          = encode(groups, scale, zero_point, config)

`quantize` is these five lines. An algorithm that chooses ranges, scales or codes in another way
replaces one of them.
"""

import jax
import jax.numpy as jnp

from . import affine
from .blocks import Axes, Groups, block_shape, split_groups, to_blocks
from .config import ArrayConfig
from .formats import FP8_E4M3, bits_of
from .qtensor import QTensor, scale_values
from .ranges import AbsMax, largest_magnitude

_E4M3 = ArrayConfig(format=FP8_E4M3)


def group(x: jax.Array, config: ArrayConfig, axis: Axes = 0) -> Groups:
    """Splits an array into the groups that share a scale.

    Raises:
        ValueError: an axis is out of range, or a group size does not divide its axis.
    """
    return split_groups(x, block_shape(x.shape, config, axis))


def fit_range(groups: Groups, config: ArrayConfig) -> tuple[jax.Array, jax.Array]:
    """The range (low, high) of each group by `config.range`, shaped to broadcast with the values.

    Candidates are scored by the squared error with the scale and zero point that would be stored.
    """
    values, unit = groups.values, scale_unit(groups, config)
    peak = jnp.max(jnp.abs(values), groups.axes, keepdims=True, initial=0)
    peak = jnp.where(peak > 0, peak, 1)

    def error(low, high):
        scale = groups.per_group(affine.fit_scale(low, high, config))
        scale = _store_scale(scale, config.stored_scale_dtype, unit)
        step = groups.per_element(scale_values(scale))
        zero_point = None if config.symmetric else affine.fit_zero_point(low, step, config)
        codes = affine.encode(values, step, zero_point, config)
        decoded = affine.decode(codes, step, zero_point, config.format)
        # In units of the peak, because squares of 1e-20 or 1e20 are not float32 numbers.
        return jnp.sum(jnp.square((decoded - values) / peak), groups.axes, keepdims=True)

    return config.range(values, groups.axes, config.symmetric, error)


def scale_unit(groups: Groups, config: ArrayConfig) -> jax.Array | None:
    """The outer scale under which nested scales are stored; None if they are not nested.

    It is that of the abs-max ranges, whatever `config.range`, so that a candidate range of one
    group is scored with the scale that is stored, which would otherwise depend on all groups.
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
) -> jax.Array | QTensor:
    """The scales with which the codes span [low, high], as they are stored.

    Args:
        groups: the array.
        low, high: from `fit_range`.
        config: its format and scale dtype are used.
        unit: from `scale_unit`; None takes the outer scale from the scales themselves.

    Returns:
        One scale per group; NaN for a group that holds NaN or Inf.
    """
    scale = affine.fit_scale(low, high, config)
    # Here, not in the ranges: no range may hide NaN or Inf, whoever wrote it.
    scale = jnp.where(is_finite(groups), scale, jnp.nan)
    return _store_scale(groups.per_group(scale), config.stored_scale_dtype, unit)


def fit_zero_point(
    groups: Groups, low: jax.Array, scale: jax.Array | QTensor, config: ArrayConfig
) -> jax.Array | None:
    """The zero points for the stored scales; None for a symmetric config."""
    if config.symmetric:
        return None
    step = groups.per_element(scale_values(scale))
    return groups.per_group(affine.fit_zero_point(low, step, config))


def encode(
    groups: Groups,
    scale: jax.Array | QTensor,
    zero_point: jax.Array | None,
    config: ArrayConfig,
    key: jax.Array | None = None,
) -> QTensor:
    """The nearest codes for the stored scales and zero points, and with a key random ones."""
    step = groups.per_element(scale_values(scale))
    zero = None if zero_point is None else to_blocks(zero_point, groups.blocks)
    codes = affine.encode(groups.values, step, zero, config, key).reshape(groups.shape)
    return QTensor(codes, scale, zero_point, format=config.format, dtype=groups.dtype)


def is_finite(groups: Groups) -> jax.Array:
    """Whether all of each group is. By what AbsMax() computes too, so that XLA does it once."""
    return largest_magnitude(groups.values, groups.axes) < jnp.inf


def _is_nested(dtype: str) -> bool:
    """Whether scales of this dtype are stored as a QTensor under one float scale."""
    return bits_of(dtype) == 8 and not affine.has_exponent_only(dtype)


def _store_scale(scale: jax.Array, dtype: str, unit: jax.Array | None) -> jax.Array | QTensor:
    """Scales in their dtype, or as a QTensor if that has too small a range.

    A scale is at least the smallest number of the dtype, so that none vanishes. One that is too
    large is NaN, since its group would be clipped. That of an empty range, 0, becomes 1.
    """
    if _is_nested(dtype):
        return _store_nested(scale, _unit_of(scale) if unit is None else unit)
    info = jnp.finfo(dtype)
    scale = jnp.where(scale == 0, 1, scale)
    if info.bits >= jnp.finfo(scale.dtype).bits or affine.has_exponent_only(dtype):
        return scale.astype(dtype)
    # Subnormals of float32, and so of bfloat16, are flushed to zero; those of float16 are not.
    smallest = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    scale = jnp.where(scale > float(info.max), jnp.nan, scale)
    return jnp.maximum(scale, smallest).astype(dtype)


def _unit_of(scale: jax.Array) -> jax.Array:
    """The outer scale of nested scales, one per matrix: the largest becomes the largest code."""
    # Leading axes keep scales of their own, so that stacked layers can be scanned.
    matrix = tuple(range(max(scale.ndim - 2, 0), scale.ndim))
    top = jnp.max(jnp.where(jnp.isnan(scale), 0, scale), matrix, keepdims=True, initial=0)
    unit = affine.fit_scale(-top, top, _E4M3)
    return jnp.where(unit == 0, 1, unit)


def _store_nested(scale: jax.Array, unit: jax.Array) -> QTensor:
    """Scales as FP8_E4M3 codes under an outer scale per matrix. NaN stays with its group."""
    is_nan = jnp.isnan(scale)
    codes = affine.encode(jnp.where(is_nan, 0, scale), unit, None, _E4M3).astype(scale.dtype)
    # A group of tiny values or of zeros gets the smallest positive code: 0 would divide by zero.
    # Not 1, which would be the largest of all where the other scales are small.
    codes = jnp.where(is_nan, jnp.nan, jnp.maximum(codes, 2.0**-9)).astype(FP8_E4M3.dtype)
    return QTensor(codes, unit.astype(jnp.float32), format=FP8_E4M3, dtype=scale.dtype)
