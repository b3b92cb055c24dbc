"""Packing of 2-bit and 4-bit codes into bytes, for files, Keras variables and native kernels.

Elsewhere in the library these codes have XLA's int2 and int4 dtypes and need no packing;
`concatenate_codes` joins arrays of them. `float_to_bits` is for narrow floats.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from .formats import bits_of


def float_to_bits(x: jax.Array) -> jax.Array:
    """The bits of floats narrower than 32 bits as unsigned integers; other arrays as they are."""
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    bits = bits_of(x.dtype) if is_float else 32
    return jax.lax.bitcast_convert_type(x, f"uint{bits}") if bits < 32 else x


def bits_to_float(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Inverse of `float_to_bits`, for the dtype that the array had."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def bytes_to_pairs(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The 4-bit elements that bytes hold two by two along the last axis, the low half first.

    A bitcast keeps them packed, whereas shifts would write one byte per element.
    """
    # XLA on CPU (jaxlib 0.10.2) folds this bitcast of a constant, such as a weight that a jitted
    # function closes over, to wrong codes. A barrier prevents the folding.
    pairs = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(x), dtype)
    return pairs.reshape(*x.shape[:-1], 2 * x.shape[-1])


@partial(jax.jit, static_argnames="axis")
def pack_int4(codes: jax.Array, axis: int = 0) -> jax.Array:
    """Packs two 4-bit codes per byte: code 2i in the low nibble, code 2i+1 in the high nibble.

    Byte-compatible with `keras.quantizers.pack_int4` (Keras 3.15).

    Args:
        codes: integers: int4 or int8 in [-8, 7], or uint4 or uint8 in [0, 15].
        axis: axis to pack along, of length n. An odd n is padded with one zero.

    Returns:
        int8 for signed codes, uint8 for unsigned ones, with length ceil(n/2) along axis.

    Raises:
        ValueError: codes have another dtype, or axis is out of range.

    Example:
        >>> jq.pack_int4(jnp.array([1, 2, 3], jnp.int8)).tolist()
        [33, 3]
    """
    return _pack(codes, axis, bits=4)


@partial(jax.jit, static_argnames=("length", "axis"))
def unpack_int4(packed: jax.Array, length: int, axis: int = 0) -> jax.Array:
    """Inverse of `pack_int4`: codes in [-8, 7] from int8 bytes, in [0, 15] from uint8 bytes.

    Args:
        packed: int8 or uint8 bytes.
        length: number n of codes along axis; `packed` has length ceil(n/2) there.
        axis: axis that was packed.

    Returns:
        Codes in the dtype of packed, with length n along axis.

    Raises:
        ValueError: packed has another dtype, axis is out of range, or length does not match.

    Example:
        >>> jq.unpack_int4(jnp.array([33, 3], jnp.int8), length=3).tolist()
        [1, 2, 3]
    """
    return _unpack(packed, length, axis, bits=4)


@partial(jax.jit, static_argnames="axis")
def pack_int2(codes: jax.Array, axis: int = 0) -> jax.Array:
    """Packs four 2-bit codes per byte, the first in the lowest bits.

    Args:
        codes: integers: int2 or int8 in [-2, 1], or uint2 or uint8 in [0, 3].
        axis: axis to pack along, of length n. It is padded with zeros to a multiple of four.

    Returns:
        int8 for signed codes, uint8 for unsigned ones, with length ceil(n/4) along axis.

    Raises:
        ValueError: codes have another dtype, or axis is out of range.

    Example:
        >>> jq.pack_int2(jnp.array([1, 0, -1, -2, 1], jnp.int8)).tolist()
        [-79, 1]
    """
    return _pack(codes, axis, bits=2)


@partial(jax.jit, static_argnames=("length", "axis"))
def unpack_int2(packed: jax.Array, length: int, axis: int = 0) -> jax.Array:
    """Inverse of `pack_int2`: codes in [-2, 1] from int8 bytes, in [0, 3] from uint8 bytes.

    Args:
        packed: int8 or uint8 bytes.
        length: number n of codes along axis; `packed` has length ceil(n/4) there.
        axis: axis that was packed.

    Returns:
        Codes in the dtype of packed, with length n along axis.

    Raises:
        ValueError: packed has another dtype, axis is out of range, or length does not match.

    Example:
        >>> jq.unpack_int2(jnp.array([-79, 1], jnp.int8), length=5).tolist()
        [1, 0, -1, -2, 1]
    """
    return _unpack(packed, length, axis, bits=2)


def concatenate_codes(arrays: Sequence[jax.Array], axis: int = 0) -> jax.Array:
    """`jnp.concatenate` for codes of any number of bits.

    jaxlib 0.10 to 0.12 ends the process when it compiles the concatenation of many 2-bit arrays
    for a CPU, so these are joined in 8 bits.
    """
    dtype = arrays[0].dtype
    if dtype not in (jnp.int2, jnp.uint2):
        return jnp.concatenate(arrays, axis)
    return jnp.concatenate([x.astype(jnp.int8) for x in arrays], axis).astype(dtype)


def _pack(codes: jax.Array, axis: int, bits: int) -> jax.Array:
    axis, per_byte = _check(codes, axis, bits), 8 // bits
    padded = _pad(codes, axis, per_byte)
    shape = padded.shape
    rows = padded.reshape(*shape[:axis], shape[axis] // per_byte, per_byte, *shape[axis + 1 :])
    parts = [jax.lax.index_in_dim(rows, i, axis + 1, keepdims=False) for i in range(per_byte)]
    return _join(parts, bits).astype(_byte_dtype(codes))


def _unpack(packed: jax.Array, length: int, axis: int, bits: int) -> jax.Array:
    axis = _check_packed(packed, length, axis, bits)
    parts = jnp.stack(_fields(packed, bits), axis + 1)
    shape = packed.shape
    whole = parts.reshape(*shape[:axis], shape[axis] * 8 // bits, *shape[axis + 1 :])
    return jax.lax.slice_in_dim(whole, 0, length, axis=axis)


def _pad(codes: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Pads with zeros and casts to int32, because shifts of int8 may overflow on a TPU."""
    widths = [(0, 0)] * codes.ndim
    widths[axis] = (0, -codes.shape[axis] % multiple)
    return jnp.pad(codes.astype(jnp.int32), widths)


def _join(parts, bits):
    joined = jnp.zeros(parts[0].shape, jnp.int32)
    for i, part in enumerate(parts):
        joined |= (part & (2**bits - 1)) << (i * bits)
    return joined.astype(jnp.uint8)


def _fields(packed: jax.Array, bits: int) -> list[jax.Array]:
    """The fields of each byte, lowest first, sign-extended if the bytes are signed."""
    # Shifting left and right again extends the sign of int8 and fills uint8 with zeros.
    top = 8 - bits
    wide = packed.astype(jnp.int32 if packed.dtype == jnp.int8 else jnp.uint32)
    fields = [(wide << (24 + top - i)) >> (24 + top) for i in range(0, 8, bits)]
    return [f.astype(packed.dtype) for f in fields]


def _byte_dtype(codes):
    return jnp.int8 if jnp.issubdtype(codes.dtype, jnp.signedinteger) else jnp.uint8


def _check(codes: jax.Array, axis: int, bits: int) -> int:
    names = [f"{sign}{width}" for sign in ("int", "uint") for width in (bits, 8)]
    if codes.dtype.name not in names:
        raise ValueError(
            f"codes must be of dtype {', '.join(names)}; got {codes.dtype}. Cast them first."
        )
    return _axis_from_zero(axis, codes)


def _check_packed(packed: jax.Array, length: int, axis: int, bits: int) -> int:
    if packed.dtype not in (jnp.int8, jnp.uint8):
        raise ValueError(f"packed must be bytes, int8 or uint8; got {packed.dtype}.")
    axis = _axis_from_zero(axis, packed)
    if -(-length * bits // 8) != packed.shape[axis]:
        raise ValueError(
            f"length must fit the {packed.shape[axis]} bytes along axis {axis}; got {length} "
            f"codes of {bits} bits. Pass the length that the axis had before packing."
        )
    return axis


def _axis_from_zero(axis: int, x: jax.Array) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis must be an axis of shape {x.shape}; got {axis}.")
    return axis % x.ndim
