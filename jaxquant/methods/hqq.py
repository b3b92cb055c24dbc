"""HQQ: offsets of groups that fit all but their outliers, from the weights alone."""

import dataclasses

import jax
import jax.numpy as jnp

from ..core import (
    ArrayConfig,
    Axes,
    Groups,
    QTensor,
    encode,
    fit_range,
    fit_scale,
    group,
    scale_unit,
    scale_values,
)
from .method import Statistics, check_count
from .statistics import Statistic

_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class HQQ:
    """Chooses a floating-point offset for each group, by half-quadratic splitting. Needs no data.

        W ~ codes * scale + offset        minimizes  sum |W - codes * scale - offset|^p

    Scales are those of `config.range`. The zero point z of the paper, a float, is here
    `offset = -z * scale`, in the dtype of the scales; the QTensor has no zero point. With p < 1, a
    few outliers count less than the bulk of a group. Each iteration rounds to codes q with errors
    d = W - q * scale - offset, and moves the offset to the mean of W - e - q * scale, where e are
    the shrunk errors, in units of the scale:

        e = sign(d) * max(0, |d| - |d|^(p - 1) / beta)

    Attributes:
        p: exponent of the errors that count.
        beta: strength of the splitting.
        iterations: how many. Each group keeps the best of all offsets.

    Raises:
        ValueError: p is not in (0, 1], beta is not positive, or iterations is negative; or the
            config is symmetric, which leaves no offset to choose.

    Guarantee: sum |W - decoded|^p of no group is larger than with the offset low - qmin * scale, at
        which the codes span the range.
    Source: Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models,
        mobiusml.github.io/hqq_blog; as in the authors' program, beta is constant.

    Example:
        >>> config = jq.ArrayConfig(format=jq.INT4, symmetric=False)
        >>> weight = jnp.array([[0.0, 0.1, 0.2, 0.3, 1.5]])
        >>> q = jq.methods.HQQ()(weight, {}, config, 1)
        >>> q.zero_point is None, q.offset.shape
        (True, (1, 1))
    """

    p: float = 0.7
    beta: float = 10.0
    iterations: int = 20

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations, 0)
        if not 0 < self.p <= 1 or not self.beta > 0:
            raise ValueError(
                f"p must be in (0, 1] and beta positive; got p={self.p} and beta={self.beta}."
            )

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """None: the weights suffice."""
        return ()

    def __call__(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> QTensor:
        """Quantizes a matrix.

        Args:
            weight: (N, K) floating-point.
            means: not used.
            config, axis: as for `quantize`; config must be asymmetric.

        Returns:
            QTensor like that of `quantize`, with an offset in the shape of the scales instead of
            a zero point.
        """
        if config.symmetric:
            raise ValueError(
                "HQQ chooses an offset, so it needs symmetric=False and a format with integer "
                f"codes; got {config}. For other configs, use SINQ."
            )
        groups = group(weight, config, axis)
        low, high = fit_range(groups, config)
        scale = fit_scale(groups, low, high, config, scale_unit(groups, config))
        step = groups.per_element(scale_values(scale))
        # In units of the scale, where the bulk of a group has errors of at most 1/2.
        values = groups.values / step
        start = self._stored(low / step - config.bounds[0], step, config)

        def iterate(state, _):
            offset, best, least = state
            codes = jnp.clip(jnp.round(values - offset), *config.bounds)
            error = values - codes - offset
            size = jnp.abs(error)
            score = jnp.sum(jnp.power(size, self.p), groups.axes, keepdims=True)
            best = jnp.where(score < least, offset, best)
            shrunk = size - jnp.power(jnp.maximum(size, _TINY), self.p - 1) / self.beta
            outliers = jnp.sign(error) * jnp.maximum(shrunk, 0)
            offset = jnp.mean(values - codes - outliers, groups.axes, keepdims=True)
            return (self._stored(offset, step, config), best, jnp.minimum(score, least)), None

        state = start, start, jnp.full_like(start, jnp.inf)
        (_, offset, _), _ = jax.lax.scan(iterate, state, length=self.iterations + 1)
        return _with_offset(groups, scale, offset * step, config)

    @staticmethod
    def _stored(offset: jax.Array, step: jax.Array, config: ArrayConfig) -> jax.Array:
        """An offset in units of the scale after it was rounded to its dtype."""
        return (offset * step).astype(_offset_dtype(config)).astype(step.dtype) / step


def _offset_dtype(config: ArrayConfig) -> str:
    """That of the scales; float32 for those without sign or precision."""
    bits = jnp.finfo(config.stored_scale_dtype).bits
    return config.stored_scale_dtype if bits >= 16 else "float32"


def _with_offset(
    groups: Groups, scale: jax.Array | QTensor, offset: jax.Array, config: ArrayConfig
) -> QTensor:
    """The nearest codes for an offset."""
    shifted = dataclasses.replace(groups, values=groups.values - offset)
    q = encode(shifted, scale, None, config)
    return dataclasses.replace(q, offset=groups.per_group(offset).astype(_offset_dtype(config)))
