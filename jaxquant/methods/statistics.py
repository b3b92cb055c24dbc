"""Statistics of activations: what methods of quantization need to know of the rows x of a batch.

    statistic = MeanSquare.init(channels)
    statistic = statistic.update(x)            # under jit, in scan, ...
    both = statistic.merge(of_other_batches)
    mean = both.finish()

A statistic holds sums and a count of rows, never averages, so batches of different sizes and the
parts of several devices merge by addition. All are float32 pytrees; leading axes are those of
stacked layers or experts. To add one, add a class with these methods to `STATISTICS`.
"""

import abc
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..core import BlockRotation

# Of JAX, or of NumPy: the sums of many batches are kept on the host.
Array = Any
# Sums of squares in bfloat16, the default on TPU, are not positive semidefinite.
_PRECISION = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True, eq=False)
class Statistic(abc.ABC):
    """Base class of the statistics of activations.

    Attributes:
        total: sums over rows.
        count: the number of rows, float32.
    """

    total: Array
    count: Array

    @classmethod
    def init(cls, channels: int) -> Self:
        """The statistic of no rows, for rows of this length."""
        return cls(jnp.zeros(cls.shape(channels), jnp.float32), jnp.float32(0))

    @staticmethod
    def shape(channels: int) -> tuple[int, ...]:
        """The shape of the sums."""
        return (channels,)

    def update(self, x: jax.Array, weights: jax.Array | None = None) -> Self:
        """The statistic after it has also seen the rows of x.

        Args:
            x: (rows, channels) of any floating-point dtype.
            weights: (rows,), 1 for rows that count and 0 for padding; None for all 1.
        """
        x = x.astype(jnp.float32)
        if weights is None:
            weights = jnp.ones(x.shape[-2], jnp.float32)
        # Padding may hold NaN.
        counted = jnp.expand_dims(weights > 0, (*range(x.ndim - 2), x.ndim - 1))
        x = jnp.where(counted, x, 0)
        return self.merge(type(self)(self._sum(x, weights), jnp.sum(weights)))

    def merge(self, other: Self) -> Self:
        """The statistic of the rows of both."""
        return type(self)(self.total + other.total, self.count + other.count)

    def finish(self) -> Array:
        """The mean over rows; NaN where no row was seen."""
        count = self.count.reshape(self.count.shape + (1,) * (self.total.ndim - self.count.ndim))
        return self.total / jnp.where(count > 0, count, jnp.nan)

    def parts(self) -> "tuple[Statistic, ...]":
        """Smaller statistics of the same rows that this one determines."""
        return ()

    @staticmethod
    def scaled(mean: jax.Array, factor: jax.Array) -> jax.Array:
        """The mean of activations that are multiplied with factors (K,)."""
        raise NotImplementedError

    @staticmethod
    @abc.abstractmethod
    def _sum(x: jax.Array, weights: jax.Array) -> jax.Array:
        """Hook: the sum over rows, each times its weight."""


class OfPairs(Statistic):
    """Base class of statistics of pairs of channels, (..., K, K), which rotations keep."""

    @staticmethod
    def scaled(mean: jax.Array, factor: jax.Array) -> jax.Array:
        """The mean of activations that are multiplied with factors (K,)."""
        return mean * factor[:, None] * factor[None, :]

    @staticmethod
    def rotated(mean: jax.Array, rotation: BlockRotation) -> jax.Array:
        """The mean of activations that are rotated, R^T S R, for a rotation with signs (K,)."""
        for axis in (mean.ndim - 2, mean.ndim - 1):
            mean = rotation.apply(mean, (axis,))
        return mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MeanSquare(Statistic):
    """E[x_k^2] of each channel, (K,): the importance of columns of a weight.

    Source: llama.cpp's importance matrix; Lin et al. 2023 (AWQ), arXiv:2306.00978.

    Example:
        >>> statistic = jq.methods.MeanSquare.init(2).update(jnp.array([[1.0, 3.0], [3.0, 3.0]]))
        >>> statistic.finish().tolist()
        [5.0, 9.0]
    """

    @staticmethod
    def _sum(x, weights):
        return jnp.sum(x * x * weights[:, None], 0)

    @staticmethod
    def scaled(mean: jax.Array, factor: jax.Array) -> jax.Array:
        """The mean of activations that are multiplied with factors (K,)."""
        return mean * jnp.square(factor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MeanAbs(Statistic):
    """E|x_k| of each channel, (K,), from which AWQ computes its scales.

    Source: Lin et al. 2023 (AWQ), arXiv:2306.00978, eq. 4.

    Example:
        >>> statistic = jq.methods.MeanAbs.init(2).update(jnp.array([[1.0, -3.0], [3.0, 3.0]]))
        >>> statistic.finish().tolist()
        [2.0, 3.0]
    """

    @staticmethod
    def _sum(x, weights):
        return jnp.sum(jnp.abs(x) * weights[:, None], 0)

    @staticmethod
    def scaled(mean: jax.Array, factor: jax.Array) -> jax.Array:
        """The mean of activations that are multiplied with factors (K,)."""
        return mean * jnp.abs(factor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MaxAbs(Statistic):
    """max|x_k| of each channel, (K,), from which SmoothQuant computes its scales.

    `total` is the maximum, and merging keeps the larger one.

    Source: Xiao et al. 2022 (SmoothQuant), arXiv:2211.10438, eq. 4.

    Example:
        >>> statistic = jq.methods.MaxAbs.init(2).update(jnp.array([[1.0, -3.0], [3.0, 2.0]]))
        >>> statistic.finish().tolist()
        [3.0, 3.0]
    """

    def merge(self, other: Self) -> Self:
        """The statistic of the rows of both."""
        larger = np.maximum if isinstance(self.total, np.ndarray) else jnp.maximum
        return type(self)(larger(self.total, other.total), self.count + other.count)

    def finish(self) -> Array:
        """The maximum over rows; NaN where no row was seen."""
        return jnp.where(self.count[..., None] > 0, self.total, jnp.nan)

    @staticmethod
    def _sum(x, weights):
        # XLA's CPU backend drops NaN in a maximum.
        magnitude = jnp.abs(x)
        magnitude = jnp.where(magnitude < jnp.inf, magnitude, jnp.inf)
        return jnp.max(magnitude, 0, initial=0)

    @staticmethod
    def scaled(mean: jax.Array, factor: jax.Array) -> jax.Array:
        """The maximum of activations that are multiplied with factors (K,)."""
        return mean * jnp.abs(factor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SecondMoment(OfPairs):
    """S = E[x x^T], (K, K): by how much an error of the weights changes the results.

        E|dW x|^2 = trace(dW S dW^T)

    Source: Frantar et al. 2022 (GPTQ), arXiv:2210.17323, eq. 1 (the Hessian, up to a factor 2).

    Example:
        >>> statistic = jq.methods.SecondMoment.init(2).update(jnp.array([[1.0, 0.0], [1.0, 2.0]]))
        >>> statistic.finish().tolist()
        [[1.0, 1.0], [1.0, 2.0]]
    """

    @staticmethod
    def shape(channels: int) -> tuple[int, ...]:
        """The shape of the sums."""
        return (channels, channels)

    def parts(self) -> tuple[Statistic, ...]:
        """Its diagonal."""
        return (MeanSquare(np.diagonal(self.total, axis1=-2, axis2=-1), self.count),)

    @staticmethod
    def _sum(x, weights):
        return _outer(x, x, weights)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CrossMoment(OfPairs):
    """C = E[x q^T] and S = E[q q^T] of activations x of a float model and q of a quantized one.

    `total` and the mean are (2, K, K): first C, then S.

    Source: Arai and Ichikawa 2025 (QEP), arXiv:2504.09629; Zhang et al. 2025 (Qronos),
        arXiv:2505.11695.

    Example:
        >>> both = jnp.array([[[1.0, 0.0]], [[1.0, 2.0]]])  # One row x, then the same row q.
        >>> jq.methods.CrossMoment.init(2).update(both).finish().tolist()
        [[[1.0, 2.0], [0.0, 0.0]], [[1.0, 2.0], [2.0, 4.0]]]
    """

    @staticmethod
    def shape(channels: int) -> tuple[int, ...]:
        """The shape of the sums."""
        return (2, channels, channels)

    def parts(self) -> tuple[Statistic, ...]:
        """S, of the quantized model."""
        return (SecondMoment(self.total[..., 1, :, :], self.count),)

    @staticmethod
    def _sum(x, weights):
        return jnp.stack([_outer(rows, x[1], weights) for rows in x])


def _outer(a: jax.Array, b: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum of outer products of rows."""
    return jnp.matmul((a * weights[:, None]).T, b, precision=_PRECISION)


STATISTICS = (MeanSquare, MeanAbs, MaxAbs, SecondMoment, CrossMoment)
