"""AWQ: scales of input channels that protect the weights of large activations."""

import dataclasses

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, Axes, group, largest_magnitude
from .method import Statistics, Transformed
from .multipliers import best_multiplier, check_search, exponents, log_magnitude
from .statistics import MeanAbs, SecondMoment, Statistic


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Scales input channels by the power of their activations that has the least output error.

        s[k] = x[k]^r    or    x[k]^r / w[k]^(1 - r)        x[k] = E|x_k|
        W s is quantized, and activations are multiplied with 1 / s

    w[k] is the mean over outputs n of |W[n, k]| relative to the largest of its group. The exponents
    are r = 1/grid, 2/grid, ..., 1. Each candidate is scored by trace(dW S dW^T), the mean squared
    error of the outputs, with W s rounded to nearest; no forward pass is needed. W itself is
    a candidate too, and the result if the statistics are NaN.

    Projections with the same input, such as queries, keys and values, need no common s: the
    multiplier belongs to each weight and is not folded into the layer before. The clipping step of
    the paper is left to `config.range`.

    Attributes:
        moment: SecondMoment; or MeanSquare, its diagonal, where K^2 floats are too many. The
            diagonal ignores that the errors of correlated inputs add up.
        grid: number of exponents, for each form of s.

    Raises:
        ValueError: moment is another statistic, or grid is not positive.

    Guarantee: trace(dW S dW^T) after rounding to nearest is not larger than without multiplier.
    Source: Lin et al. 2023, arXiv:2306.00978, section 3.2; w as in the authors' program, llm-awq.

    Example:
        >>> weight, x = jnp.array([[1.0, 0.3], [-0.8, 0.4]]), jnp.array([[0.1, 10.0], [0.1, -8.0]])
        >>> kinds = (jq.methods.MeanAbs, jq.methods.SecondMoment)
        >>> means = {kind: kind.init(2).update(x).finish() for kind in kinds}
        >>> changed = jq.methods.AWQ().transform(weight, means, jq.ArrayConfig(format=jq.INT2), 1)
        >>> changed.multiplier.argmax().item()
        0
    """

    moment: type[Statistic] = SecondMoment
    grid: int = 20

    def __post_init__(self) -> None:
        check_search(self.moment, self.grid)

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """Mean magnitudes of the activations, and their moments."""
        return MeanAbs, self.moment

    def transform(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> Transformed:
        """The matrix with columns divided by the multiplier of their activations.

        Args:
            weight: (N, K) floating-point.
            means: those of `statistics`, by class.
            config, axis: as for `quantize`.
        """
        wide = weight.astype(jnp.float32)
        of_activations = log_magnitude(means[MeanAbs])[None]
        of_weights = log_magnitude(_relative_magnitudes(wide, config, axis))[None]
        r = exponents(self.grid)
        logs = jnp.concatenate([r * of_activations, r * of_activations - (1 - r) * of_weights])
        return best_multiplier(weight, -logs, means[self.moment], config, axis)


def _relative_magnitudes(weight: jax.Array, config: ArrayConfig, axis: Axes) -> jax.Array:
    """The mean over outputs of |W| relative to the largest of its group, (K,)."""
    groups = group(weight, config, axis)
    peak = largest_magnitude(groups.values, groups.axes)
    relative = jnp.abs(groups.values) / jnp.where(peak > 0, peak, 1)
    return jnp.mean(relative.reshape(weight.shape), 0)
