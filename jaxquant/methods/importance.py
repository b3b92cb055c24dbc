"""Scales with the least error, weighted with the importance of each element."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..core import (
    AbsMax,
    ArrayConfig,
    Axes,
    Groups,
    MinMSE,
    QTensor,
    bits_of,
    encode,
    fit,
    group,
    largest_magnitude,
    relative_importance,
    scale_unit,
    scale_values,
    split_groups,
    squared_error,
    store_scale,
)
from .method import Statistics, check_count
from .statistics import MeanSquare, Statistic


def searching(config: ArrayConfig) -> ArrayConfig:
    """The config with a searched range in place of `AbsMax`, which minimizes no error.

    Negative scales are tried if the values of the codes are not symmetric, and scales have a sign.
    """
    if not isinstance(config.range, AbsMax):
        return config
    values = config.format.codebook or config.bounds
    is_lopsided = any(a != -b for a, b in zip(values, values[::-1], strict=True))
    has_sign = bits_of(config.stored_scale_dtype) >= 16
    mirrored = config.symmetric and is_lopsided and has_sign
    return dataclasses.replace(config, range=MinMSE(mirrored=mirrored))


@dataclasses.dataclass(frozen=True)
class Importance:
    """Scales with the least squared error, weighted with the mean squares of the activations.

        minimizes sum over n, k of E[x_k^2] sqrt(s_n^2 + w_nk^2) (w_nk - q_nk)^2 in each group,
        s_n^2 = mean over k of w_nk^2

    First the ranges of the config are searched (in place of `AbsMax`: `MinMSE`, with scales of
    either sign if the format's values are not symmetric), then the scales are refined: scale =
    sum(weight w c) / sum(weight c^2) for the codes c (minus the zero point), and the codes are
    rounded again, while the error falls.

    Attributes:
        steps: the most refinements.

    Raises:
        ValueError: steps is not a nonnegative int; or the range of the config is `Percentile`,
            which minimizes no error.

    Error: at most that of the range of the config, in the weighted sum.
    Source: llama.cpp's quantization with an importance matrix (`make_qx_quants` in ggml-quants.c),
        where the square root is empirical.

    Example:
        >>> w, config = jnp.array([[1.0, 0.53, 0.3]]), jq.ArrayConfig(format=jq.INT2)
        >>> mean_squares = {jq.methods.MeanSquare: jnp.array([0.01, 1.0, 0.01])}
        >>> q = jq.methods.Importance()(w, mean_squares, config, axis=1)
        >>> [round(x, 2) for x in q.dequantize()[0].tolist()]  # The second column counts most.
        [1.05, 0.53, 0.53]
        >>> round(float(q.scale[0, 0]), 2)  # INT2 has codes from -2 to 1.
        -0.53
    """

    steps: int = 4
    statistics: tuple[type[Statistic], ...] = dataclasses.field(default=(MeanSquare,), init=False)

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 0)

    def __call__(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> QTensor:
        """Quantizes a matrix (N, K)."""
        weights = means[MeanSquare][None, :] * _spread(weight)
        groups = group(weight, config, axis)
        unit = scale_unit(groups, config)
        scale, zero_point = fit(groups, searching(config), weights, unit)
        return _refined(groups, scale, zero_point, config, weights, unit, self.steps)


def _spread(weight: jax.Array) -> jax.Array:
    """sqrt(s_n^2 + w_nk^2), with NaN and Inf as zeros: they concern their own group alone."""
    finite = jnp.where(jnp.isfinite(weight), weight, 0)
    # Squares of 1e-20 or 1e20 are out of the range of float32.
    peak = largest_magnitude(finite, (1,))
    relative = finite / jnp.where(peak > 0, peak, 1)
    size = peak * jnp.sqrt(jnp.mean(jnp.square(relative), 1, keepdims=True))
    return jnp.hypot(size, finite)


def _refined(
    groups: Groups,
    scale: jax.Array | QTensor,
    zero_point: jax.Array | None,
    config: ArrayConfig,
    weights: jax.Array,
    unit: jax.Array | None,
    steps: int,
) -> QTensor:
    """Codes after the scales were refined by weighted least squares, as far as errors fall.

    Args:
        groups: the matrix.
        scale, zero_point: to start with.
        config: of the matrix.
        weights: of the squared errors, in the shape of the matrix.
        unit: from `scale_unit`.
        steps: the most refinements.
    """
    parts = relative_importance(groups, weights)
    error_of = squared_error(groups, parts)

    def decoded(scale):
        q = encode(groups, scale, zero_point, config)
        values = split_groups(q.decode().astype(groups.values.dtype), groups.blocks).values
        return values, error_of(values)

    def step(state, _):
        scale, values, error = state
        before = groups.per_element(scale_values(scale))
        codes = values / before
        products = jnp.sum(parts * codes * groups.values, groups.axes, keepdims=True)
        squares = jnp.sum(parts * codes * codes, groups.axes, keepdims=True)
        is_same_sign = jnp.sign(products) == jnp.sign(before)
        wanted = products / jnp.where(squares > 0, squares, 1)
        wanted = groups.per_group(jnp.where(is_same_sign, wanted, 0))
        candidate = store_scale(wanted, config, unit)
        new_values, new_error = decoded(candidate)
        is_better = (new_error < error) & is_same_sign
        by_group = groups.per_group(is_better)
        return (
            _chosen(by_group, candidate, scale),
            jnp.where(is_better, new_values, values),
            jnp.where(is_better, new_error, error),
        ), None

    (scale, _, _), _ = jax.lax.scan(step, (scale, *decoded(scale)), length=steps)
    return encode(groups, scale, zero_point, config)


def _chosen(condition: jax.Array, a: Any, b: Any) -> Any:
    """Scales of a where the condition holds, and of b elsewhere; both have the same outer scale."""
    if isinstance(a, QTensor):
        return dataclasses.replace(a, codes=_chosen(condition, a.codes, b.codes))
    return jnp.where(condition, a, b)
