"""Markers: records that an operation leaves in a traced program.

A record is a parameter of a primitive that returns its first operand and lowers to nothing. It
costs nothing at run time, and every transformation of the program transforms it as well.
"""

from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Stored = jax.Array | np.ndarray


def mark(out: jax.Array, lhs: Stored, rhs: Stored, record: Any) -> jax.Array:
    """`out`, with a record of the operation that computed it.

    `lhs` and `rhs` are arrays of its two operands: where `vmap` adds an axis to one of the three,
    the copies are counted.
    """
    return marker_p.bind(out, lhs, rhs, record=record, copies=(1, 1, 1))


# Parameters: the record, and the copies of the result, of lhs and of rhs that `vmap` made.
marker_p = Primitive("quantized_product")


@marker_p.def_abstract_eval
def _(out, lhs, rhs, **parameters):
    return out


@marker_p.def_impl
def _(out, lhs, rhs, **parameters):
    return out


def _batch(args, axes, record, copies):
    is_batched = [axis is not None for axis in axes]
    length = args[0].shape[axes[0]]
    copies = tuple(n * length if b else n for n, b in zip(copies, is_batched, strict=True))
    return marker_p.bind(*args, record=record, copies=copies), axes[0]


batching.primitive_batchers[marker_p] = _batch
# Linear in the result, and constant in the operands.
ad.primitive_transposes[marker_p] = lambda ct, *operands, **parameters: [ct, None, None]
mlir.register_lowering(marker_p, lambda ctx, out, lhs, rhs, **parameters: [out])
