"""Stores arrays of any dtype in dtypes that Keras variables and HDF5 files support.

Integers of at least one byte, and float16, float32 and float64, are stored as they are; other
floating-point dtypes as integers of the same bits. Elements smaller than a byte are packed along
the last axis, the first element in the lowest bits.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import QTensor, bits_of, pack_int2, pack_int4, unpack_int2

_STORABLE = ("int8", "uint8", "float16", "float32", "float64")
_PACK = {4: pack_int4, 2: pack_int2}


def in_logical_order(like: QTensor) -> QTensor:
    """Shapes and dtypes with the axes in logical order."""
    return jax.eval_shape(lambda q: q.reorder(None), like)


def storage_types(like: QTensor) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays that store the leaves of a QTensor, the codes first."""
    return jax.eval_shape(to_storage_arrays, like)


@jax.jit
def to_storage_arrays(q: QTensor) -> list[jax.Array]:
    """The arrays that store the leaves of a QTensor, the codes first."""
    return [to_storage_array(x) for x in jax.tree.leaves(q)]


def from_storage_arrays(stored: Sequence[jax.Array | np.ndarray], like: QTensor) -> QTensor:
    """Undoes `to_storage_arrays`, given the shapes and dtypes of what was stored."""
    leaves, treedef = jax.tree.flatten(like)
    types = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return jax.tree.unflatten(treedef, _from_storage_arrays(tuple(stored), types))


@partial(jax.jit, static_argnames="types")
def _from_storage_arrays(stored, types):
    return [from_storage_array(x, like) for x, like in zip(stored, types, strict=True)]


def to_storage_array(x: jax.Array) -> jax.Array:
    """The array that stores the bits of x."""
    if x.dtype.name in _STORABLE:
        return x
    bits = bits_of(x.dtype)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        x = lax.bitcast_convert_type(x, f"uint{bits}")
    return x if bits >= 8 else _PACK[bits](x, axis=-1)


def from_storage_array(stored: jax.Array, like: Any) -> jax.Array:
    """Undoes `to_storage_array`, given the shape and dtype of what was stored."""
    if stored.dtype == like.dtype:
        return stored
    bits = bits_of(like.dtype)
    if bits >= 8:
        return lax.bitcast_convert_type(stored, like.dtype)
    # A bitcast keeps 4-bit codes packed, whereas shifts would write one byte per code.
    whole = _unpack_int4(stored, like) if bits == 4 else _unpack_int2(stored, like)
    return lax.slice_in_dim(whole, 0, like.shape[-1], axis=-1)


def _unpack_int4(stored: jax.Array, like: Any) -> jax.Array:
    # XLA on CPU (jaxlib 0.10.2) folds this bitcast of a constant, such as a weight that a jitted
    # function closes over, to wrong codes. A barrier prevents the folding.
    pairs = lax.bitcast_convert_type(lax.optimization_barrier(stored), like.dtype)
    return pairs.reshape(*stored.shape[:-1], 2 * stored.shape[-1])


def _unpack_int2(stored: jax.Array, like: Any) -> jax.Array:
    return unpack_int2(stored, like.shape[-1], axis=-1).astype(like.dtype)
