"""Observers that count elements in bins, so that outliers can be clipped."""

import abc
import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from ..core import ArrayConfig, MinMSE, Percentile, quantize_with_range
from .observers import Ends, batch_range, checked_range


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram(abc.ABC):
    """Counts of elements in bins of equal width over [-limit, limit].

    The limit is a power of two. It doubles when an element lies beyond it: each pair of bins is
    then merged into one, so no count is misplaced. (Counts above 2^24 are rounded, as float32 sums
    are. Elements beyond 2^126 are counted as 2^126.)

    Attributes:
        counts: float32, (bins,), a power of two.
        low, high: as in `RunningAbsMax`.
    """

    counts: jax.Array
    low: jax.Array
    high: jax.Array

    @jax.jit
    def update(self, x: jax.Array) -> Self:
        """Returns the observer after it has also seen a float array of any shape."""
        low, high = batch_range(x)
        seen = dataclasses.replace(
            self, low=jnp.minimum(self.low, low), high=jnp.maximum(self.high, high)
        )
        moved = _bins(_centers(self.counts) * self.limit, seen.limit, self.counts)
        # NaN and Inf land in an arbitrary bin: `finish` raises for them.
        added = _bins(x.astype(jnp.float32).ravel(), seen.limit, self.counts)
        counts = jnp.zeros_like(self.counts).at[moved].add(self.counts).at[added].add(1)
        return dataclasses.replace(seen, counts=counts)

    @property
    def limit(self) -> jax.Array:
        """The power of two above all elements so far, float32; 0 if all were zero."""
        largest = jnp.maximum(-self.low, self.high)
        # XLA divides by multiplying with the reciprocal, which must not be subnormal.
        above = jnp.ldexp(jnp.float32(1), jnp.clip(jnp.frexp(largest)[1], -100, 126))
        return jnp.where(largest > 0, above, 0)

    def finish(self, config: ArrayConfig) -> Ends:
        """Returns (low, high), with low = -high for a symmetric config; within the observed range.

        Raises:
            ValueError: no data was observed, only zeros, or a non-finite element.
        """
        checked_range(self.low, self.high, config)
        low, high = (end * self.limit for end in self.read(config))
        return checked_range(jnp.maximum(low, self.low), jnp.minimum(high, self.high), config)

    @abc.abstractmethod
    def read(self, config: ArrayConfig) -> Ends:
        """Returns (low, high) in units of the limit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PercentileHistogram(Histogram):
    """The p-th percentile of |x|; for an asymmetric config the (100 - p)-th to the p-th of x.

    Attributes:
        p: percentile, static.
        Others: as for `Histogram`.

    Error: at most the width of a bin, 4 max|x| / bins.
    Source: Wu et al. 2020, arXiv:2004.09602, section 5.2.

    Example:
        >>> observer = jq.training.PercentileHistogram.init(p=99.0)
        >>> low, high = observer.update(jnp.arange(1000.0)).finish(jq.ArrayConfig())
        >>> round(float(high))
        990
    """

    p: float = dataclasses.field(default=99.99, metadata={"static": True})

    @classmethod
    def init(cls, p: float = 99.99, bins: int = 4096) -> Self:
        """Returns an observer that has not seen any data.

        Raises:
            ValueError: p is not above 50 and at most 100, or bins is not a power of two >= 2.
        """
        Percentile(p)
        return cls(*_empty(bins), p=p)

    def read(self, config: ArrayConfig) -> Ends:
        """Returns (low, high) in units of the limit."""
        counts = np.asarray(self.counts, np.float64)
        half = len(counts) // 2
        if config.symmetric:
            high = _percentile(counts[half:] + counts[:half][::-1], self.p, 0.0)
            return jnp.float32(-high), jnp.float32(high)
        ends = (_percentile(counts, p, -1.0) for p in (100 - self.p, self.p))
        low, high = (jnp.float32(end) for end in ends)
        return low, high


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MSEHistogram(Histogram):
    """The range with the least squared quantization error, by the search of `MinMSE`.

    Attributes: as for `Histogram`.

    Error: every element is treated as the center of its bin, at most 4 max|x| / bins wide.
    Source: Banner et al. 2019, arXiv:1810.05723, section 3, solved by search.

    Example:
        >>> x = jnp.append(jnp.linspace(-1, 1, 1000), 10.0)  # One outlier.
        >>> low, high = jq.training.MSEHistogram.init().update(x).finish(jq.ArrayConfig())
        >>> float(high) <= 10
        True
    """

    @classmethod
    def init(cls, bins: int = 4096) -> Self:
        """Returns an observer that has not seen any data.

        Raises:
            ValueError: bins is not a power of two >= 2.
        """
        return cls(*_empty(bins))

    def read(self, config: ArrayConfig) -> Ends:
        """Returns (low, high) in units of the limit."""
        per_tensor = dataclasses.replace(config, per_tensor=True, group_size=None)
        return _least_error(self.counts, per_tensor)


@jax.jit
def _least_error(counts, config):
    """(low, high) with the least squared error of elements at the centers of bins."""
    centers = jnp.where(counts > 0, _centers(counts), 0)

    def error(low, high):
        values = quantize_with_range(centers, low[0], high[0], config).dequantize()
        return jnp.sum(counts * jnp.square(values - centers), keepdims=True)

    low, high = MinMSE()(centers, (0,), config.symmetric, error)
    return low[0], high[0]


def _empty(bins):
    """Counts, low and high before any data was observed."""
    if not isinstance(bins, int) or bins < 2 or bins & (bins - 1):
        raise ValueError(f"bins must be a power of two >= 2, such as 4096; got {bins!r}.")
    return jnp.zeros(bins, jnp.float32), jnp.float32(0), jnp.float32(0)


def _centers(counts):
    """The centers of the bins, in units of the limit."""
    return (jnp.arange(counts.size, dtype=jnp.float32) * 2 + 1) / counts.size - 1


def _bins(values, limit, counts):
    """The index of the bin of each value."""
    part = values / jnp.where(limit > 0, limit, 1)
    index = jnp.floor((part + 1) * (counts.size // 2)).astype(jnp.int32)
    return jnp.clip(index, 0, counts.size - 1)


def _percentile(counts, p, start):
    """The value below which p percent of the counts lie; bins divide [start, 1] evenly."""
    total = np.cumsum(counts)
    wanted = p / 100 * total[-1]
    bin_ = min(int(np.searchsorted(total, wanted)), len(total) - 1)
    before = total[bin_] - counts[bin_]
    part = (wanted - before) / max(counts[bin_], 1)
    return start + (bin_ + part) * (1 - start) / len(counts)
