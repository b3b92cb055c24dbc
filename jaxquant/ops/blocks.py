"""Products by blocks of weights, for XLA on CPU.

XLA on CPU writes out a whole float matrix before the product: 4096 x 4096 int8 by one row of
float32 takes 24 ms in one piece and 2.1 ms in blocks of 256 columns (64: 4.2, 128: 3.1), whose
float weights stay in the cache; from 256 rows on both take as long.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import QTensor
from .dispatch import Operand

_BLOCK = 256
_MOST_ROWS = 128


def product(
    lhs: Operand, rhs: QTensor, inner: Callable[[Operand, QTensor], jax.Array]
) -> jax.Array:
    """inner(lhs, rhs), block by block of the first axis of the codes, the last of the result."""
    columns = rhs.codes.shape[0]
    # The last block overlaps the one before it where 256 does not divide.
    starts = np.minimum(np.arange(0, columns, _BLOCK), columns - _BLOCK)

    def one_block(_, start):
        return None, inner(lhs, _rows(rhs, start))

    _, out = lax.scan(one_block, None, jnp.asarray(starts))
    out = jnp.moveaxis(out, 0, -2)
    whole, rest = divmod(columns, _BLOCK)
    done = out[..., :whole, :].reshape(*out.shape[:-2], whole * _BLOCK)
    return jnp.concatenate([done, out[..., -1, _BLOCK - rest :]], -1) if rest else done


def refuses(rhs: QTensor, rows: int) -> str | None:
    """Why the weights are not cut into blocks for so many rows of inputs, or None."""
    columns = rhs.codes.shape[0]
    if columns < 2 * _BLOCK:
        return f"fewer than {2 * _BLOCK} columns"
    leaves = jax.tree.leaves(dataclasses.replace(rhs, inputs=None))
    counts = {x.shape[0] for x in leaves} - {1}
    if any(_BLOCK % (columns // n) for n in counts):
        return f"blocks of scales do not divide {_BLOCK}"
    return f"more than {_MOST_ROWS} rows" if rows > _MOST_ROWS else None


def _rows(q, start):
    """`_BLOCK` rows of codes, and of whatever else changes along the first axis."""
    columns = q.codes.shape[0]

    def slice_rows(x):
        if x.shape[0] == 1:
            return x
        block = columns // x.shape[0]
        return lax.dynamic_slice_in_dim(x, start // block, _BLOCK // block)

    return jax.tree.map(slice_rows, dataclasses.replace(q, inputs=None))
