"""Arrays of any dtype in arrays of a dtype that Keras variables and HDF5 files can have.

Integers of at least one byte, and float16, float32 and float64, are stored as they are; other
floating-point dtypes as integers of the same bits. Elements smaller than a byte are packed along
the last axis, the first element in the lowest bits.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import QTensor, bits_of, pack_int2, pack_int4, unpack_int2

_CARRIED = ("int8", "uint8", "float16", "float32", "float64")
_PACK = {4: pack_int4, 2: pack_int2}


def logical(like: QTensor) -> QTensor:
    """Shapes and dtypes with the axes in logical order."""
    return jax.eval_shape(lambda q: q.reorder(None), like)


def carriers(like: QTensor) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays that carry the leaves of a QTensor, the codes first."""
    return jax.eval_shape(to_carriers, like)


@jax.jit
def to_carriers(q: QTensor) -> list[jax.Array]:
    """Carries the leaves of a QTensor, the codes first."""
    return [to_carrier(x) for x in jax.tree.leaves(q)]


def from_carriers(carried: Sequence[jax.Array | np.ndarray], like: QTensor) -> QTensor:
    """Undoes `to_carriers`, given the shapes and dtypes of what was carried."""
    leaves, treedef = jax.tree.flatten(like)
    types = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return jax.tree.unflatten(treedef, _from_carriers(tuple(carried), types))


@partial(jax.jit, static_argnames="types")
def _from_carriers(carried, types):
    return [from_carrier(x, like) for x, like in zip(carried, types, strict=True)]


def to_carrier(x: jax.Array) -> jax.Array:
    """Carries x, bit by bit."""
    if x.dtype.name in _CARRIED:
        return x
    bits = bits_of(x.dtype)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        x = lax.bitcast_convert_type(x, f"uint{bits}")
    return x if bits >= 8 else _PACK[bits](x, axis=-1)


def from_carrier(carried: jax.Array, like: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Undoes `to_carrier`, given the shape and dtype of what was carried."""
    if carried.dtype == like.dtype:
        return carried
    bits = bits_of(like.dtype)
    if bits >= 8:
        return lax.bitcast_convert_type(carried, like.dtype)
    # A bitcast leaves 4-bit codes packed, where shifts would write a byte for each.
    whole = _unpack_int4(carried, like) if bits == 4 else _unpack_int2(carried, like)
    return lax.slice_in_dim(whole, 0, like.shape[-1], axis=-1)


def _unpack_int4(carried, like):
    # XLA on CPU (jaxlib 0.10.2) folds this bitcast of a constant, such as a weight that a jitted
    # function closes over, to wrong codes; it folds nothing behind a barrier.
    pairs = lax.bitcast_convert_type(lax.optimization_barrier(carried), like.dtype)
    return pairs.reshape(*carried.shape[:-1], 2 * carried.shape[-1])


def _unpack_int2(carried, like):
    return unpack_int2(carried, like.shape[-1], axis=-1).astype(like.dtype)
