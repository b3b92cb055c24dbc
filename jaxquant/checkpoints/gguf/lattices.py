"""The types of ggml that quantize 4 or 8 elements together: IQ1, IQ2 and IQ3.

An index of a block selects one point of a grid, a fixed set of vectors. The elements of all grids
are small integers, so these types become 8-bit integers under nested scales, exactly: with 2 s + 1
for the 3 or 4 bits s of a scale,

    IQ1    x = (8 g +- 1) * (2 s + 1) * d / 8       g = -1, 0, 1
    IQ2    x = +-g * (2 s + 1) * d / 8              g = 8, 25, 43
    IQ3    x = +-g * (2 s + 1) * d / 4 (XXS), d (S)

The grids are those of ggml-common.h of https://github.com/ggml-org/ggml. Their points are sorted,
so it is enough to store which points a grid has: as bits, compressed.
"""

import base64
import functools
import zlib
from collections.abc import Callable

import numpy as np

from ...core import INT8, UINT5
from .block_type import BlockType, Leaf, Nested

Field = Callable[[np.ndarray], np.ndarray]
# The values of a grid's elements.
_IQ1 = (-1, 0, 1)
_IQ2 = (8, 25, 43)
_IQ3_XXS = (4, 12, 20, 28, 36, 44, 52, 62)
_IQ3_S = (1, 3, 5, 7, 9, 11, 13, 15)
# Bit i is set if the grid has the point whose elements are the digits of i, the lowest first.
_POINTS = {
    "IQ2_XXS": (
        "eNp1UkuqxDAMk8Hdq5B3Hwd6gG7m/ld5tvPt0BENpLHkSG4/f+XDq1ZouUAAaigwxA64afWEFLXbz718+LoBQVCq"
        "n5eSxPakiugoSjpNT6j4xkLlkEakmrdsKvaVVzQcEqXwcY6jlFtvHa9ytE5NdA8erHrVBlu7ptfiaQ4UTzR7t0+D"
        "9Mhgk18I792/MWkMozOpYEUGZTWnjKHk4pUeVVKiD+3yaLJ11MlR6vJsezlRkya9ZIuWJs+Vsrxm3zJ8I6bZP4Xa"
        "FM4G+dvYCpk35szlEWu/YcUTjjHsvjFmaK+qB/ijNp18T/Nl/wr9TfsHxl0VIw=="
    ),
    "IQ2_XS": (
        "eNpdUVuuhTAIHBL6j4nuhyb2vyZ2/1s5PFr13uYcxQLDzDDGuEarR6N7jN6qFMJ9iVYGEbqnDtoZlkIhZkArpNjL"
        "fqNsO5NA1bo8JYAFBDtigJd16QK0VEffvNELHLCRJGDcOCavsBSwVdr3Ft8MzBI/YyQguItPFR+YrVZ4Vig91ZxJ"
        "msCQSjFFFqbnQF6FMyWHrikZp8mrtADNKEt5SwnyPsOM0miHp4hoTq0xX7HOtDckM8rDMHs17BW3p+aFYCbtz+aG"
        "BpShy2TzehJuiNPq30xqNOkvCWeIZyg+If0x2t8iIbnQwY7bDyOfokOFu1z32/oVuavEmHEw5Vjp7gI+vAKcOd2I"
        "zVCwoLfAQE4LqnxJ7h+iL1v+XMoqbTQn0uOl7msKr70o/h/N4W2uYLIu79Po/gBOsClJ"
    ),
    "IQ2_S": (
        "eNptUl2KBiEMa0HfK+h9KozvCvb+V9m0OrvfsivD/MXEJGpmy4a1XPAyh9Xc6l4yLVEpeAwza3usaVZxAVJAq6Yp"
        "pM2cJcyaLT2AlIirZCEipW1rQbmtui2WsEqz9p4y1US+1ivoUAjWzIBAV1vJISY6EP4lcShBm/Zqq+fEhfbsmg9L"
        "aCXMz/QgxS/BAkpmUINcYMOXIGrxTSGOT9yYpnu1Vh9vI1+HvSWP7L7MthfV6UCzvw4hIPVAsBEstKF0IB8QbMGi"
        "P5Er4HetD0G65iMyICUE/BGMWiLJM1qGQ/VNuR2K20hOIF6fghIY3ex4n3JL4FPLO2KGahul7iKdaRzznbS0y8Iu"
        "F4+cfyKzQ/OKg5U5ZHDnVx3K2c/KMLms2JRQPAfAKf90WOQ7NiDh02sg9DEwGad3h46fCTlhJKkX/TCtK8h6O/yV"
        "Gdg1ylcNv5Ur35q+ALm8Vh4="
    ),
    "IQ3_XXS": (
        "eNpNUTEOwjAMPFuxVGUKQ/eKCfGKdGCHH0WdEK9g5Jn4nKZwVdUmPt+dk/llmoBLtrNpgcxqL2xYNlvgEExopeGy"
        "AckfwgsFeMBLimx5bgKYWhSzqa+QDKIVFeeu4jj5ChqqgRTblm/0xzX6nmKbNXGSntCb6DfRq7kbjTtyjSBQy66/"
        "hN+d+2xmUmVXQJrvrAzPhsIYUZoYzGd743mEKqQLVncbdJqUEUMGcbH932U9l6yoo4HjpLQ7QEI8ddpIhIPI7z1c"
        "tL8Nw3X9CxXSe8Mevst9ZNxL7bIcM/FIRlwNpv2O7piB+AIWuhT2"
    ),
    "IQ3_S": (
        "eNotUcFKw0AQfTPMwmZPuyHiNd1GqPmKrdSDeimC+DtpqdD2luIHiFYE+5PObpzDwLw3897b5Od1br+dOV3PD9Ej"
        "ytdDDGeHykbz6M0QaV9LxaAG9/YTySYHhoCvdEYAri/mGWuWp8AVGyzpHKRqSU7VNugiLRq4le4VlqE1Yq3dGW4z"
        "f3k5mt4Mt+bQ1aL8CW7De9Q33DihhC2qTuHOswxkQW9ZRC9bTmQJkF/p39ly7x0ItCLRqIpzONKxhbV3qioBbFrx"
        "CRYJJYaDaXOaIKOwHu6czGxUfMaWBiHvTMy8gR+y3Ee5EqiCRzaYgaxCEgSjJN8LS14gtkvdwY4GeG5tDZKUhXJ3"
        "KJUXm9K1+oxqAGx08Jn00gqR5+yipY9QsMLkm0MX/F9rhEnkBcIeC53rpb6Gi0eXc8T8kWhylcm7/IVJG/gDusYn"
        "IA=="
    ),
    "IQ1_S": (
        "eNotUkFLnEcYfneq4XVMZWM/QXJ696ux01kR6y3pZZFdWPRiQvIHPNm0SMk5TT4nu+mX2RRCILQ0l3EwyTgNq/FQ"
        "tp+wAU9WemjprQdpPYS6HgJeGgzEzK69zbzwvM/zvM9z7UJUN2zmMlY+c3dJ2/MoKarPR4rKlQsj/YYpSkcBlflA"
        "mnTL8wd+EGLg/r4yWAqoQprMRwGup/AHg4kMk6hO1ZlrWMlNbBvS4yDHnLe4v44oBAQu4QW5hPhj/CVztNu8Z5v+"
        "0s3DTralhlpxtvvn0EMWQ0xOZ1wxBDn7t/08pqKF5dKy1wLjXFA4omigUrhaN8g+dpeopuhqkGEJH81HTGLLqcRU"
        "GaGyi5aJnyTWw3sKKyXoKjQwcxkquU8VaCVxZSrqD5bFqXjGyEug4Re6KVy24t3XoDgyEbMaKKgmprMh/TY1srjz"
        "17NGY8k9DP8bDV0+K6laKwkt0dPObza26z+afx0DBtKlQIlpWCsyk6hpnrVb2btDa4oWNRcdCyvT7OzxamfvddFN"
        "fte+dXj83+2Xr77J9r54+8nJy/Hj4YN/dJz37aGax003qJon2djBnaRvYWLxyPHVIgTLuO+HgSnJn9Kv6t4DJcDC"
        "/eQjUIjwlfZ+iz1ta7PLki+/n/x98yCv8pN+T4z88aQPePcOhLkVUv5iFk/XzEAyCtousOWoHA5VeK56KXsS/ls+"
        "3Eu532C3NjlipmRjSAEtXtdLLe8TIK72d+IClruoAU0joVF3OXopE+BdVMFBb+E+pYqPhgi89XqjwbgMFCrxXKCA"
        "tZTFpj0oWqizuc1gefVN09MVsfizmXqVcBaacH0hFIl5X/Qdu2YsYp6MjkENnabMexVdOwOznuETyH9Y/j/l/lBp"
        "9fyIACBw8Yw6loGqDoiDCM7NVbrdcKynMB3DVPAShkmwzLoLc+8B4wUZaQ=="
    ),
}


@functools.cache
def grid(name: str, values: tuple[int, ...], width: int) -> np.ndarray:
    """The points of a grid in order, int8 (points, width)."""
    packed = np.frombuffer(zlib.decompress(base64.b64decode(_POINTS[name])), np.uint8)
    numbers = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
    digits = numbers[:, None] // len(values) ** np.arange(width) % len(values)
    return np.array(values, np.int8)[digits]


def _points(name: str, values: tuple[int, ...], width: int, index: np.ndarray) -> np.ndarray:
    """The elements of the points that indices (n, m) select: (n, m * width)."""
    return grid(name, values, width)[index].reshape(len(index), -1)


def _negated(elements: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Elements (n, 256), negated where a bit of signs (n, 32) is set, as bytes."""
    is_negative = np.unpackbits(signs, axis=-1, bitorder="little")
    return np.where(is_negative, -elements, elements).view(np.uint8)


def _words(b: np.ndarray, dtype) -> np.ndarray:
    return np.ascontiguousarray(b).view(dtype)


def _shifted(words: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    """Parts of words: (n, m) -> (n, m * len(shifts))."""
    return ((words[..., None] >> np.array(shifts, words.dtype)) & mask).reshape(len(words), -1)


def _even_signs(words: np.ndarray) -> np.ndarray:
    """Bytes of 7 signs, with the eighth that makes their number even."""
    seven = words.astype(np.uint8)
    return seven | (np.bitwise_count(seven) & 1) << 7


def _odd(scales: np.ndarray) -> np.ndarray:
    """2 s + 1."""
    return (2 * scales + 1).astype(np.uint8)


def _nibble_scales(start: int) -> Field:
    return lambda b: _odd(_shifted(b[:, start:], (0, 4), 15))


# Four times 7 signs, and a scale of 4 bits.
_SIGNS_IN_WORD = (0, 7, 14, 21)


def _iq2_xxs_words(b: np.ndarray) -> np.ndarray:
    return _words(b[:, 2:], np.uint32).reshape(len(b), 8, 2)


def _iq2_xxs(b: np.ndarray) -> np.ndarray:
    words = _iq2_xxs_words(b)
    index = _words(words[..., 0], np.uint8).reshape(len(b), 32)
    signs = _even_signs(_shifted(words[..., 1], _SIGNS_IN_WORD, 127))
    return _negated(_points("IQ2_XXS", _IQ2, 8, index), signs)


def _iq2_xxs_scale(b: np.ndarray) -> np.ndarray:
    return _odd(_iq2_xxs_words(b)[..., 1] >> 28)


def _iq2_xs(b: np.ndarray) -> np.ndarray:
    words = _words(b[:, 2:66], np.uint16)
    return _negated(_points("IQ2_XS", _IQ2, 8, words & 511), _even_signs(words >> 9))


def _iq2_s(b: np.ndarray) -> np.ndarray:
    high = _shifted(b[:, 66:74], (0, 2, 4, 6), 3).astype(np.uint16) << 8
    return _negated(_points("IQ2_S", _IQ2, 8, b[:, 2:34] | high), b[:, 34:66])


def _iq3_xxs(b: np.ndarray) -> np.ndarray:
    signs = _even_signs(_shifted(_words(b[:, 66:], np.uint32), _SIGNS_IN_WORD, 127))
    return _negated(_points("IQ3_XXS", _IQ3_XXS, 4, b[:, 2:66]), signs)


def _iq3_xxs_scale(b: np.ndarray) -> np.ndarray:
    return _odd(_words(b[:, 66:], np.uint32) >> 28)


def _iq3_s(b: np.ndarray) -> np.ndarray:
    high = np.unpackbits(b[:, 66:74], axis=-1, bitorder="little").astype(np.uint16) << 8
    return _negated(_points("IQ3_S", _IQ3_S, 4, b[:, 2:66] | high), b[:, 74:106])


def _eighths(index: np.ndarray, is_below: np.ndarray) -> np.ndarray:
    """8 g + 1, or 8 g - 1 where the bit (n, 32) of a point is set."""
    elements = 8 * _points("IQ1_S", _IQ1, 8, index)
    shift = 1 - 2 * is_below.astype(np.int8)
    return (elements + np.repeat(shift, 8, axis=-1)).view(np.uint8)


def _iq1_s(b: np.ndarray) -> np.ndarray:
    words = _words(b[:, 34:], np.uint16)
    index = b[:, 2:34] | _shifted(words, (0, 3, 6, 9), 7) << 8
    return _eighths(index, np.repeat(words >> 15, 4, axis=-1))


def _iq1_s_scale(b: np.ndarray) -> np.ndarray:
    return _odd((_words(b[:, 34:], np.uint16) >> 12) & 7)


def _iq1_m(b: np.ndarray) -> np.ndarray:
    nibbles = _shifted(b[:, 32:48], (0, 4), 15)
    return _eighths(b[:, :32] | (nibbles & 7).astype(np.uint16) << 8, nibbles >> 3)


def _iq1_m_scale(b: np.ndarray) -> np.ndarray:
    return _odd(_shifted(_words(b[:, 48:], np.uint16), (0, 3, 6, 9), 7))


def _iq1_m_half(b: np.ndarray) -> np.ndarray:
    """The bytes of d, of which each of four words has 4 bits at the top."""
    parts = (_words(b[:, 48:], np.uint16) >> 12) << np.array([0, 4, 8, 12], np.uint16)
    return np.bitwise_or.reduce(parts, axis=-1, keepdims=True)


def _half(b: np.ndarray) -> np.ndarray:
    return _words(b[:, :2], np.uint16)


def _type(number, name, nbytes, codes, count, scale, unit, half=_half) -> BlockType:
    """A row: `count` scales per block, and the super-scale d * unit."""

    def super_scale(b):
        return (half(b).view(np.float16).astype(np.float32) * np.float32(unit)).view(np.uint32)

    nested = Nested(
        UINT5,
        Leaf(count, np.dtype(np.uint8), scale),
        Leaf(1, np.dtype(np.float32), super_scale),
    )
    leaf = Leaf(256, np.dtype(np.int8), codes)
    return BlockType(number, name, 256, nbytes, INT8, leaf, nested, is_written=False)


LATTICE_TYPES = (
    _type(16, "IQ2_XXS", 66, _iq2_xxs, 8, _iq2_xxs_scale, 1 / 8),
    _type(17, "IQ2_XS", 74, _iq2_xs, 16, _nibble_scales(66), 1 / 8),
    _type(22, "IQ2_S", 82, _iq2_s, 16, _nibble_scales(74), 1 / 8),
    _type(18, "IQ3_XXS", 98, _iq3_xxs, 8, _iq3_xxs_scale, 1 / 4),
    _type(21, "IQ3_S", 110, _iq3_s, 8, _nibble_scales(106), 1),
    _type(19, "IQ1_S", 50, _iq1_s, 8, _iq1_s_scale, 1 / 8),
    _type(29, "IQ1_M", 56, _iq1_m, 16, _iq1_m_scale, 1 / 8, _iq1_m_half),
)
