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

from ...core import (
    QTensor,
    bits_of,
    bits_to_float,
    bytes_to_pairs,
    float_to_bits,
    pack_int2,
    pack_int4,
    unpack_int2,
)

_STORABLE = ("int8", "uint8", "float16", "float32", "float64")
_PACK = {4: pack_int4, 2: pack_int2}


def in_logical_order(like: QTensor) -> QTensor:
    """Shapes and dtypes with the axes in logical order."""
    return jax.eval_shape(lambda q: q.reorder(None), like)


def storage_types(like: QTensor) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays that store the leaves of a QTensor, the codes first."""
    return jax.eval_shape(to_storage_arrays, like)


def to_storage_arrays(q: QTensor) -> list[Any]:
    """The arrays that store the leaves of a QTensor, the codes first. NumPy stays NumPy."""
    if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(q)):
        return [_on_host(x) for x in jax.tree.leaves(q)]
    return _to_storage_arrays(q)


@jax.jit
def _to_storage_arrays(q):
    return [to_storage_array(x) for x in jax.tree.leaves(q)]


def from_storage_arrays(stored: Sequence[jax.Array | np.ndarray], like: QTensor) -> QTensor:
    """Undoes `to_storage_arrays`, given the shapes and dtypes of what was stored."""
    leaves, treedef = jax.tree.flatten(like)
    if all(isinstance(x, np.ndarray) for x in stored):
        found = [_from_host(x, leaf) for x, leaf in zip(stored, leaves, strict=True)]
        return jax.tree.unflatten(treedef, found)
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
    x = float_to_bits(x)
    return x if bits >= 8 else _PACK[bits](x, axis=-1)


def _on_host(x: np.ndarray) -> np.ndarray:
    """`to_storage_array` without a program for the shape."""
    bits, is_integer = bits_of(x.dtype), jnp.issubdtype(x.dtype, jnp.integer)
    if x.dtype.name in _STORABLE or (is_integer and bits >= 8):
        return x
    if bits >= 8:
        return x.view(f"uint{bits}")
    count = 8 // bits
    padded = np.pad(x.view(np.uint8), [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % count)])
    parts = padded.reshape(*x.shape[:-1], padded.shape[-1] // count, count) & (2**bits - 1)
    packed = np.bitwise_or.reduce(parts << (bits * np.arange(count, dtype=np.uint8)), -1)
    is_signed = is_integer and jnp.iinfo(x.dtype).min < 0
    return packed.view(np.int8) if is_signed else packed


def _from_host(stored: Any, like: Any) -> np.ndarray:
    """Undoes `_on_host`."""
    bits = bits_of(like.dtype)
    if stored.dtype == like.dtype or bits >= 8:
        return stored.view(like.dtype)
    shifts = bits * np.arange(8 // bits, dtype=np.uint8)
    parts = (stored.view(np.uint8)[..., None] >> shifts) & (2**bits - 1)
    if jnp.issubdtype(like.dtype, jnp.integer) and jnp.iinfo(like.dtype).min < 0:
        sign = 1 << (bits - 1)
        parts = (parts ^ sign) - sign
    whole = parts.astype(np.uint8).reshape(*stored.shape[:-1], stored.shape[-1] * len(shifts))
    return np.ascontiguousarray(whole[..., : like.shape[-1]]).view(like.dtype)


def from_storage_array(stored: jax.Array, like: Any) -> jax.Array:
    """Undoes `to_storage_array`, given the shape and dtype of what was stored."""
    if stored.dtype == like.dtype:
        return stored
    bits = bits_of(like.dtype)
    if bits >= 8:
        return bits_to_float(stored, like.dtype)
    whole = bytes_to_pairs(stored, like.dtype) if bits == 4 else _unpack_int2(stored, like)
    return lax.slice_in_dim(whole, 0, like.shape[-1], axis=-1)


def _unpack_int2(stored: jax.Array, like: Any) -> jax.Array:
    return unpack_int2(stored, like.shape[-1], axis=-1).astype(like.dtype)
