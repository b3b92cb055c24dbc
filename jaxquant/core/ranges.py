"""Ranges: which part of each group the codes span. A range is a frozen callable:

    range(groups, axes, symmetric, error) -> (low, high)

`groups` is an array whose groups extend along `axes`. `low` and `high` have length 1 along these
axes, with `low <= 0 <= high`, and `low = -high` if `symmetric`. A symmetric range may also be
mirrored, with `high < 0 < low`, for a negative scale. `error(low, high)` returns the summed squared
error of quantizing each group with that range. To add a range, add a class to this module and to
`RANGES`.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

# (low, high) -> the error of each group, quantized with this range.
Error = Callable[[jax.Array, jax.Array], jax.Array]


class Range(Protocol):
    """The type of `ArrayConfig.range`: a hashable callable, as described in this module."""

    def __call__(
        self,
        groups: jax.Array,
        axes: tuple[int, ...],
        symmetric: bool,
        error: Error,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (low, high)."""
        ...


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """Range of all elements: [-max|x|, max|x|], or [min(x, 0), max(x, 0)] if asymmetric.

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.

    Example:
        >>> config = jq.ArrayConfig(format=jq.INT8, range=jq.AbsMax())
        >>> jq.quantize(jnp.array([1.0, -254.0]), config).scale.tolist()
        [2.0]
    """

    def __call__(
        self, groups: jax.Array, axes: tuple[int, ...], symmetric: bool, error: Error
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (low, high)."""
        if symmetric:
            high = largest_magnitude(groups, axes)
            return -high, high
        low = jnp.min(groups, axes, keepdims=True, initial=0)
        return low, jnp.max(groups, axes, keepdims=True, initial=0)


@dataclasses.dataclass(frozen=True)
class Percentile:
    """Range up to the p-th percentile of |x|; the (100 - p)-th to p-th of x if asymmetric.

    Interpolates linearly between order statistics, like `numpy.percentile`. Elements outside the
    range are clipped. `Percentile(100)` equals `AbsMax()`.

    Attributes:
        p: percentile, at most 100 and above 50, where asymmetric ranges become empty.

    Raises:
        ValueError: p is not such a number.

    Source: Wu et al. 2020, arXiv:2004.09602, section 5.2.

    Example:
        >>> config = jq.ArrayConfig(format=jq.INT8, range=jq.Percentile(75))
        >>> jq.quantize(jnp.array([1.0, 2.0, 3.0, 127.0, 1000.0]), config).scale.tolist()
        [1.0]
    """

    p: float = 99.9

    def __post_init__(self) -> None:
        if not isinstance(self.p, int | float) or not 50 < self.p <= 100:
            raise ValueError(f"p must be above 50 and at most 100 (percent); got {self.p!r}.")

    def __call__(
        self, groups: jax.Array, axes: tuple[int, ...], symmetric: bool, error: Error
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (low, high)."""
        if symmetric:
            high = _percentile(jnp.abs(groups), self.p, axes)
            return -high, high
        # The p-th percentile of -x is minus the (100 - p)-th percentile of x.
        low = -_percentile(-groups, self.p, axes)
        return jnp.minimum(low, 0), jnp.maximum(_percentile(groups, self.p, axes), 0)


@dataclasses.dataclass(frozen=True)
class MinMSE:
    """Range with the least squared error per group, found by shrinking the abs-max range.

    The search tries 20 ratios, then 19 finer ones around the best ratio. Asymmetric ranges are
    shrunk as a whole first, then at each end. The search starts from the range of `AbsMax()`, so
    its error is never larger.

    Attributes:
        mirrored: whether negative scales are tried, too. Symmetric INT4 has codes from -8 to 7, so
            that a group whose largest element is positive is better off with the codes negated. Of
            formats with as many codes on both sides, and of scales of 8 bits, nothing changes.

    Source: Banner et al. 2019, arXiv:1810.05723, section 3, solved by search.

    Example:
        >>> x = jnp.append(jnp.linspace(-1, 1, 99), 2)
        >>> def error(range):
        ...     q = jq.quantize(x, jq.ArrayConfig(format=jq.INT4, range=range))
        ...     return float(jnp.sum((q.dequantize() - x) ** 2))
        >>> error(jq.MinMSE(mirrored=True)) < error(jq.MinMSE()) < error(jq.AbsMax())
        True
    """

    mirrored: bool = False

    def __call__(
        self, groups: jax.Array, axes: tuple[int, ...], symmetric: bool, error: Error
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (low, high)."""
        low, high = AbsMax()(groups, axes, symmetric, error)
        best = _least(low, high, symmetric, error)
        if self.mirrored and symmetric:
            other = _least(high, low, symmetric, error)
            is_better = other[0] < best[0]
            best = [jnp.where(is_better, a, b) for a, b in zip(other, best, strict=True)]
        return best[1], best[2]


def largest_magnitude(groups: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """max|x| of each group; 0 for an empty group, and inf if an element is not finite.

    NaN is replaced by inf because XLA's CPU backend drops NaN in a maximum. Both the range and
    the test for finite elements use this maximum, so that XLA computes it in one pass.
    """
    magnitude = jnp.abs(groups)
    magnitude = jnp.where(magnitude < jnp.inf, magnitude, jnp.inf)
    return jnp.max(magnitude, axes, keepdims=True, initial=0)


RANGES = {r.__name__: r for r in (AbsMax, Percentile, MinMSE)}


def _least(low, high, symmetric, error):
    """The least error of ranges within (low, high), and that range."""
    ratio = jnp.ones_like(low)
    coarse, fine = np.linspace(-0.95, -0.05, 19), np.linspace(-0.045, 0.045, 19)
    both, lower, upper = (1, 1), (1, 0), (0, 1)
    searches = [(coarse, both), (fine, both)]
    if not symmetric:
        searches += [(coarse, lower), (fine, lower), (coarse, upper), (fine, upper)]
    best = error(low, high), ratio, ratio
    for steps, ends in searches:
        best = _search(best, steps, ends, lambda a, b: error(low * a, high * b))
    least, low_ratio, high_ratio = best
    return least, low * low_ratio, high * high_ratio


def _search(best, steps, ends, error):
    """Adds each of `steps` to the ratios of the `ends` (low, high); keeps the best per group."""
    _, low_origin, high_origin = best

    def try_step(best, step):
        low = jnp.clip(low_origin + step * ends[0], 0.005, 1)
        high = jnp.clip(high_origin + step * ends[1], 0.005, 1)
        candidate = error(low, high), low, high
        is_better = candidate[0] < best[0]
        return tuple(jnp.where(is_better, c, b) for c, b in zip(candidate, best, strict=True)), None

    return jax.lax.scan(try_step, best, jnp.asarray(steps, low_origin.dtype))[0]


def _percentile(x, p, axes):
    """The p-th percentile over `axes`, with keepdims; 0 for an empty group."""
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
    if fraction == 0:
        # Nothing is above the largest element, and inf * 0 must not become NaN.
        return below
    gap = above - below
    # One multiplication and one addition, which compilers contract in one way only: scales have the
    # same bits in every program. A gap may be wider than the largest finite float.
    wide = below * (1 - fraction) + above * fraction
    return jnp.where(jnp.isinf(gap), wide, below + gap * fraction)


def _order_statistic(x, rank, axes):
    """The element at `rank` in ascending order, found by bisection over the bits of the floats.

    Each bit takes one pass that compares and counts. On XLA's CPU backend, sort and top_k take
    ten times as long for 4096 elements, and neither reduces over several axes.
    """
    bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))
    width = bits.dtype.itemsize * 8
    sign = jnp.asarray(1, bits.dtype) << (width - 1)
    # Maps floats to unsigned integers with the same order.
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
    """The unsigned integer dtype with the width of a floating-point dtype."""
    return jnp.dtype(f"uint{jnp.dtype(dtype).itemsize * 8}")
