"""Unsigned codes of 2 to 8 bits in arrays of words, as files of other programs pack them."""

from collections.abc import Callable

import numpy as np

from ..tree.internal import pack as pack
from ..tree.internal import unpack as unpack
from ..tree.internal import words_for as words_for
from .source import Index, Source

# From words, bits and axis to codes.
Layout = Callable[[np.ndarray, int, int], np.ndarray]

# Order of the nibbles of a word in files of AutoAWQ, for each column.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


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
