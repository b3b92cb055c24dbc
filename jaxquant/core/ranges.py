"""Which part of each group the codes span. A range is a frozen callable:

    range(groups, axes, symmetric, error) -> (low, high)

`groups` holds each group along `axes`; `low <= 0 <= high` keep these axes at length 1, and
`low = -high` if `symmetric`. `error(low, high)` is the summed squared error of quantizing each
group with that range. To add a range, add a class here and name it in `RANGES`.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Range(Protocol):
    """What `ArrayConfig.range` must be: hashable, and callable as this module says."""

    def __call__(
        self,
        groups: jax.Array,
        axes: tuple[int, ...],
        symmetric: bool,
        error: Callable[[jax.Array, jax.Array], jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (low, high)."""
        ...


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """Spans every element: [-max|x|, max|x|], or [min(x, 0), max(x, 0)] if asymmetric.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.
    """

    def __call__(self, groups, axes, symmetric, error):
        """Returns (low, high)."""
        if symmetric:
            high = largest_magnitude(groups, axes)
            return -high, high
        low = jnp.min(groups, axes, keepdims=True, initial=0)
        return low, jnp.max(groups, axes, keepdims=True, initial=0)


@dataclasses.dataclass(frozen=True)
class Percentile:
    """Spans up to the p-th percentile of |x|; if asymmetric, the (100 - p)-th to p-th of x.

    Interpolates linearly between order statistics, as `numpy.percentile` does. Elements
    beyond the range are clipped. `Percentile(100)` equals `AbsMax()`.

    Attributes:
        p: percentile, above 50 (the asymmetric range would be empty) and at most 100.

    Source: Wu et al. 2020, arXiv:2004.09602, section 5.2.
    """

    p: float = 99.9

    def __post_init__(self):
        if not isinstance(self.p, int | float) or not 50 < self.p <= 100:
            raise ValueError(f"p must be above 50 and at most 100 (percent); got {self.p!r}.")

    def __call__(self, groups, axes, symmetric, error):
        """Returns (low, high)."""
        if symmetric:
            high = _percentile(jnp.abs(groups), self.p, axes)
            return -high, high
        # The upper percentile of -x is the lower one of x.
        low = -_percentile(-groups, self.p, axes)
        return jnp.minimum(low, 0), jnp.maximum(_percentile(groups, self.p, axes), 0)


@dataclasses.dataclass(frozen=True)
class MinMSE:
    """Shrinks the abs-max range to the one with the least squared error, group by group.

    A grid of 20 ratios, then a fine one of 19 around the best of them; asymmetric ranges
    shrink as a whole, then at each end. Never worse than `AbsMax()`, where it starts.

    Source: Banner et al. 2019, arXiv:1810.05723, section 3, solved by search.
    """

    def __call__(self, groups, axes, symmetric, error):
        """Returns (low, high)."""
        low, high = AbsMax()(groups, axes, symmetric, error)
        ratio = jnp.ones_like(low)
        coarse, fine = np.linspace(-0.95, -0.05, 19), np.linspace(-0.045, 0.045, 19)
        both, lower, upper = (1, 1), (1, 0), (0, 1)
        searches = [(coarse, both), (fine, both)]
        if not symmetric:
            searches += [(coarse, lower), (fine, lower), (coarse, upper), (fine, upper)]
        best = error(low, high), ratio, ratio
        for steps, ends in searches:
            best = _search(best, steps, ends, lambda a, b: error(low * a, high * b))
        _, low_ratio, high_ratio = best
        return low * low_ratio, high * high_ratio


def largest_magnitude(groups: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """max|x| of each group, 0 where there is no element, and inf if one is not finite.

    XLA's CPU backend drops NaN in a maximum, hence inf in its place. Whoever asks for both, the
    range and whether all is finite, gets them from one pass over the array.
    """
    magnitude = jnp.abs(groups)
    magnitude = jnp.where(magnitude < jnp.inf, magnitude, jnp.inf)
    return jnp.max(magnitude, axes, keepdims=True, initial=0)


RANGES = {r.__name__: r for r in (AbsMax, Percentile, MinMSE)}


def _search(best, steps, ends, error):
    """Tries `steps` added to the ratios of the `ends` (low, high); keeps each group's best."""
    _, low_origin, high_origin = best

    def try_step(best, step):
        low = jnp.clip(low_origin + step * ends[0], 0.005, 1)
        high = jnp.clip(high_origin + step * ends[1], 0.005, 1)
        candidate = error(low, high), low, high
        is_better = candidate[0] < best[0]
        return tuple(jnp.where(is_better, c, b) for c, b in zip(candidate, best, strict=True)), None

    return jax.lax.scan(try_step, best, jnp.asarray(steps, low_origin.dtype))[0]


def _percentile(x, p, axes):
    """The p-th percentile over `axes`, which stay with length 1; 0 where there is no element."""
    count = int(np.prod([x.shape[a] for a in axes]))
    if count == 0:
        return jnp.max(x, axes, keepdims=True, initial=0)
    position = p / 100 * (count - 1)
    rank = int(position)
    below = _order_statistic(x, rank, axes)
    at_most = jnp.sum(x <= below, axes, keepdims=True)
    next_up = jnp.min(x, axes, keepdims=True, initial=jnp.inf, where=x > below)
    above = jnp.where(at_most > rank + 1, below, next_up)
    fraction = position - rank
    # At the largest element there is nothing above: inf * 0 must not become NaN. In halves, so
    # that a gap of more than the largest float does not overflow.
    return below if fraction == 0 else below + (above / 2 - below / 2) * (2 * fraction)


def _order_statistic(x, rank, axes):
    """The element with `rank` smaller ones, by bisection over the bits of the float.

    One pass of compare-and-count per bit: on XLA's CPU backend a sort or top_k of 4096
    elements takes ten times as long, and neither reduces over several axes in place.
    """
    bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))
    width = bits.dtype.itemsize * 8
    sign = jnp.asarray(1, bits.dtype) << (width - 1)
    # Makes the order of the unsigned integers that of the floats.
    keys = jnp.where(bits < sign, bits | sign, ~bits)

    def set_bit(i, best):
        candidate = best | (sign >> jnp.asarray(i, bits.dtype))
        smaller = jnp.sum(keys < candidate, axes, keepdims=True)
        return jnp.where(smaller <= rank, candidate, best)

    best = jnp.zeros_like(jnp.max(keys, axes, keepdims=True))
    best = jax.lax.fori_loop(0, width, set_bit, best)
    bits = jnp.where(best < sign, ~best, best ^ sign)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def _unsigned(dtype):
    """The unsigned dtype with the bits of a float dtype."""
    return jnp.dtype(f"uint{jnp.dtype(dtype).itemsize * 8}")
