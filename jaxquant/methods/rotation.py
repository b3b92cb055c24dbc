"""Rotation of the activations of a matrix, block by block, before its codes are chosen."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import ArrayConfig, Axes, BlockRotation, check_block, hadamard_factors
from .method import Statistics, Transformed, is_transform
from .statistics import OfPairs, Statistic

_LARGEST_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Rotates the channels of activations and weights by Hadamard matrices with random signs.

        x -> x R,    W -> W R,    (x R) (W R)^T = x W^T;    S -> R^T S R

    Outliers of a channel, of activations or weights, spread over its block, so that per-channel
    4-bit weights and 4-bit activations lose less. The rotation of the activations is computed in
    each product, which costs block / N of the product with N outputs; `tree.fold` rotates without
    this cost where the model allows it.

    A rotated second moment has an almost flat diagonal. What weighs single channels has therefore
    nothing to gain after a rotation, and is an error there: `Importance`, `AWQ`, `SmoothQuant`.
    GPTQ keeps its gain.

    Attributes:
        block: length of the blocks, which divides the number of channels K; None for the largest
            such length up to 128 that `hadamard` knows: 128 for 384 and 1536, 96 for 576.
        seed: of the signs, which depend on nothing but it and K.

    Raises:
        ValueError: block is not a positive int or None; or, for a matrix, as for `hadamard`, or it
            does not divide K.

    Error: the product is the same up to rounding: relative errors of 1e-6 in float32.
    Source: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 3; in blocks: exllamav3.

    Example:
        >>> w = jnp.array([[8.0, 0.0, 0.0, 0.0]])
        >>> out = jq.methods.Rotation(block=4).transform(w, {}, jq.ArrayConfig(), 1)
        >>> jnp.abs(out.weight).tolist()
        [[4.0, 4.0, 4.0, 4.0]]
    """

    block: int | None = None
    seed: int = 0
    statistics: tuple[type[Statistic], ...] = dataclasses.field(default=(), init=False)

    def __post_init__(self) -> None:
        is_int = isinstance(self.block, int) and not isinstance(self.block, bool)
        if self.block is not None and not (is_int and self.block > 0):
            raise ValueError(f"block must be a positive int or None; got {self.block!r}.")

    def rotation(self, channels: int) -> BlockRotation:
        """The rotation of so many channels."""
        block = _block_of(channels) if self.block is None else self.block
        check_block(block, channels)
        signs = np.random.default_rng([self.seed, channels]).choice([-1, 1], channels)
        return BlockRotation(jnp.asarray(signs, jnp.int8), block)

    def transform(
        self, weight: jax.Array, means: Statistics, config: ArrayConfig, axis: Axes
    ) -> Transformed:
        """The rotated matrix (N, K) and the rotation of its activations."""
        del means, config, axis
        rotation = self.rotation(weight.shape[1])
        return Transformed(rotation.apply(weight, (1,)), rotation=rotation)


def _block_of(channels: int) -> int:
    """The largest block up to 128 that divides the number of channels."""
    sizes = range(min(channels, _LARGEST_BLOCK), 0, -1)
    return next(n for n in sizes if channels % n == 0 and hadamard_factors(n) is not None)


def rotated(means: Statistics, rotation: BlockRotation) -> Statistics:
    """The means of statistics of activations that are rotated: R^T S R.

    Those of single channels are left out: they do not determine the result, and `check_order`
    excludes methods that need them.

    Args:
        means: `finish()` of each statistic, by class.
        rotation: with signs (K,).
    """
    return {
        kind: kind.rotated(mean, rotation)
        for kind, mean in means.items()
        if issubclass(kind, OfPairs)
    }


def check_order(chain: Sequence[Any]) -> None:
    """Checks what follows a rotation in a list of transforms and a method.

    Raises:
        ValueError: it weighs single channels, or is a transform.
    """
    places = [i for i, item in enumerate(chain) if isinstance(item, Rotation)]
    for item in chain[places[0] + 1 :] if places else ():
        of_channels = [kind.__name__ for kind in item.statistics if not issubclass(kind, OfPairs)]
        if of_channels:
            raise ValueError(
                f"{item!r} weighs channels by their {', '.join(of_channels)}, which is almost the "
                f"same for all channels after {chain[places[0]]!r} and so changes nothing. Use one "
                "of them, or the rotation with GPTQ."
            )
        if is_transform(item):
            raise ValueError(
                "A rotation must be the last transform, because activations are multiplied first "
                f"and rotated then; got {item!r} after {chain[places[0]]!r}. Swap them."
            )
