"""GPTQ, QEP and Qronos: error feedback, with or without a correction of the input error."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..core import (
    ArrayConfig,
    Axes,
    Groups,
    QTensor,
    encode,
    fit,
    group,
    scale_unit,
    scale_values,
    split_groups,
)
from .error_feedback import Factor, factorize, feed_back
from .importance import searching
from .method import Notes, Statistics
from .statistics import CrossMoment, SecondMoment, Statistic

_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Error feedback: rounds channel by channel and corrects later channels for the errors so far.

        minimizes E|W x - Q x|^2 = trace((W - Q) S (W - Q)^T), S = E[x x^T], greedily:
        z_k = w_k + sum over j < k of (w_j - q_j) U_jk,    q_k = round(z_k),    S + d I = U D U^T

    Scales of groups are fitted on the corrected weights, when their group is reached. Channels that
    were always zero are rounded to nearest.

    Attributes:
        damping: d, in units of the mean of diag(S); ten times as much until S + d I has a Cholesky
            factor. With `repair` and few rows, 0.1 is better: W* fits their noise with less.
        repair: how much of the error that quantized layers before this one cause is corrected,
            from 0 to 1: 0 is GPTQ, 0.5 is QEP, 1 is Qronos. W is replaced by W + repair (W* - W),
            W* = W (C + d I) (S + d I)^-1, C = E[x q^T], S = E[q q^T]. More than 0 is for
            `tuning.sequential`, where the layers before are final. With `collect(quantized=)` of a
            whole model every layer repairs what the repaired layers before it no longer cause:
            SmolLM2 got worse than by rounding to nearest.
        importance: whether scales, of either sign, are chosen by the least error weighted with D
            instead of the range of the config alone.
        act_order: whether channels with large mean squares are rounded first; then all scales are
            fitted before, on the original weights.

    Raises:
        ValueError: a field is not as above; or the range of the config is `Percentile`, which
            minimizes no error, and `importance` is True.

    Error: with white activations, S = c I, the result is that of `jaxquant.quantize`. With S of
        correlated activations the expected error falls by tr(D) / tr(S) (see `predicted_gain`).
    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; Arai and Ichikawa 2025 (QEP),
        arXiv:2504.09629, eq. 7; Zhang et al. 2025 (Qronos), arXiv:2505.11695.

    Example:
        >>> w, config = jnp.array([[50.4, 127.0, 3.4, 0.4]]), jq.ArrayConfig()
        >>> alike = {jq.methods.SecondMoment: jnp.ones((4, 4))}  # All channels are equal.
        >>> q, notes = jq.methods.GPTQ()(w, alike, config, axis=1)
        >>> q.codes.tolist(), jq.quantize(w, config, axis=1).codes.tolist()
        ([[50, 127, 4, 0]], [[50, 127, 3, 0]])
    """

    damping: float = 0.01
    repair: float = 0.0
    importance: bool = False
    act_order: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise ValueError(f"damping must be above 0 and below 1; got {self.damping!r}.")
        if not 0 <= self.repair <= 1:
            raise ValueError(f"repair must be from 0 to 1; got {self.repair!r}.")

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """`CrossMoment` to repair errors of the input, else `SecondMoment`."""
        return (CrossMoment,) if self.repair else (SecondMoment,)

    def __call__(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> tuple[QTensor, Notes]:
        """Quantizes a matrix (N, K). Also returns the damping that was used.

        A row with NaN or Inf becomes NaN, and all rows do if the moment has any.
        """
        second = means[CrossMoment][1] if self.repair else means[SecondMoment]
        factor = factorize(second, self.damping)
        target = self._target(weight, factor, means).T
        order = None
        if self.act_order:
            order = jnp.argsort(-jnp.diagonal(second))
            factor = factorize(second[order][:, order], self.damping)
        # NaN spreads to later channels, whose integer codes could not say so.
        is_finite = jnp.all(jnp.isfinite(target), 0) & jnp.all(jnp.isfinite(factor.root))
        target = jnp.where(is_finite[None], target, jnp.nan)
        if axis == 1 and order is None and group(target, config, 0).scale_shape[0] > 1:
            q = self._in_groups(target, factor, config)
        else:
            q = self._at_once(target, factor, config, 0 if axis == 1 else axis, order)
        return jax.tree.map(jnp.transpose, q), {"damping": factor.damping}

    def _target(self, weight: jax.Array, factor: Factor, means: Statistics) -> jax.Array:
        """W, or W* as far as the input error is to be repaired."""
        if not self.repair:
            return weight
        cross, second = means[CrossMoment]
        change = jnp.matmul(weight, cross - second, precision=jax.lax.Precision.HIGHEST)
        return weight + self.repair * factor.solve(change.T).T

    def _in_groups(self, target: jax.Array, factor: Factor, config: ArrayConfig) -> QTensor:
        """Scales are fitted group by group, on the corrected weights."""
        groups = group(target, config, 0)
        size, unit = groups.blocks[0], scale_unit(groups, config)

        def fit_block(start, best):
            weights = jax.lax.dynamic_slice(factor.conditional, (start,), (size,))
            return self._fitted(split_groups(best, (size, 1)), config, weights, unit)

        def round_row(fitted, j, z):
            del j  # All rows of a block share their scales.
            scale, zero_point = fitted
            return _rounded(z[None], scale, zero_point, config)[0]

        values, (scale, zero_point) = feed_back(target, factor.unit, size, fit_block, round_row)
        zero_point = None if zero_point is None else _joined(zero_point)
        return encode(split_groups(values, groups.blocks), _joined(scale), zero_point, config)

    def _at_once(
        self,
        target: jax.Array,
        factor: Factor,
        config: ArrayConfig,
        axis: Axes,
        order: jax.Array | None,
    ) -> QTensor:
        """All scales are fitted first, on the target itself."""
        groups = group(target, config, axis)
        weights = factor.conditional if order is None else factor.conditional[jnp.argsort(order)]
        scale, zero_point = self._fitted(groups, config, weights, None)
        # One row of scales and zero points per channel, in the order of rounding.
        fitted = [scale] if zero_point is None else [scale, zero_point]
        columns = [target, *(_of_elements(groups, x) for x in fitted)]
        if order is not None:
            columns = [x[order] for x in columns]
        block = min(_BLOCK, max(len(target), 1))
        added = -len(target) % block
        columns = [jnp.pad(x, ((0, added), (0, 0)), constant_values=1) for x in columns]
        unit = jnp.pad(factor.unit, (0, added))

        def fitted_of(start, best):
            return [jax.lax.dynamic_slice(x, (start, 0), best.shape) for x in columns[1:]]

        def round_row(fitted, j, z):
            step, *zero = (x[j][None] for x in fitted)
            return _rounded(z[None], step, zero[0] if zero else None, config)[0]

        values, _ = feed_back(columns[0], unit, block, fitted_of, round_row)
        values = values[: len(target)]
        if order is not None:
            values = values[jnp.argsort(order)]
        return encode(split_groups(values, groups.blocks), scale, zero_point, config)

    def _fitted(
        self, groups: Groups, config: ArrayConfig, weights: jax.Array, unit: jax.Array | None
    ) -> tuple[jax.Array | QTensor, jax.Array | None]:
        """Scales and zero points of groups of rows (K, N), which count by their weights (K,)."""
        importance = None
        if self.importance:
            config = searching(config)
            importance = jnp.broadcast_to(weights[:, None], groups.shape)
        return fit(groups, config, importance, unit)


def _rounded(
    z: jax.Array, scale: jax.Array | QTensor, zero_point: jax.Array | None, config: ArrayConfig
) -> jax.Array:
    """The nearest values to a row (1, N) with one scale per element."""
    return encode(split_groups(z, (1, 1)), scale, zero_point, config).decode()


def _of_elements(groups: Groups, x: jax.Array | QTensor) -> jax.Array:
    """One element per group as one per element of the array."""
    values = groups.per_element(scale_values(x))
    return jnp.broadcast_to(values, groups.values.shape).reshape(groups.shape)


def _joined(x: Any) -> Any:
    """One row (1, N) per block, stacked by scan, as (K/g, N)."""
    if isinstance(x, QTensor):
        outer: Any = x.scale
        return dataclasses.replace(x, codes=_joined(x.codes), scale=outer[0])
    return x.reshape(-1, x.shape[-1])
