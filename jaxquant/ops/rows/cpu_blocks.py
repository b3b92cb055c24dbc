"""The row that multiplies by blocks of weights, for XLA on CPU.

XLA on CPU writes a whole float matrix to memory before the product: 4096 x 4096 int8 by one row of
float32 takes 24 ms in one piece and 2.1 ms in blocks of 256 columns (64: 4.2, 128: 3.1), whose
float weights stay in the cache. From 256 rows on both take the same time.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import QTensor
from ...jaxprs import is_sharded, unless_partitioned
from ..dispatch import Implementation, Table
from ..dot_spec import DotSpec
from ..operands import Operand, as_array
from . import dequantize, integer
from .kernel import kernel_or_xla

_BLOCK = 256
_MOST_ROWS = 128


def row(fallback: Table) -> Implementation:
    """The row "blocks", with rows for programs that XLA partitions: it cannot partition blocks."""
    blocks = partial(
        kernel_or_xla, kernel=run, where=unless_partitioned, fallback=fallback, platform="cpu"
    )
    return Implementation(
        "blocks",
        blocks,
        why_unsupported,
        ("cpu",),
        is_integer=integer.is_supported,
        adds_offsets=True,
        fallback=fallback,
    )


def run(lhs: Any, rhs: QTensor, spec: DotSpec) -> jax.Array:
    """Multiplies by one block of weights after another."""
    if integer.is_supported(lhs, rhs, spec):
        multiply = partial(integer.run, lhs, spec=spec)
    else:
        # Dequantized once, not once per block.
        multiply = partial(dequantize.run, as_array(lhs), spec=spec)
    columns = rhs.codes.shape[0]
    # The last block overlaps the one before it where 256 does not divide.
    starts = np.minimum(np.arange(0, columns, _BLOCK), columns - _BLOCK)

    def one_block(_: None, start: jax.Array) -> tuple[None, jax.Array]:
        return None, multiply(_rows(rhs, start))

    _, out = lax.scan(one_block, None, jnp.asarray(starts))
    out = jnp.moveaxis(out, 0, -2)
    whole, rest = divmod(columns, _BLOCK)
    done = out[..., :whole, :].reshape(*out.shape[:-2], whole * _BLOCK)
    return jnp.concatenate([done, out[..., -1, _BLOCK - rest :]], -1) if rest else done


def why_unsupported(lhs: Operand, rhs: Operand, spec: DotSpec) -> str | None:
    """Why these are not few rows times a large weight stored with its free axis first, or None."""
    if not isinstance(rhs, QTensor):
        return "the right operand is not quantized"
    if spec.batch[1] or spec.free(rhs, 1) != [0]:
        return "the right operand is not stored with one free axis, first"
    if spec.out_sharding is not None or is_sharded(rhs.codes):
        return "blocks cannot be cut from sharded arrays"
    columns = rhs.codes.shape[0]
    if columns < 2 * _BLOCK:
        return f"fewer than {2 * _BLOCK} columns"
    leaves = jax.tree.leaves(dataclasses.replace(rhs, inputs=None))
    counts = {x.shape[0] for x in leaves} - {1}
    if any(_BLOCK % (columns // n) for n in counts):
        return f"blocks of scales do not divide {_BLOCK}"
    if (spec.rows(lhs, rhs) or 0) > _MOST_ROWS:
        return f"more than {_MOST_ROWS} rows"
    is_fast = integer.is_of_8_bits(lhs, rhs, spec)
    return "products of 8-bit codes need no blocks" if is_fast else None


def _rows(q: QTensor, start: jax.Array) -> QTensor:
    """`_BLOCK` rows of codes, and of scales and zero points that vary along the first axis."""
    columns = q.codes.shape[0]

    def slice_rows(x: jax.Array) -> jax.Array:
        if x.shape[0] == 1:
            return x
        block = columns // x.shape[0]
        return lax.dynamic_slice_in_dim(x, start // block, _BLOCK // block)

    return jax.tree.map(slice_rows, dataclasses.replace(q, inputs=None))
