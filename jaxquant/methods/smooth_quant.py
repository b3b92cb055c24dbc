"""SmoothQuant: moves the outliers of activations into the weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ..core import INT8, ArrayConfig, Axes, block_shape
from .method import Statistics, Transformed
from .multipliers import best_multiplier, check_search, exponents, log_magnitude
from .statistics import MaxAbs, SecondMoment, Statistic

_INT8 = ArrayConfig(format=INT8)


@dataclasses.dataclass(frozen=True)
class SmoothQuant:
    """Scales input channels so that activations and weights share what outliers cost.

        s[k] = max|x_k|^a / max_n |W[n, k]|^(1 - a)
        W s is quantized, and activations are multiplied with m = 1 / s

    Instead of a value of a for each family of models, a = 1/grid, ..., 1 are searched for the least
    mean squared error of the outputs: that of the weights, plus that of the activations if these
    are rounded to integers. With step(j) for group j of the activations of a token,

        trace(dW S dW^T)  +  sum over j of E step(j)^2 / 12 * sum(Q(W s)[:, j]^2)
        E step(j)^2 ~ (max over k in j of v[k] + 2 ln(group size) * mean of v[k]) / qmax^2

    where v[k] = E(m[k] x[k])^2 is the diagonal of the moment: the first term is exact where one
    channel dominates, the second where channels are alike and normally distributed. (Largest
    magnitudes of all tokens overestimate the step of a token several times.) Activations in
    floating-point formats have errors that are relative to each element. Multipliers do not
    change them, and they are not counted. W itself is a candidate too, and the result if
    the statistics are NaN.

    Attributes:
        inputs: how the scheme quantizes activations; None where it does not, so that only the
            error of the weights counts.
        moment: SecondMoment; or MeanSquare, its diagonal, where K^2 floats are too many.
        grid: number of values of a.

    Raises:
        ValueError: moment is another statistic, inputs is not an ArrayConfig or None, or grid is
            not positive.

    Guarantee: the score after rounding to nearest is not larger than without multiplier.
    Source: Xiao et al. 2022, arXiv:2211.10438, eq. 4; the score is an addition.

    Example:
        >>> weight, x = jnp.array([[1.0, 0.9], [-0.8, 1.0]]), jnp.array([[0.1, 90.0], [0.2, -80.0]])
        >>> kinds = (jq.methods.MaxAbs, jq.methods.SecondMoment)
        >>> means = {kind: kind.init(2).update(x).finish() for kind in kinds}
        >>> changed = jq.methods.SmoothQuant().transform(weight, means, jq.ArrayConfig(), 1)
        >>> changed.multiplier.argmax().item()
        0
    """

    inputs: ArrayConfig | None = _INT8
    moment: type[Statistic] = SecondMoment
    grid: int = 20

    def __post_init__(self) -> None:
        check_search(self.moment, self.grid)
        if not isinstance(self.inputs, ArrayConfig | None):
            raise ValueError(
                f"inputs must be an ArrayConfig, such as W8A8.inputs, or None; got {self.inputs!r}."
            )

    @property
    def statistics(self) -> tuple[type[Statistic], ...]:
        """Largest magnitudes of the activations, and their moments."""
        return MaxAbs, self.moment

    def transform(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> Transformed:
        """The matrix with columns divided by the multiplier of their activations.

        Args:
            weight: (N, K) floating-point.
            means: those of `statistics`, by class.
            config, axis: as for `quantize`.
        """
        moment, inputs, a = means[self.moment], self.inputs, exponents(self.grid)
        of_activations = log_magnitude(means[MaxAbs])[None]
        of_weights = log_magnitude(jnp.max(jnp.abs(weight.astype(jnp.float32)), 0))[None]
        logs = a * of_activations - (1 - a) * of_weights
        if inputs is None or not inputs.format.rounds:
            return best_multiplier(weight, -logs, moment, config, axis)
        squares = moment if moment.ndim == 1 else jnp.diagonal(moment)

        def of_rounding(decoded, multiplier):
            return _activation_error(decoded, squares * jnp.square(multiplier), inputs)

        return best_multiplier(weight, -logs, moment, config, axis, of_rounding)


def _activation_error(weight: jax.Array, squares: jax.Array, inputs: ArrayConfig) -> jax.Array:
    """The expected squared error of all outputs because activations are rounded to integers."""
    _, length = block_shape((1, weight.shape[1]), inputs, 1)
    squares = squares.reshape(-1, length)
    peak = jnp.max(squares, 1) + 2 * math.log(length) * jnp.mean(squares, 1)
    energy = jnp.sum(jnp.square(weight).reshape(len(weight), -1, length), (0, 2))
    return jnp.sum(peak * energy) / (12 * _code_span(inputs) ** 2)


def _code_span(inputs: ArrayConfig) -> float:
    """The codes that magnitudes span: half of all if asymmetric, as for values around zero."""
    qmin, qmax = inputs.bounds
    return inputs.symmetric_qmax if inputs.symmetric else (qmax - qmin) / 2
