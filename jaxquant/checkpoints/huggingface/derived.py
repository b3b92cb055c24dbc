"""Sources that are computed from other Sources, slice by slice."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..source import Index, Source


def converted(source: Source, dtype: Any, function: Callable[[np.ndarray], np.ndarray]) -> Source:
    """A function of each element, whose values have `dtype`."""
    return Source(source.shape, np.dtype(dtype), lambda index: function(source.read(index)))


def viewed(source: Source, dtype: Any) -> Source:
    """The bytes of each element as another dtype of that width."""
    return converted(source, dtype, lambda x: x.view(dtype))


def reshaped(source: Source, shape: Sequence[int]) -> Source:
    """Another shape. For small arrays: it reads the whole array for each slice."""
    if source.shape == tuple(shape):
        return source
    assert source.size == math.prod(shape)
    return computed(shape, source.dtype, lambda: source.read().reshape(shape))


def joined_axes(source: Source, axis: int) -> Source:
    """An axis and the axes after it as one axis; slices may start and stop anywhere in it."""
    width = math.prod(source.shape[axis + 1 :])
    shape = (*source.shape[:axis], source.shape[axis] * width)

    def reader(index: Index) -> np.ndarray:
        start, stop = index[axis].start, index[axis].stop
        rows = slice(start // width, -(-stop // width)) if width else slice(0, 0)
        whole = (slice(0, n) for n in source.shape[axis + 1 :])
        part = source.read((*index[:axis], rows, *whole))
        flat = part.reshape(*part.shape[:axis], part.shape[axis] * width)
        first = rows.start * width
        return flat[..., start - first : stop - first].copy()

    return Source(shape, source.dtype, reader)


def computed(shape: Sequence[int], dtype: Any, function: Callable[[], np.ndarray]) -> Source:
    """What a function returns, for arrays that are cheap to compute whole."""
    return Source(tuple(shape), np.dtype(dtype), lambda index: np.array(function()[index]))


def repeated(source: Source, axis: int, step: int, block: int, length: int) -> Source:
    """Scales of blocks, repeated for shorter blocks.

    Args:
        source: one element per block of `block` along the axis.
        axis: counted from the front.
        step: length of the new blocks, a divisor of `block`.
        block: length of the old blocks.
        length: of the array that is scaled, which `step` divides.
    """
    shape = (*source.shape[:axis], length // step, *source.shape[axis + 1 :])

    def reader(index: Index) -> np.ndarray:
        chosen = np.arange(index[axis].start, index[axis].stop) * step // block
        first, last = (chosen[0], chosen[-1] + 1) if chosen.size else (0, 0)
        inside = slice(int(first), int(last))
        part = source.read((*index[:axis], inside, *index[axis + 1 :]))
        return np.take(part, chosen - first, axis)

    return Source(shape, source.dtype, reader)


def refined(source: Source, shape: Sequence[int], blocks: Sequence[int]) -> Source:
    """Scales of blocks of which the last along an axis may be shorter, on a grid that divides.

    The new block is the greatest common divisor of the old block and the rest: 576 rows in blocks
    of 128 leave 64 rows, so the scales of the first four blocks are given twice.

    Args:
        source: of ceil(n / b) elements for each axis of length n and block b.
        shape: of the array that is scaled.
        blocks: b for each axis.
    """
    for axis, (length, block) in enumerate(zip(shape, blocks, strict=True)):
        rest = length % block
        if rest and source.shape[axis] > 1:
            source = repeated(source, axis, math.gcd(block, rest), block, length)
    return source
