"""Packed codes equal what a packer in NumPy put in, whole and in slices."""

import numpy as np
import pytest

from jaxquant.checkpoints import Source
from jaxquant.checkpoints.bits import (
    pack,
    unpack,
    unpack_columns,
    unpack_padded,
    unpacked,
)

from .packers import awq_words, bit_stream, padded_words

LAYOUTS = {"dense": (bit_stream, unpack), "padded": (padded_words, unpack_padded)}


def random_codes(bits, shape):
    return np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint32])
@pytest.mark.parametrize("bits", range(2, 9))
def test_unpack_inverts_pack_along_both_axes(bits, dtype):
    codes = random_codes(bits, (3, 53))
    words = bit_stream(codes, bits, dtype)
    np.testing.assert_array_equal(pack(codes, bits, dtype), words, strict=True)
    np.testing.assert_array_equal(pack(codes.T, bits, dtype, 0), words.T, strict=True)
    np.testing.assert_array_equal(unpack(words, bits)[:, :53], codes, strict=True)
    np.testing.assert_array_equal(unpack(words.T, bits, 0)[:53], codes.T, strict=True)


def test_columns_of_awq():
    codes = random_codes(4, (3, 24))
    np.testing.assert_array_equal(unpack_columns(awq_words(codes)), codes, strict=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [3, 4, 5])
def test_slices_read_only_the_words_that_cover_them(bits, axis, layout):
    packer, function = LAYOUTS[layout]
    codes = random_codes(bits, (2, 100))
    words = packer(codes, bits) if layout == "padded" else packer(codes, bits, np.int32)
    words = words if axis else words.T
    asked = []

    def read(index):
        asked.append(index[axis])
        return words[index]

    source = Source(words.shape, words.dtype, read)
    block = None if layout == "dense" else 32 // bits
    got = unpacked(source, bits, 100, axis, function, block)
    whole = codes if axis else codes.T
    for start, stop in [(0, 100), (0, 1), (99, 100), (31, 33), (64, 96), (7, 7), (33, 90)]:
        index = [slice(0, 2), slice(0, 2)]
        index[axis] = slice(start, stop)
        np.testing.assert_array_equal(got.read(index), whole[tuple(index)], strict=True)
        # Reading starts and stops between blocks: 32 codes take `bits` words, or a word is one.
        size, width = (32, bits) if block is None else (block, 1)
        most = width * (-(-(stop - start) // size) + 1)
        assert asked[-1].stop - asked[-1].start <= most
