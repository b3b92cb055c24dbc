"""Blockwise quantization of arrays of any shape: one scale per block of elements."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import ArrayConfig, QTensor, Seed, quantize
from ..jaxprs import sharding_for
from .state_blocks import Padding, block_length, blocks_of, layout_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Blockwise:
    """A float array of any shape, stored as a QTensor in blocks. A pytree.

    The codes have the shape of the array, up to padding along one axis, so that they can be
    sharded, stacked and sliced like the array.

    Attributes:
        q: the array in blocks, and padded with zeros if no block length divides its axes. In the
            state of a model of Flax, its codes are in the variable of the parameter.
        padding: which axis is padded, static. None for no padding.

    Example:
        >>> optimizer = jq.training.quantized_state(optax.adam(1e-3))
        >>> state = optimizer.init({"kernel": jnp.zeros((64, 128))})
        >>> block = state.inner[0].mu["kernel"]
        >>> isinstance(block, jq.training.Blockwise), block.dequantize().shape
        (True, (64, 128))
    """

    q: QTensor
    padding: Padding | None = dataclasses.field(default=None, metadata={"static": True})

    def dequantize(self) -> jax.Array:
        """Returns the array in its original shape and dtype."""
        (codes,) = jax.tree.leaves(self.q.codes)
        values = dataclasses.replace(self.q, codes=codes).dequantize()
        return values if self.padding is None else self.padding.remove(values)

    def put_in(self, box: Any) -> "Blockwise":
        """Returns the same array with its codes in a pytree of one leaf, a Flax variable say.

        Args:
            box: structure of the pytree.
        """
        codes = jax.tree.unflatten(box, [self.q.codes])
        return dataclasses.replace(self, q=dataclasses.replace(self.q, codes=codes))

    def restore(self) -> Any:
        """Returns the array, in the pytree that its codes were put in."""
        return jax.tree.unflatten(jax.tree.structure(self.q.codes), [self.dequantize()])


def quantize_blocks(
    x: jax.Array, config: ArrayConfig, key: jax.Array | Seed | None = None
) -> Blockwise:
    """Quantizes an array in the blocks that `layout_of` chooses.

    Args:
        x: floating-point array with at least one axis.
        config: format, range and scale dtype; group_size is the largest number of elements per
            block, None for 128.
        key: random key for stochastic rounding; None rounds to nearest.

    Returns:
        The array as a `Blockwise`.

    Raises:
        ValueError: as for `jaxquant.quantize`, or the group size is a tuple.

    Error: as for `jaxquant.quantize`.
    Source: Dettmers et al. 2022, arXiv:2110.02861, section 2.1.
    """
    layout = layout_of(x.shape, config)
    if layout.padding is not None:
        x = layout.padding.add(x, layout.shape[layout.padding.axis])
    axes = tuple(a for a, block in enumerate(layout.blocks) if block > 1) or (0,)
    lengths = tuple(layout.blocks[a] for a in axes)
    return Blockwise(quantize(x, blocks_of(config, lengths), axes, key), layout.padding)


def zero_blocks(x: jax.Array, config: ArrayConfig) -> Blockwise:
    """Writes the codes and scales of zeros: `quantize_blocks(jnp.zeros_like(x), config)`.

    XLA would compute the quantization of zeros while it compiles, in 30 s for 1024 x 2048 elements.

    Args:
        x: array, or tracer, of which shape, dtype and sharding are used.
        config: as for `quantize_blocks`.

    Raises:
        ValueError: as for `quantize_blocks`.
    """
    shapes = jax.eval_shape(lambda x: quantize_blocks(x, config), x)
    with jax.ensure_compile_time_eval():
        block = quantize_blocks(jnp.zeros(block_length(config), x.dtype), config)
        values = [np.asarray(leaf).flat[0] for leaf in jax.tree.leaves(block)]

    def fill(like, value):
        sharding = sharding_for(like.shape, x)
        return jax.lax.full_like(x, value, like.dtype, like.shape, sharding)

    leaves, treedef = jax.tree.flatten(shapes)
    return jax.tree.unflatten(treedef, map(fill, leaves, values))
