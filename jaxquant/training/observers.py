"""Observers: what range activations take, from one batch to the next. Each is a pytree.

    observer = RunningAbsMax.init()
    observer = observer.update(x)                  # under jit, in scan, ...
    low, high = observer.finish(config)

To add one, add a class with these three methods. They are of whole tensors: an operand has one
static scale.
"""

import abc
import dataclasses
from typing import Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np

from ..core import ArrayConfig, MinMSE, Percentile, quantize_with_range

Ends = tuple[jax.Array, jax.Array]


class Observer(Protocol):
    """What `calibrate` takes: an observer that has seen nothing yet."""

    def update(self, x: jax.Array) -> Self:
        """The observer after it has seen x too."""
        ...

    def finish(self, config: ArrayConfig) -> Ends:
        """(low, high): the range that codes of this config should span."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RunningAbsMax:
    """The smallest and the largest element so far.

        low = min over batches of min(x, 0)        high = max over batches of max(x, 0)

    Attributes:
        low, high: float32 scalars, low <= 0 <= high; infinite once something was not finite.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.
    """

    low: jax.Array
    high: jax.Array

    @classmethod
    def init(cls) -> Self:
        """An observer that has seen nothing."""
        return cls(jnp.float32(0), jnp.float32(0))

    @jax.jit
    def update(self, x: jax.Array) -> Self:
        """The observer after it has seen a float array of any shape."""
        low, high = _ends(x)
        return dataclasses.replace(
            self, low=jnp.minimum(self.low, low), high=jnp.maximum(self.high, high)
        )

    def finish(self, config: ArrayConfig) -> Ends:
        """(low, high), with low = -high for a symmetric config.

        Raises:
            ValueError: nothing was observed, or something that is not finite.
        """
        return _finished(self.low, self.high, config)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MovingAverage:
    """Exponential moving averages of the ends of each batch, without bias towards the first.

        low  = sum_i d^(n-i) min(x_i, 0) / sum_i d^(n-i)        high likewise, of max(x_i, 0)

    Attributes:
        low, high, weight: the sums above, without the division, and their weight, times 1 - d.
        decay: d, static.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1; the bias: Kingma and Ba 2015,
        arXiv:1412.6980, section 3.
    """

    low: jax.Array
    high: jax.Array
    weight: jax.Array
    decay: float = dataclasses.field(default=0.9, metadata={"static": True})

    @classmethod
    def init(cls, decay: float = 0.9) -> Self:
        """An observer that has seen nothing.

        Raises:
            ValueError: decay is not in [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1; got {decay!r}.")
        return cls(jnp.float32(0), jnp.float32(0), jnp.float32(0), decay)

    @jax.jit
    def update(self, x: jax.Array) -> Self:
        """The observer after it has seen a float array of any shape; without elements, the same."""
        if not x.size:
            return self
        low, high = _ends(x)
        new = {"low": low, "high": high, "weight": jnp.float32(1)}
        averages = {
            name: self.decay * getattr(self, name) + (1 - self.decay) * value
            for name, value in new.items()
        }
        return dataclasses.replace(self, **averages)

    def finish(self, config: ArrayConfig) -> Ends:
        """(low, high), with low = -high for a symmetric config.

        Raises:
            ValueError: nothing was observed, or something that is not finite.
        """
        weight = jnp.where(self.weight > 0, self.weight, 1)
        return _finished(self.low / weight, self.high / weight, config)


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram(abc.ABC):
    """Counts of elements in bins of equal width over [-limit, limit].

    The limit is a power of two, which doubles when an element lies beyond it: pairs of bins then
    become one, so that every count stays where it belongs. (Counts above 2^24 are rounded, as
    float32 sums are. Elements beyond 2^126 count as that.)

    Attributes:
        counts: float32, (bins,), a power of two.
        low, high: as in `RunningAbsMax`.
    """

    counts: jax.Array
    low: jax.Array
    high: jax.Array

    @jax.jit
    def update(self, x: jax.Array) -> Self:
        """The observer after it has seen a float array of any shape."""
        low, high = _ends(x)
        seen = dataclasses.replace(
            self, low=jnp.minimum(self.low, low), high=jnp.maximum(self.high, high)
        )
        moved = _bins(_centers(self.counts) * self.limit, seen.limit, self.counts)
        # NaN and Inf are counted somewhere: `finish` refuses them.
        added = _bins(x.astype(jnp.float32).ravel(), seen.limit, self.counts)
        counts = jnp.zeros_like(self.counts).at[moved].add(self.counts).at[added].add(1)
        return dataclasses.replace(seen, counts=counts)

    @property
    def limit(self) -> jax.Array:
        """The power of two above all elements so far, float32; 0 while only zeros were seen."""
        largest = jnp.maximum(-self.low, self.high)
        # XLA divides by multiplying with the reciprocal, which must not be subnormal.
        above = jnp.ldexp(jnp.float32(1), jnp.clip(jnp.frexp(largest)[1], -100, 126))
        return jnp.where(largest > 0, above, 0)

    def finish(self, config: ArrayConfig) -> Ends:
        """(low, high), with low = -high for a symmetric config; within what was observed.

        Raises:
            ValueError: nothing was observed, or something that is not finite.
        """
        _finished(self.low, self.high, config)
        low, high = (end * self.limit for end in self.read(config))
        return _finished(jnp.maximum(low, self.low), jnp.minimum(high, self.high), config)

    @abc.abstractmethod
    def read(self, config: ArrayConfig) -> Ends:
        """(low, high) in units of the limit."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PercentileHistogram(Histogram):
    """The p-th percentile of |x|; for an asymmetric config the (100 - p)-th to the p-th of x.

    Attributes:
        p: percentile, static.
        Others: as for `Histogram`.

    Error: at most the width of a bin, 4 max|x| / bins.
    Source: Wu et al. 2020, arXiv:2004.09602, section 5.2.
    """

    p: float = dataclasses.field(default=99.99, metadata={"static": True})

    @classmethod
    def init(cls, p: float = 99.99, bins: int = 4096) -> Self:
        """An observer that has seen nothing.

        Raises:
            ValueError: p is not above 50 and at most 100, or bins is no power of two from 2 on.
        """
        Percentile(p)
        return cls(*_nothing(bins), p=p)

    def read(self, config: ArrayConfig) -> Ends:
        """(low, high) in units of the limit."""
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
    """The range with the least squared error of quantization, by the search of `MinMSE`.

    Attributes: as for `Histogram`.

    Error: elements count as the centers of their bins, 4 max|x| / bins wide at most.
    Source: Banner et al. 2019, arXiv:1810.05723, section 3, solved by search.
    """

    @classmethod
    def init(cls, bins: int = 4096) -> Self:
        """An observer that has seen nothing.

        Raises:
            ValueError: bins is no power of two from 2 on.
        """
        return cls(*_nothing(bins))

    def read(self, config: ArrayConfig) -> Ends:
        """(low, high) in units of the limit."""
        whole = dataclasses.replace(config, axis=None, group_size=None)
        return _least_error(self.counts, whole)


@jax.jit
def _least_error(counts, config):
    """(low, high) with the least squared error of elements at the centers of bins."""
    centers = jnp.where(counts > 0, _centers(counts), 0)

    def error(low, high):
        values = quantize_with_range(centers, low[0], high[0], config).dequantize()
        return jnp.sum(counts * jnp.square(values - centers), keepdims=True)

    low, high = MinMSE()(centers, (0,), config.symmetric, error)
    return low[0], high[0]


def _nothing(bins):
    """Counts, low and high before anything was observed."""
    if not isinstance(bins, int) or bins < 2 or bins & (bins - 1):
        raise ValueError(f"bins must be a power of two from 2 on, such as 4096; got {bins!r}.")
    return jnp.zeros(bins, jnp.float32), jnp.float32(0), jnp.float32(0)


def _ends(x):
    """min(x, 0) and max(x, 0); max is inf if an element is not finite."""
    values = x.astype(jnp.float32)
    values = jnp.where(jnp.isfinite(values), values, jnp.inf)
    return jnp.min(values, initial=0), jnp.max(values, initial=0)


def _centers(counts):
    """The centers of the bins, in units of the limit."""
    return (jnp.arange(counts.size, dtype=jnp.float32) * 2 + 1) / counts.size - 1


def _bins(values, limit, counts):
    """The bin of each value."""
    part = values / jnp.where(limit > 0, limit, 1)
    index = jnp.floor((part + 1) * (counts.size // 2)).astype(jnp.int32)
    return jnp.clip(index, 0, counts.size - 1)


def _percentile(counts, p, start):
    """Where p percent of the counts lie below, evenly spread in each of the bins to 1."""
    total = np.cumsum(counts)
    wanted = p / 100 * total[-1]
    bin_ = min(int(np.searchsorted(total, wanted)), len(total) - 1)
    before = total[bin_] - counts[bin_]
    part = (wanted - before) / max(counts[bin_], 1)
    return start + (bin_ + part) * (1 - start) / len(counts)


def _finished(low, high, config):
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    if not (jnp.isfinite(low) & jnp.isfinite(high)):
        raise ValueError(
            f"What was observed must be finite; got a range of {low} to {high}. Some x that the "
            "observer was updated with held NaN or Inf."
        )
    if low == high:
        raise ValueError(
            "An observer must have seen something beside zeros before it is finished; got a range "
            f"of {low} to {high}. Update it with batches first."
        )
    if config.symmetric:
        high = jnp.maximum(-low, high)
        return -high, high
    return low, high
