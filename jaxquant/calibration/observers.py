"""Observers: the range of activations, accumulated over batches. Each one is a pytree.

    observer = RunningAbsMax.init()
    observer = observer.update(x)                  # under jit, in scan, ...
    low, high = observer.finish(config)

To add an observer, add a class with these three methods. Observers work on whole tensors, because
an operand has a single static scale.
"""

import dataclasses
from typing import Protocol, Self

import jax
import jax.numpy as jnp

from ..core import ArrayConfig

Ends = tuple[jax.Array, jax.Array]


class Observer(Protocol):
    """Interface of an observer: `calibrate` expects one that has not seen any data.

    Example:
        >>> observer = jq.training.MovingAverage.init(decay=0.5)
        >>> for batch in (jnp.ones(3), 3 * jnp.ones(3)):
        ...     observer = observer.update(batch)
        >>> low, high = observer.finish(jq.ArrayConfig())
        >>> round(float(high), 3)  # (0.5 * 1 + 3) / (0.5 + 1)
        2.333
    """

    def update(self, x: jax.Array) -> Self:
        """Returns the observer after it has also seen x."""
        ...

    def finish(self, config: ArrayConfig) -> Ends:
        """Returns (low, high), the range that codes of this config should span."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RunningAbsMax:
    """Running minimum and maximum of all elements.

        low = min over batches of min(x, 0)        high = max over batches of max(x, 0)

    Attributes:
        low, high: float32 scalars, low <= 0 <= high; infinite after any non-finite element.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.

    Example:
        >>> observer = jq.training.RunningAbsMax.init().update(jnp.array([-1.0, 3.0]))
        >>> low, high = observer.finish(jq.ArrayConfig(symmetric=False))
        >>> float(low), float(high)
        (-1.0, 3.0)
    """

    low: jax.Array
    high: jax.Array

    @classmethod
    def init(cls) -> Self:
        """Returns an observer that has not seen any data."""
        return cls(jnp.float32(0), jnp.float32(0))

    @jax.jit
    def update(self, x: jax.Array) -> Self:
        """Returns the observer after it has also seen a float array of any shape."""
        low, high = batch_range(x)
        return dataclasses.replace(
            self, low=jnp.minimum(self.low, low), high=jnp.maximum(self.high, high)
        )

    def finish(self, config: ArrayConfig) -> Ends:
        """Returns (low, high), with low = -high for a symmetric config.

        Raises:
            ValueError: no data was observed, only zeros, or a non-finite element.
        """
        return checked_range(self.low, self.high, config)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class MovingAverage:
    """Exponential moving average of each batch's minimum and maximum, bias-corrected.

        low  = sum_i d^(n-i) min(x_i, 0) / sum_i d^(n-i)        high likewise, with max(x_i, 0)

    Attributes:
        low, high, weight: numerators and denominator above, each multiplied by 1 - d.
        decay: d, static.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1; bias correction: Kingma and Ba 2015,
        arXiv:1412.6980, section 3.

    Example:
        >>> observer = jq.training.MovingAverage.init(decay=0.9).update(jnp.array([-1.0, 3.0]))
        >>> low, high = observer.finish(jq.ArrayConfig(symmetric=False))
        >>> round(float(low), 4), round(float(high), 4)
        (-1.0, 3.0)
    """

    low: jax.Array
    high: jax.Array
    weight: jax.Array
    decay: float = dataclasses.field(default=0.9, metadata={"static": True})

    @classmethod
    def init(cls, decay: float = 0.9) -> Self:
        """Returns an observer that has not seen any data.

        Raises:
            ValueError: decay is not in [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1; got {decay!r}.")
        return cls(jnp.float32(0), jnp.float32(0), jnp.float32(0), decay)

    @jax.jit
    def update(self, x: jax.Array) -> Self:
        """Returns the observer after it has also seen a float array; an empty one is ignored."""
        if not x.size:
            return self
        low, high = batch_range(x)
        new = {"low": low, "high": high, "weight": jnp.float32(1)}
        averages = {
            name: self.decay * getattr(self, name) + (1 - self.decay) * value
            for name, value in new.items()
        }
        return dataclasses.replace(self, **averages)

    def finish(self, config: ArrayConfig) -> Ends:
        """Returns (low, high), with low = -high for a symmetric config.

        Raises:
            ValueError: no data was observed, only zeros, or a non-finite element.
        """
        weight = jnp.where(self.weight > 0, self.weight, 1)
        return checked_range(self.low / weight, self.high / weight, config)


def batch_range(x: jax.Array) -> Ends:
    """min(x, 0) and max(x, 0); the latter is inf if any element is not finite."""
    values = x.astype(jnp.float32)
    values = jnp.where(jnp.isfinite(values), values, jnp.inf)
    return jnp.min(values, initial=0), jnp.max(values, initial=0)


def checked_range(low: jax.Array, high: jax.Array, config: ArrayConfig) -> Ends:
    """The range extended to contain zero, and made symmetric if the config is.

    Raises:
        ValueError: the range is not finite, or is empty.
    """
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    if not (jnp.isfinite(low) & jnp.isfinite(high)):
        raise ValueError(
            f"Observed values must be finite; got a range of {low} to {high}. Some x passed to "
            "update held NaN or Inf."
        )
    if low == high:
        raise ValueError(
            "An observer must see a nonzero value before finish is called; got a range of "
            f"{low} to {high}. Update it with batches first."
        )
    if config.symmetric:
        high = jnp.maximum(-low, high)
        return -high, high
    return low, high
