"""Writers of other people's formats in NumPy, one element at a time, from their specifications."""

import numpy as np


def bit_stream(codes, bits, dtype):
    """Rows of codes as words, code i in bits [i * bits, (i + 1) * bits), lowest bits first."""
    width = 8 * np.dtype(dtype).itemsize
    words = []
    for row in np.asarray(codes):
        number = sum(int(code) << (i * bits) for i, code in enumerate(row))
        count = -(-len(row) * bits // width)
        words += [[(number >> (width * i)) & ((1 << width) - 1) for i in range(count)]]
    return np.array(words, np.dtype(f"uint{width}")).view(dtype)


def padded_words(codes, bits):
    """As `bit_stream`, but no code is split between two words."""
    per_word = 32 // bits
    rows = [
        [
            sum(int(c) << (bits * j) for j, c in enumerate(row[i : i + per_word]))
            for i in range(0, len(row), per_word)
        ]
        for row in np.asarray(codes)
    ]
    return np.array(rows, np.uint32).view(np.int32)


def awq_words(codes):
    """Rows of 4-bit codes as AutoAWQ packs them: nibble i of a word is column order[i]."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    rows = [
        [
            sum(int(row[j + column]) << (4 * i) for i, column in enumerate(order))
            for j in range(0, len(row), 8)
        ]
        for row in np.asarray(codes)
    ]
    return np.array(rows, np.uint32).view(np.int32)
