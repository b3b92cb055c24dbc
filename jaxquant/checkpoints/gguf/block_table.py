"""The types of ggml, one row each.

The layouts are those of ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml. In a
block, `d` is a float16 scale; bytes of a packed array hold the element with the lower index in
their low bits, unless they are split by halves.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ...core import (
    INT2,
    INT3,
    INT4,
    INT5,
    INT6,
    INT8,
    IQ4_NL,
    MXFP4,
    NVFP4,
    UINT2,
    UINT4,
    UINT5,
    UINT6,
    Format,
)
from .block_type import BlockType, Leaf, Nested
from .lattices import LATTICE_TYPES

Field = Callable[[np.ndarray], np.ndarray]
_TWO_BITS = (0, 2, 4, 6)
_SIGN = 0x8000
# 1 - q of fields q = 0..3, which INT2 has under a negated scale; q - 1 = 2 it does not.
_NEGATED = {"flip": 255, "bias": 254}


def _bytes(start: int, stop: int) -> Field:
    return lambda b: b[:, start:stop]


def _codes(format: Format, count: int, field: Field, bias: int = 0, flip: int = 0) -> Leaf:
    return Leaf(count, np.dtype(jnp.dtype(format.dtype)), field, bias, flip)


def _half(start: int, flip: int = 0) -> Leaf:
    """A float16 at a byte of the block."""
    view = lambda b: np.ascontiguousarray(b[:, start : start + 2]).view(np.uint16)  # noqa: E731
    return Leaf(1, np.dtype(np.float16), view, flip=flip)


def _halves(b: np.ndarray) -> np.ndarray:
    """Low nibbles, then high nibbles: (n, ..., B) -> (n, ..., 2 B)."""
    return np.concatenate([b & 15, b >> 4], -1)


def _planes(b: np.ndarray, width: int, shifts: Sequence[int]) -> np.ndarray:
    """For each `width` bytes, the bits above each shift: (n, B) -> (n, B * len(shifts))."""
    parts = b.reshape(len(b), -1, 1, width) >> np.array(shifts, np.uint8)[:, None]
    return parts.reshape(len(b), -1)


# Blocks of 32.


def _q4(start: int) -> Field:
    return lambda b: _halves(b[:, start:])


def _q5(start: int) -> Field:
    """Bit 4 of element j is bit j of the four bytes at `start`; nibbles follow."""

    def field(b):
        high = np.unpackbits(b[:, start : start + 4], axis=-1, bitorder="little")
        return _halves(b[:, start + 4 :]) | (high << 4)

    return field


# Super-blocks of 256.


def _q2_k(b: np.ndarray) -> np.ndarray:
    return _planes(b[:, 16:80], 32, _TWO_BITS) & 3


def _q3_k(b: np.ndarray) -> np.ndarray:
    high = _planes(b[:, :32], 32, range(8)) & 1
    return _planes(b[:, 32:96], 32, _TWO_BITS) & 3 | (high << 2)


def _q3_k_scale(b: np.ndarray) -> np.ndarray:
    return _halves(b[:, 96:104]) | ((_planes(b[:, 104:108], 4, _TWO_BITS) & 3) << 4)


def _k_scale(b: np.ndarray) -> np.ndarray:
    """The 8 scales of 6 bits in bytes 4 to 15 of Q4_K and Q5_K."""
    scale, _, mixed = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    return np.concatenate([scale & 63, (mixed & 15) | ((scale >> 2) & 0x30)], -1)


def _k_least(b: np.ndarray) -> np.ndarray:
    """The 8 minima of 6 bits in bytes 4 to 15 of Q4_K and Q5_K."""
    _, least, mixed = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    return np.concatenate([least & 63, (mixed >> 4) | ((least >> 2) & 0x30)], -1)


def _runs(b: np.ndarray, width: int) -> np.ndarray:
    """Nibbles split by halves within each `width` bytes."""
    return _halves(b.reshape(len(b), -1, width)).reshape(len(b), -1)


def _q4_k(b: np.ndarray) -> np.ndarray:
    return _runs(b[:, 16:], 32)


def _q5_k(b: np.ndarray) -> np.ndarray:
    return _runs(b[:, 48:], 32) | ((_planes(b[:, 16:48], 32, range(8)) & 1) << 4)


def _q6_k(b: np.ndarray) -> np.ndarray:
    low = _planes(b[:, :128], 64, (0, 4)) & 15
    return low | ((_planes(b[:, 128:192], 32, _TWO_BITS) & 3) << 4)


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    return _runs(b[:, 8:], 16)


def _iq4_xs_scale(b: np.ndarray) -> np.ndarray:
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], -1).reshape(len(b), 8)
    # Two bits per scale, from the low bits of the first byte up.
    high = (b[:, 2:4, None] >> np.array(_TWO_BITS, np.uint8)) & 3
    return low | (high.reshape(len(b), 8) << 4)


# Ternary and binary types, and 4-bit floats.


def _tq1_0(b: np.ndarray) -> np.ndarray:
    """Digits in base 3, of which a byte holds 5, or 4 in the last 4 bytes."""
    parts = (b[:, :32], 5), (b[:, 32:48], 5), (b[:, 48:52], 4)
    return np.concatenate([_digits(bytes, count) for bytes, count in parts], -1)


def _digits(b, count):
    """All first digits, then all second digits, and so on. A byte is a fraction of 256."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]
    fractions = (b[:, None, :] * powers).astype(np.uint16)
    return ((fractions * 3) >> 8).astype(np.uint8).reshape(len(b), -1)


def _pack_tq1_0(fields: Sequence[np.ndarray]) -> np.ndarray:
    digits, scale = fields
    parts = digits[:, :160], digits[:, 160:240], digits[:, 240:]
    packed = [_to_digits(p, count) for p, count in zip(parts, (5, 5, 4), strict=True)]
    return np.concatenate([*packed, scale.view(np.uint8)], -1)


def _to_digits(digits, count):
    """The smallest bytes that have the digits. ggml writes the same."""
    powers = np.array([81, 27, 9, 3, 1], np.uint16)[:count, None]
    value = (digits.reshape(len(digits), count, -1) * powers).sum(1)
    return ((value * 256 + 242) // 243).astype(np.uint8)


def _tq2_0(b: np.ndarray) -> np.ndarray:
    return _planes(b[:, :64], 32, _TWO_BITS) & 3


def _bits(b: np.ndarray) -> np.ndarray:
    """0 or 2 per bit, in bytes 2 to 17."""
    return np.unpackbits(b[:, 2:18], axis=-1, bitorder="little") << 1


def _pairs(b: np.ndarray) -> np.ndarray:
    """Two bits per element, in bytes 2 to 17."""
    return (b[:, 2:18, None] >> np.array(_TWO_BITS, np.uint8)).reshape(len(b), -1) & 3


def _nvfp4(b: np.ndarray) -> np.ndarray:
    return _runs(b[:, 4:], 8)


def _nvfp4_scale(b: np.ndarray) -> np.ndarray:
    """e4m3, whose sign ggml ignores. It reads NaN as 0, and -NaN as 480, which stays NaN here."""
    scale = b[:, :4]
    return np.where(scale == 0x7F, 0, scale & 0x7F).astype(np.uint8)


def _plain(number: int, name: str, dtype) -> BlockType:
    dtype = np.dtype(dtype)
    leaf = Leaf(1, dtype, lambda b: b.view(f"u{dtype.itemsize}"))
    return BlockType(number, name, 1, dtype.itemsize, None, leaf)


_LEAST = _half(2, _SIGN)
_K_SCALE = Nested(UINT6, _codes(UINT6, 8, _k_scale), _half(0))
_K_LEAST = Nested(UINT6, _codes(UINT6, 8, _k_least), _LEAST)
_Q2_SCALE = Nested(UINT4, _codes(UINT4, 16, lambda b: b[:, :16] & 15), _half(80))
_Q2_LEAST = Nested(UINT4, _codes(UINT4, 16, lambda b: b[:, :16] >> 4), _half(82, _SIGN))
_Q3_SCALE = Nested(INT6, _codes(INT6, 16, _q3_k_scale, 32), _half(108))
_Q6_SCALE = Nested(INT8, _codes(INT8, 16, _bytes(192, 208)), _half(208))
_IQ4_SCALE = Nested(INT6, _codes(INT6, 8, _iq4_xs_scale, 32), _half(0))
_MX_SCALE = Leaf(1, np.dtype(jnp.float8_e8m0fnu), _bytes(0, 1))
_NV_SCALE = Leaf(4, np.dtype(jnp.float8_e4m3fn), _nvfp4_scale)
_MX_NOTE = (
    "values below 2^-126 become zero, because XLA flushes them, values above the largest float32 "
    "are clipped, and blocks of scale byte 255 are NaN"
)

_TYPES = (
    _plain(0, "F32", np.float32),
    _plain(1, "F16", np.float16),
    _plain(30, "BF16", jnp.bfloat16),
    _plain(28, "F64", np.float64),
    _plain(24, "I8", np.int8),
    _plain(25, "I16", np.int16),
    _plain(26, "I32", np.int32),
    _plain(27, "I64", np.int64),
    BlockType(2, "Q4_0", 32, 18, INT4, _codes(INT4, 32, _q4(2), 8), _half(0)),
    BlockType(3, "Q4_1", 32, 20, UINT4, _codes(UINT4, 32, _q4(4)), _half(0), _half(2)),
    BlockType(6, "Q5_0", 32, 22, INT5, _codes(INT5, 32, _q5(2), 16), _half(0)),
    BlockType(7, "Q5_1", 32, 24, UINT5, _codes(UINT5, 32, _q5(4)), _half(0), _half(2)),
    BlockType(8, "Q8_0", 32, 34, INT8, _codes(INT8, 32, _bytes(2, 34)), _half(0)),
    BlockType(20, "IQ4_NL", 32, 18, IQ4_NL, _codes(IQ4_NL, 32, _q4(2)), _half(0)),
    BlockType(10, "Q2_K", 256, 84, UINT2, _codes(UINT2, 256, _q2_k), _Q2_SCALE, _Q2_LEAST),
    BlockType(11, "Q3_K", 256, 110, INT3, _codes(INT3, 256, _q3_k, 4), _Q3_SCALE),
    BlockType(12, "Q4_K", 256, 144, UINT4, _codes(UINT4, 256, _q4_k), _K_SCALE, _K_LEAST),
    BlockType(13, "Q5_K", 256, 176, UINT5, _codes(UINT5, 256, _q5_k), _K_SCALE, _K_LEAST),
    BlockType(14, "Q6_K", 256, 210, INT6, _codes(INT6, 256, _q6_k, 32), _Q6_SCALE),
    BlockType(23, "IQ4_XS", 256, 136, IQ4_NL, _codes(IQ4_NL, 256, _iq4_xs), _IQ4_SCALE),
    BlockType(35, "TQ2_0", 256, 66, INT2, _codes(INT2, 256, _tq2_0, **_NEGATED), _half(64, _SIGN)),
    BlockType(
        34, "TQ1_0", 256, 54, INT2, _codes(INT2, 256, _tq1_0, 1), _half(52), pack=_pack_tq1_0
    ),
    BlockType(39, "MXFP4", 32, 17, MXFP4, _codes(MXFP4, 32, _q4(1)), _MX_SCALE, note=_MX_NOTE),
    BlockType(40, "NVFP4", 64, 36, NVFP4, _codes(NVFP4, 64, _nvfp4), _NV_SCALE, has_factor=True),
    BlockType(41, "Q1_0", 128, 18, INT2, _codes(INT2, 128, _bits, 1), _half(0)),
    BlockType(42, "Q2_0", 64, 18, INT2, _codes(INT2, 64, _pairs, **_NEGATED), _half(0, _SIGN)),
)
BLOCK_TYPES = {t.number: t for t in (*_TYPES, *LATTICE_TYPES)}

_ACTIVATIONS = "ggml uses it for activations and never in files. The file is damaged; copy it again"
_REMOVED = "llama.cpp removed it. Convert the original model again with a current llama.cpp"
_UNSUPPORTED = {
    9: ("Q8_1", _ACTIVATIONS),
    15: ("Q8_K", _ACTIVATIONS),
    4: ("Q4_2", _REMOVED),
    5: ("Q4_3", _REMOVED),
    31: ("Q4_0_4_4", _REMOVED),
    32: ("Q4_0_4_8", _REMOVED),
    33: ("Q4_0_8_8", _REMOVED),
    36: ("IQ4_NL_4_4", _REMOVED),
    37: ("IQ4_NL_4_8", _REMOVED),
    38: ("IQ4_NL_8_8", _REMOVED),
}


def block_type(number: int) -> BlockType:
    """The type with a code in files.

    Raises:
        ValueError: it is unknown, removed, or not for files.
    """
    if number in BLOCK_TYPES:
        return BLOCK_TYPES[number]
    name, reason = _UNSUPPORTED.get(
        number, ("unknown", "The file is damaged, or newer than this version of jaxquant")
    )
    raise ValueError(f"ggml type {number} ({name}) is not supported: {reason}.")
