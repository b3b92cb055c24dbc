"""Windows of an array, so small that what an update computes of one fits in the cache."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

# Elements of a window: an update of AdamW has five float32 arrays of them at a time.
_SIZE = 2**18
# Windows divide the last axis at multiples of this many elements, a cache line of codes.
_LAST = 64


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of equal shape that an array consists of.

    Attributes:
        shape: of a window.
        counts: number of windows along each axis.
    """

    shape: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of windows."""
        return math.prod(self.counts)

    def starts(self, number: Any) -> list[Any]:
        """The place of the first element of a window, which may be a traced number."""
        found = []
        for length, count in zip(reversed(self.shape), reversed(self.counts), strict=True):
            found.append(number % count * length)
            number = number // count
        return found[::-1]


def windows_of(shape: tuple[int, ...], blocks: Iterable[tuple[int, ...]]) -> Windows:
    """Divides an array along its first axes, in windows of about `_SIZE` elements or fewer.

    Args:
        shape: of the array.
        blocks: lengths along each axis, which divide it, and of which windows have multiples.
    """
    units = [math.lcm(*lengths) for lengths in zip(*blocks, strict=True)]
    last = math.lcm(units[-1], _LAST)
    units[-1] = last if shape[-1] % last == 0 else shape[-1]
    counts, size = [], math.prod(shape)
    for length, unit in zip(shape, units, strict=True):
        most = length // unit
        enough = (n for n in range(1, most + 1) if most % n == 0 and size <= n * _SIZE)
        counts.append(next(enough, most))
        size //= counts[-1]
    lengths = tuple(n // count for n, count in zip(shape, counts, strict=True))
    return Windows(lengths, tuple(counts))
