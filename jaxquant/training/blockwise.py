"""Blockwise quantization of arrays of any shape: one scale per block of elements."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ..core import ArrayConfig, QTensor, quantize

BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Blockwise:
    """A float array of any shape, stored as a QTensor in blocks. A pytree.

    Attributes:
        q: the array in blocks along its last axis; or all its elements flattened, padded with zeros
            to whole blocks.
        shape: shape of the array if it is flattened, static. None otherwise, so that the array
            can be sharded, stacked and sliced.

    Example:
        >>> optimizer = jq.training.quantized_state(optax.adam(1e-3))
        >>> state = optimizer.init({"kernel": jnp.zeros((64, 128))})
        >>> block = state.inner[0].mu["kernel"]
        >>> isinstance(block, jq.training.Blockwise), block.dequantize().shape
        (True, (64, 128))
    """

    q: QTensor
    shape: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def dequantize(self) -> jax.Array:
        """Returns the array in its original shape and dtype."""
        values = self.q.dequantize()
        if self.shape is None:
            return values
        return values[: math.prod(self.shape)].reshape(self.shape)


def quantize_blocks(x: jax.Array, config: ArrayConfig, key: jax.Array | None = None) -> Blockwise:
    """Quantizes an array of any shape in blocks of about `config.group_size` elements.

    Blocks run along the last axis. Their length is its largest divisor that is at most the group
    size and at least half of it. If there is none, the array is flattened and padded.

    Args:
        x: floating-point array.
        config: format, range and scale dtype; group_size is elements per block, None for 256.
        key: random key for stochastic rounding; None rounds to nearest.

    Returns:
        The array as a `Blockwise`.

    Raises:
        ValueError: as for `jaxquant.quantize`, or the group size is a tuple.

    Error: as for `jaxquant.quantize`.
    Source: Dettmers et al. 2022, arXiv:2110.02861, section 2.1.
    """
    length = block_length(config)
    smallest = length if config.format.group_size else -(-length // 2)
    lengths = range(length, smallest - 1, -1) if x.ndim else ()
    divisor = next((d for d in lengths if x.shape[-1] % d == 0), None)
    if divisor is not None:
        return Blockwise(quantize(x, blocks_of(config, divisor), -1, key))
    row = jnp.pad(x.reshape(-1), (0, -x.size % length))
    return Blockwise(quantize(row, blocks_of(config, length), -1, key), x.shape)


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


def blocks_of(config: ArrayConfig, length: int) -> ArrayConfig:
    """Returns the config with blocks of this length."""
    size = None if config.format.group_size else length
    return dataclasses.replace(config, group_size=size, per_tensor=False)
