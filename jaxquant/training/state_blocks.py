"""How an array of any shape is divided into blocks, such that devices can share it."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ..core import ArrayConfig

BLOCK = 128
# Blocks do not cross the borders between this many equal parts of an axis, or between as many of
# them as divide it. So 2, 4 or 8 devices can share an axis without sending elements.
PARTS = 8
# Padding may add this fraction of the elements of an axis.
_MOST_PADDING = 1 / 8


@dataclasses.dataclass(frozen=True)
class Padding:
    """Zeros that complete the blocks along one axis: equally many after each part of the axis.

    Attributes:
        axis: the axis, counted from the end.
        parts: number of equal parts.
        length: length of the axis without zeros.
    """

    axis: int
    parts: int
    length: int

    def add(self, x: jax.Array, length: int) -> jax.Array:
        """Returns x with zeros, so that the axis has this length."""
        return self._pad(x, (length - self.length) // self.parts)

    def remove(self, x: jax.Array) -> jax.Array:
        """Returns x without the zeros."""
        return self._pad(x, (self.length - x.shape[self.axis]) // self.parts)

    def _pad(self, x, count):
        axis = self.axis % x.ndim
        part = x.shape[axis] // self.parts
        split = (*x.shape[:axis], self.parts, part, *x.shape[axis + 1 :])
        widths = [(0, count if a == axis + 1 else 0, 0) for a in range(len(split))]
        padded = jax.lax.pad(x.reshape(split), jnp.zeros((), x.dtype), widths)
        joined = self.parts * (part + count)
        return padded.reshape(*x.shape[:axis], joined, *x.shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Layout:
    """The blocks of an array.

    Attributes:
        blocks: their length along each axis.
        shape: shape of the array with padding.
        padding: where it is padded; None for no padding.
    """

    blocks: tuple[int, ...]
    shape: tuple[int, ...]
    padding: Padding | None = None


def layout_of(shape: tuple[int, ...], config: ArrayConfig) -> Layout:
    """Divides an array into blocks of at most `config.group_size` elements.

    Blocks extend along the second to last axis, then along those before it, and last along the last
    axis, which TPUs cannot split without a copy, until they have at least half as many elements.
    An axis without a suitable divisor is padded. Formats with a fixed group size have their blocks
    along the axis that needs the least padding.

    Args:
        shape: shape of the array, with at least one axis.
        config: format, and group size as the number of elements per block (None: 128).

    Raises:
        ValueError: the group size is a tuple.
    """
    length = block_length(config)
    if config.format.group_size:
        candidates = [_along(shape, axis, length) for axis in _order(shape)]
        return min(candidates, key=lambda found: math.prod(found.shape))
    parts = PARTS
    found = _tile(shape, length, parts)
    # Short axes, such as those of convolutions, have parts of a few elements.
    while parts > 1 and 4 * math.prod(found.blocks) < length:
        parts //= 2
        found = _tile(shape, length, parts)
    return found


def block_length(config: ArrayConfig) -> int:
    """Returns the number of elements per block.

    Raises:
        ValueError: the group size is a tuple.
    """
    length = config.group_size or config.format.group_size or BLOCK
    if not isinstance(length, int):
        raise ValueError(
            "group_size must be a single number of elements per block, or None for "
            f"{BLOCK}; got {config.group_size}."
        )
    return length


def blocks_of(config: ArrayConfig, length: int | tuple[int, ...]) -> ArrayConfig:
    """Returns the config with blocks of this length."""
    size = None if config.format.group_size else length
    return dataclasses.replace(config, group_size=size, per_tensor=False)


def _order(shape):
    """The axes in the order in which blocks extend along them."""
    return [*reversed(range(len(shape) - 1)), len(shape) - 1]


def _tile(shape, length, parts):
    """Blocks that do not cross the borders between `parts` parts of any axis."""
    blocks, padded, padding = [1] * len(shape), list(shape), None
    for axis in _order(shape):
        size = math.prod(blocks)
        if 2 * size >= length:
            break
        count = math.gcd(shape[axis], parts)
        part = shape[axis] // count
        blocks[axis], total = _split(part, length // size)
        if total > part:
            padding = Padding(axis - len(shape), count, shape[axis])
            padded[axis] = count * total
            break
    return Layout(tuple(blocks), tuple(padded), padding)


def _split(part, room):
    """(block, padded length): how a part of an axis is divided into blocks of at most `room`."""
    divisors = [d for d in range(1, min(part, room) + 1) if part % d == 0]
    # TPUs keep bytes in tiles of 32 rows.
    long = [d for d in divisors if 2 * d >= min(part, room)]
    if long:
        return max(long, key=lambda d: (math.gcd(d, 32), d)), part
    count = -(-part // room)
    block = -(-part // count)
    is_close = count * block - part <= _MOST_PADDING * part
    return (block, count * block) if is_close else (divisors[-1], part)


def _along(shape, axis, length):
    """Blocks of exactly `length` elements along one axis."""
    blocks, padded = [1] * len(shape), list(shape)
    blocks[axis], padded[axis] = length, -(-shape[axis] // length) * length
    is_padded = padded[axis] > shape[axis]
    padding = Padding(axis - len(shape), 1, shape[axis]) if is_padded else None
    return Layout(tuple(blocks), tuple(padded), padding)
