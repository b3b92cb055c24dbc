"""Unsigned codes of 2 to 8 bits in arrays of words.

Codes lie in a dense stream of bits: code i takes bits [i * bits, (i + 1) * bits) of the
little-endian words along an axis. In uint8 this is "the even element in the low nibble".
"""

from collections.abc import Callable

import numpy as np

from .source import Index, Source

# From words, bits and axis to codes.
Layout = Callable[[np.ndarray, int, int], np.ndarray]

# Order of the nibbles of a word in files of AutoAWQ, for each column.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


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


def unpack_padded(words: np.ndarray, bits: int, axis: int = -1) -> np.ndarray:
    """Codes, uint8, where each 32-bit word holds floor(32 / bits), lowest bits first."""
    rows = np.moveaxis(words, axis, -1).astype(np.uint32)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = ((rows[..., None] >> shifts) & np.uint32((1 << bits) - 1)).astype(np.uint8)
    codes = codes.reshape(*rows.shape[:-1], rows.shape[-1] * len(shifts))
    return np.moveaxis(codes, -1, axis)


def unpack_columns(words: np.ndarray, order: tuple[int, ...] = AWQ_ORDER) -> np.ndarray:
    """Nibbles, uint8, of words that hold eight columns each in a permuted order."""
    nibbles = unpack(words, 4)
    return nibbles.reshape(*words.shape, len(order))[..., list(order)].reshape(nibbles.shape)


def words_for(count: int, bits: int, width: int = 32) -> int:
    """How many words of `width` bits a dense stream of `count` codes takes."""
    return -(-count * bits // width)


def unpacked(
    words: Source,
    bits: int,
    count: int,
    axis: int,
    layout: Layout = unpack,
    block: int | None = None,
) -> Source:
    """The codes, uint8, that packed words hold along an axis.

    Args:
        words: integers in a file.
        bits: per code.
        count: codes along the axis, at most as many as the words hold.
        axis: that is packed.
        layout: `unpack`, or another function from words to codes.
        block: codes that take up an integral number of words, hence where reading may start;
            None for those of a dense stream.
    """
    axis %= words.ndim
    width = 8 * words.dtype.itemsize
    # In a dense stream, `width` codes take `bits` words.
    block, per_block = (width, bits) if block is None else (block, 1)
    shape = (*words.shape[:axis], count, *words.shape[axis + 1 :])

    def reader(index: Index) -> np.ndarray:
        start, stop = index[axis].start, index[axis].stop
        first, last = start // block, -(-stop // block)
        inside = slice(first * per_block, min(last * per_block, words.shape[axis]))
        part = words.read((*index[:axis], inside, *index[axis + 1 :]))
        codes = layout(part, bits, axis)
        chosen = slice(start - first * block, stop - first * block)
        return np.ascontiguousarray(codes[(slice(None),) * axis + (chosen,)])

    return Source(shape, np.dtype(np.uint8), reader)
