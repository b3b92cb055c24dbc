"""Arrays of any shape in blocks of nearly one length, each block with a scale."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, QTensor, quantize

BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Blockwise:
    """A float array that is stored as a QTensor in blocks. A pytree.

    Attributes:
        q: the array itself, in blocks along its last axis; or all its elements in one row, with
            zeros after them so that the last block is whole.
        shape: of the array, if it lies in a row; None otherwise, so that it may be sharded,
            stacked and sliced. Static.
    """

    q: QTensor
    shape: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def dequantize(self) -> jax.Array:
        """The array, in the shape and dtype that it had."""
        values = self.q.dequantize()
        if self.shape is None:
            return values
        return values[: math.prod(self.shape)].reshape(self.shape)


def quantize_blocks(x: jax.Array, config: ArrayConfig, key: jax.Array | None = None) -> Blockwise:
    """Quantizes an array of any shape in blocks of about `config.group_size` elements.

    Blocks lie along the last axis, in the largest length that divides it and is at most
    the group size and at least half of it. If there is none, they lie in a row of all elements.

    Args:
        x: floating array.
        config: all but its axis is used. Without a group size, blocks have 256 elements.
        key: random key for stochastic rounding; None rounds to nearest.

    Returns:
        The array as a `Blockwise`.

    Raises:
        ValueError: as for `jaxquant.quantize`, or the group size is not one number.

    Error: as for `jaxquant.quantize`.
    Source: Dettmers et al. 2022, arXiv:2110.02861, section 2.1.
    """
    length = block_length(config)
    smallest = length if config.format.group_size else -(-length // 2)
    lengths = range(length, smallest - 1, -1) if x.ndim else ()
    divisor = next((d for d in lengths if x.shape[-1] % d == 0), None)
    if divisor is not None:
        return Blockwise(quantize(x, blocks_of(config, divisor), key))
    row = jnp.pad(x.reshape(-1), (0, -x.size % length))
    return Blockwise(quantize(row, blocks_of(config, length), key), x.shape)


def block_length(config: ArrayConfig) -> int:
    """Elements per block.

    Raises:
        ValueError: the config has several group sizes.
    """
    length = config.group_size or config.format.group_size or BLOCK
    if not isinstance(length, int):
        raise ValueError(
            "group_size must be one number of elements per block, or None for "
            f"{BLOCK}; got {config.group_size}."
        )
    return length


def blocks_of(config: ArrayConfig, length: int) -> ArrayConfig:
    """The config with blocks of this length along the last axis."""
    size = None if config.format.group_size else length
    return dataclasses.replace(config, axis=-1, group_size=size)
