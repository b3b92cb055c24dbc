"""Rounding to nearest, as a method."""

import dataclasses

import jax

from ..core import ArrayConfig, Axes, QTensor, quantize
from .method import Statistics
from .statistics import Statistic


@dataclasses.dataclass(frozen=True)
class Nearest:
    """Rounds to nearest, with the range of the config: `jaxquant.quantize`.

    It ends chains whose transforms do the work, such as [SINQ(), Nearest()].

    Error: as for `jaxquant.quantize`.

    Example:
        >>> w = jnp.array([[1.0, -2.0], [0.4, 127.0]])
        >>> jq.methods.Nearest()(w, {}, jq.ArrayConfig(), 1).codes.tolist()
        [[64, -127], [0, 127]]
    """

    statistics: tuple[type[Statistic], ...] = dataclasses.field(default=(), init=False)

    def __call__(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> QTensor:
        """Quantizes a matrix (N, K)."""
        return quantize(weight, config, axis)
