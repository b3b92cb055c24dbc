"""Rotations of contracted channels, block by block."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .hadamard import hadamard, hadamard_factors

# Larger blocks are rotated in two steps, so that programs do not hold large matrices.
_LARGEST_FACTOR = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockRotation:
    """An orthogonal matrix R (K, K) with equal blocks on its diagonal but for signs. A pytree.

        x R: each run of g = `block` channels becomes (signs * run) H_g / sqrt(g)

    H_g is `jaxquant.methods.hadamard(g)`. A product keeps its value if both operands are rotated:
    (x R) (W R)^T = x W^T. Rotated channels are alike: each is a sum of g channels, so that
    outliers spread over their block.

    Attributes:
        signs: 1 or -1 for each contracted channel, int8, in the shape of the contracted axes of a
            QTensor, which are flattened in their order.
        block: g, the length of the blocks, which divides the number of channels. Static.

    Source: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 3; Tseng et al. 2024 (QuIP#),
        arXiv:2402.04396, section 3.

    Example:
        >>> rotation = jq.BlockRotation(jnp.ones(4, jnp.int8), block=2)
        >>> rotation.apply(jnp.array([2.0, 0.0, 3.0, 3.0]), (0,)).round(3).tolist()
        [1.4140000343322754, 1.4140000343322754, 4.243000030517578, 0.0]
    """

    signs: jax.Array
    block: int = dataclasses.field(metadata={"static": True})

    def apply(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """x R along some axes of x, which are flattened in the given order.

        Matrices have float32, or float64 for x in float64, and so have sums; the result has the
        dtype of x.

        Raises:
            ValueError: the axes do not have the shape of `signs`; or as for `check_block`.
        """
        moved, signs = self._moved(x, axes)
        rotated = _rotate_blocks((moved * signs).reshape(-1, self.block), hadamard)
        return _back(rotated, x, axes)

    def undo(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """x R^T, the inverse of `apply`.

        Raises:
            ValueError: as for `apply`.
        """
        moved, signs = self._moved(x, axes)
        turned = _rotate_blocks(moved.reshape(-1, self.block), lambda n: hadamard(n).T)
        return _back(turned.reshape(moved.shape) * signs, x, axes)

    def _moved(self, x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """x in the dtype of the sums with `axes` last, and the signs with the rank of x."""
        lengths = tuple(x.shape[a] for a in axes)
        if self.signs.shape != lengths:
            raise ValueError(
                f"The signs of a rotation must have the shape of the contracted axes, {lengths}; "
                f"got {self.signs.shape} for axes {tuple(axes)} of an array of shape {x.shape}."
            )
        check_block(self.block, math.prod(lengths))
        dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        moved = jnp.moveaxis(x, axes, range(x.ndim - len(lengths), x.ndim)).astype(dtype)
        return moved, jnp.expand_dims(self.signs.astype(dtype), range(x.ndim - len(lengths)))

    def matrix(self) -> np.ndarray:
        """R as a (K, K) float64 array."""
        signs = np.asarray(self.signs, np.float64).ravel()
        check_block(self.block, signs.size)
        block = hadamard(self.block) / math.sqrt(self.block)
        return signs[:, None] * np.kron(np.eye(signs.size // self.block), block)


def check_block(block: int, channels: int) -> None:
    """Checks the length of the blocks of a rotation of so many channels.

    Raises:
        ValueError: it does not divide the number of channels, or `hadamard` does not know it.
    """
    if not (isinstance(block, int) and block > 0 and channels % block == 0):
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        known = [str(n) for n in divisors if hadamard_factors(n)]
        raise ValueError(
            f"block must divide the number of channels, {channels}; got {block!r}. Choose one of "
            f"{', '.join(known[-8:])}."
        )
    hadamard(block)


def _back(moved: jax.Array, x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """An array whose last axes are `axes` of x, in the shape and dtype of x."""
    last = range(x.ndim - len(axes), x.ndim)
    shape = jax.eval_shape(lambda x: jnp.moveaxis(x, axes, last), x).shape
    return jnp.moveaxis(moved.reshape(shape).astype(x.dtype), last, axes)


def _rotate_blocks(x: jax.Array, matrix: Callable[[int], np.ndarray]) -> jax.Array:
    """Rows (rows, g) times H_g / sqrt(g), or its transpose, from Hadamard matrices."""
    size = x.shape[-1]
    factors = hadamard_factors(size)
    assert factors is not None, "the caller has checked the block"
    inner = size if size <= _LARGEST_FACTOR else min(2 ** factors[1], _LARGEST_FACTOR)
    outer = size // inner

    def factor(n: int) -> np.ndarray:
        return (matrix(n) / math.sqrt(n)).astype(x.dtype)

    # H_g = H_outer kron H_inner.
    highest = jax.lax.Precision.HIGHEST
    x = jnp.matmul(x.reshape(-1, outer, inner), factor(inner), precision=highest)
    if outer > 1:
        x = jnp.einsum("rab,ac->rcb", x, factor(outer), precision=highest)
    return x.reshape(-1, size)
