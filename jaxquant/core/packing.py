"""Codes of less than a byte in bytes, for files, Keras variables and kernels that ask for it.

Inside the library 4-bit and 2-bit codes have XLA's own dtypes, and need none of this.
"""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames="axis")
def pack_int4(codes: jax.Array, axis: int = 0) -> jax.Array:
    """Packs 4-bit codes two to a byte: codes 2i in the low, 2i+1 in the high nibble.

    Byte-compatible with `keras.quantizers.pack_int4` (Keras 3.15).

    Args:
        codes: whole numbers, int4 or int8 in [-8, 7], or uint4 or uint8 in [0, 15].
        axis: axis to pack along, of length n; an odd n is padded with a zero.

    Returns:
        int8 for signed codes, uint8 for unsigned; ceil(n/2) in place of n.

    Raises:
        ValueError: codes are not of one of these dtypes, or axis is not there.
    """
    return _pack(codes, axis, bits=4)


@partial(jax.jit, static_argnames=("length", "axis"))
def unpack_int4(packed: jax.Array, length: int, axis: int = 0) -> jax.Array:
    """Undoes `pack_int4`: int8 codes in [-8, 7] from int8 bytes, uint8 in [0, 15] from uint8.

    Args:
        packed: int8 or uint8 bytes.
        length: number n of codes along axis; `packed` has ceil(n/2) there.
        axis: axis that was packed.

    Returns:
        Codes in the dtype of packed, n in place of ceil(n/2).

    Raises:
        ValueError: packed is of another dtype, axis is not there, or length does not fit.
    """
    return _unpack(packed, length, axis, bits=4)


@partial(jax.jit, static_argnames="axis")
def pack_int2(codes: jax.Array, axis: int = 0) -> jax.Array:
    """Packs 2-bit codes four to a byte, the first in the lowest bits.

    Args:
        codes: whole numbers, int2 or int8 in [-2, 1], or uint2 or uint8 in [0, 3].
        axis: axis to pack along, of length n; padded with zeros to a multiple of four.

    Returns:
        int8 for signed codes, uint8 for unsigned; ceil(n/4) in place of n.

    Raises:
        ValueError: codes are not of one of these dtypes, or axis is not there.
    """
    return _pack(codes, axis, bits=2)


@partial(jax.jit, static_argnames=("length", "axis"))
def unpack_int2(packed: jax.Array, length: int, axis: int = 0) -> jax.Array:
    """Undoes `pack_int2`: int8 codes in [-2, 1] from int8 bytes, uint8 in [0, 3] from uint8.

    Args:
        packed: int8 or uint8 bytes.
        length: number n of codes along axis; `packed` has ceil(n/4) there.
        axis: axis that was packed.

    Returns:
        Codes in the dtype of packed, n in place of ceil(n/4).

    Raises:
        ValueError: packed is of another dtype, axis is not there, or length does not fit.
    """
    return _unpack(packed, length, axis, bits=2)


def _pack(codes, axis, bits):
    axis, per_byte = _check(codes, axis, bits), 8 // bits
    padded = _pad(codes, axis, per_byte)
    shape = padded.shape
    rows = padded.reshape(*shape[:axis], shape[axis] // per_byte, per_byte, *shape[axis + 1 :])
    parts = [jax.lax.index_in_dim(rows, i, axis + 1, keepdims=False) for i in range(per_byte)]
    return _join(parts, bits).astype(_byte_dtype(codes))


def _unpack(packed, length, axis, bits):
    axis = _check_packed(packed, length, axis, bits)
    parts = jnp.stack(_fields(packed, bits), axis + 1)
    shape = packed.shape
    whole = parts.reshape(*shape[:axis], shape[axis] * 8 // bits, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(whole, 0, length, axis=axis)


def _pad(codes, axis, multiple):
    """Codes as int32, lengthened with zeros. int32: a shift of int8 may overflow on a TPU."""
    widths = [(0, 0)] * codes.ndim
    widths[axis] = (0, -codes.shape[axis] % multiple)
    return jnp.pad(codes.astype(jnp.int32), widths)


def _join(parts, bits):
    joined = jnp.zeros(parts[0].shape, jnp.int32)
    for i, part in enumerate(parts):
        joined |= (part & (2**bits - 1)) << (i * bits)
    return joined.astype(jnp.uint8)


def _fields(packed, bits):
    """The fields of each byte, lowest first, sign-extended if the bytes are signed."""
    # Shifting up and back down copies the sign bit in int8 and zeros in uint8.
    top = 8 - bits
    wide = packed.astype(jnp.int32 if packed.dtype == jnp.int8 else jnp.uint32)
    fields = [(wide << (24 + top - i)) >> (24 + top) for i in range(0, 8, bits)]
    return [f.astype(packed.dtype) for f in fields]


def _byte_dtype(codes):
    return jnp.int8 if jnp.issubdtype(codes.dtype, jnp.signedinteger) else jnp.uint8


def _check(codes, axis, bits):
    names = [f"{sign}{width}" for sign in ("int", "uint") for width in (bits, 8)]
    if codes.dtype.name not in names:
        raise ValueError(
            f"codes must be of dtype {', '.join(names)}; got {codes.dtype}. Cast them first."
        )
    return _axis_from_zero(axis, codes)


def _check_packed(packed, length, axis, bits):
    if packed.dtype not in (jnp.int8, jnp.uint8):
        raise ValueError(f"packed must be bytes, int8 or uint8; got {packed.dtype}.")
    axis = _axis_from_zero(axis, packed)
    if -(-length * bits // 8) != packed.shape[axis]:
        raise ValueError(
            f"length must fit the {packed.shape[axis]} bytes along axis {axis}; got {length} "
            f"codes of {bits} bits. Pass the length before packing."
        )
    return axis


def _axis_from_zero(axis, x):
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be an axis of shape {x.shape}; got {axis}.")
    return axis % x.ndim
