"""Unsigned codes of 2 to 8 bits as a dense stream of bits.

Code i takes bits [i * bits, (i + 1) * bits) of little-endian words along an axis. In uint8 and with
4 bits this is "the even element in the low nibble".
"""

import jax.numpy as jnp
import numpy as np


def unpack(words: np.ndarray, bits: int, axis: int = -1) -> np.ndarray:
    """Codes, uint8, of a dense stream along an axis: as many as the words hold.

    Example:
        >>> unpack(np.array([0x21, 0x43], np.uint8), 4).tolist()
        [1, 2, 3, 4]
    """
    data = np.ascontiguousarray(np.moveaxis(words, axis, -1)).view(np.uint8)
    count = data.shape[-1] * 8 // bits
    # Eight codes take exactly `bits` bytes.
    if missing := -data.shape[-1] % bits:
        data = np.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, missing)])
    octets = data.reshape(*data.shape[:-1], data.shape[-1] // bits, bits)
    codes = np.empty((*data.shape[:-1], data.shape[-1] // bits, 8), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        codes[..., i] = octets[..., byte] >> shift
        if shift + bits > 8:
            codes[..., i] |= octets[..., byte + 1] << (8 - shift)
    codes &= (1 << bits) - 1
    codes = codes.reshape(*data.shape[:-1], data.shape[-1] // bits * 8)
    return np.moveaxis(codes[..., :count], -1, axis)


def pack(codes: np.ndarray, bits: int, dtype: type, axis: int = -1) -> np.ndarray:
    """Words of a dtype that hold the codes as a dense stream along an axis, padded with zeros.

    Example:
        >>> pack(np.array([1, 2, 3, 4]), 4, np.uint8).tolist()
        [33, 67]
    """
    rows = np.moveaxis(codes, axis, -1).astype(np.uint8)
    width = np.dtype(dtype).itemsize
    nbytes = words_for(rows.shape[-1], bits, 8 * width) * width
    # Eight codes take exactly `bits` bytes.
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 8)]
    octets = np.pad(rows, padding).reshape(*rows.shape[:-1], -(-rows.shape[-1] // 8), 8)
    data = np.zeros((*octets.shape[:-1], bits), np.uint8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        data[..., byte] |= octets[..., i] << shift
        if shift + bits > 8:
            data[..., byte + 1] |= octets[..., i] >> (8 - shift)
    data = data.reshape(*rows.shape[:-1], octets.shape[-2] * bits)[..., :nbytes]
    data = np.pad(data, [(0, 0)] * (rows.ndim - 1) + [(0, nbytes - data.shape[-1])])
    return np.moveaxis(np.ascontiguousarray(data).view(dtype), -1, axis)


def words_for(count: int, bits: int, width: int = 32) -> int:
    """How many words of `width` bits a dense stream of `count` codes takes."""
    return -(-count * bits // width)


def from_bits(codes: np.ndarray, bits: int, dtype: np.dtype) -> np.ndarray:
    """Bit patterns in the low bits of bytes, as elements of a dtype of at most 8 bits."""
    if not jnp.issubdtype(dtype, jnp.signedinteger):
        is_integer = jnp.issubdtype(dtype, jnp.integer)
        return codes.astype(dtype) if is_integer else codes.view(dtype)
    sign = 2 ** (bits - 1)
    return ((codes ^ sign).astype(np.int8) - sign).astype(dtype)
