"""What a type of ggml stores in each block, and how blocks become codes, scales and offsets.

A block is a fixed number of bytes for a fixed number of elements along the last axis. Most types
only arrange bits: each bit of a block is one bit of one code, scale or offset. Decoding is written
out per type. Encoding needs no code per type: `bit_places` decodes blocks with a single bit set,
which shows where each bit goes.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ...core import Format

# Blocks are decoded this many bytes at a time, so that intermediate arrays stay in the cache.
_CHUNK_BYTES = 1 << 17
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """One array that blocks hold.

        element = (field ^ flip) - bias, modulo its number of bits, viewed as `dtype`

    Attributes:
        count: elements per block.
        dtype: of the elements.
        field: extracts unsigned integers (n, count), as wide as `dtype`, from blocks (n, bytes).
            Zeros give zeros, unless the type is only read.
        bias: what the file adds to each element.
        flip: the bits that the file inverts.
    """

    count: int
    dtype: np.dtype
    field: Callable[[np.ndarray], np.ndarray]
    bias: int = 0
    flip: int = 0

    def decode(self, blocks: np.ndarray) -> np.ndarray:
        """The elements of blocks: (n, bytes) uint8 -> (n, count)."""
        out = np.empty((len(blocks), self.count), self.dtype)
        step = max(1, _CHUNK_BYTES // blocks.shape[1])
        for i in range(0, len(blocks), step):
            field = self.field(np.ascontiguousarray(blocks[i : i + step]))
            out[i : i + step] = ((field ^ self.flip) - self.bias).view(self.dtype)
        return out

    def to_field(self, elements: np.ndarray) -> np.ndarray:
        """Inverse of (field ^ flip) - bias."""
        if self.dtype.itemsize == 1 and jnp.issubdtype(self.dtype, jnp.signedinteger):
            # JAX leaves the upper bits of int4 and int2 zero where NumPy extends the sign.
            elements = elements.astype(np.int8)
        unsigned = _UNSIGNED[self.dtype.itemsize]
        return (np.ascontiguousarray(elements).view(unsigned) + unsigned(self.bias)) ^ self.flip


@dataclasses.dataclass(frozen=True, eq=False)
class Nested:
    """Scales or offsets that are quantized too: codes, and one scale per block for them."""

    format: Format
    codes: Leaf
    scale: Leaf


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockType:
    """A type of ggml.

    Attributes:
        number: its code in files.
        name: as ggml calls it, such as "Q4_K".
        elements: per block; 1 for plain arrays.
        nbytes: per block.
        format: of the codes; None for plain arrays.
        codes: the codes, or the elements of a plain array.
        scale, offset: of the codes, as in a QTensor.
        note: what is not exact; empty if everything is.
        has_factor: whether another tensor may hold a factor of the scales.
        pack: makes blocks from the fields of `leaves`, where bits are not only arranged.
        is_written: whether blocks can be made.
    """

    number: int
    name: str
    elements: int
    nbytes: int
    format: Format | None
    codes: Leaf
    scale: Leaf | Nested | None = None
    offset: Leaf | Nested | None = None
    note: str = ""
    has_factor: bool = False
    pack: Callable[[Sequence[np.ndarray]], np.ndarray] | None = None
    is_written: bool = True

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        """All arrays that a block holds."""
        parts = [p for p in (self.codes, self.scale, self.offset) if p is not None]
        pairs = [(p.codes, p.scale) if isinstance(p, Nested) else (p,) for p in parts]
        return tuple(leaf for pair in pairs for leaf in pair)

    def encode(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Inverse of decoding: one array (n, count) per leaf -> blocks (n, nbytes).

        Raises:
            ValueError: blocks cannot hold an element.
        """
        blocks = np.empty((len(arrays[0]), self.nbytes), np.uint8)
        step = max(1, _CHUNK_BYTES // (2 * self.nbytes))
        for i in range(0, len(blocks), step):
            blocks[i : i + step] = self._encode([a[i : i + step] for a in arrays])
        return blocks

    def _encode(self, arrays):
        fields = [leaf.to_field(a) for leaf, a in zip(self.leaves, arrays, strict=True)]
        blocks = self.pack(fields) if self.pack else _arrange(self, fields)
        for leaf, field in zip(self.leaves, fields, strict=True):
            if not np.array_equal(leaf.field(blocks), field):
                raise ValueError(f"blocks of {self} cannot hold all of its {leaf.dtype} values")
        return blocks

    def __repr__(self) -> str:
        return self.name


@functools.cache
def bit_places(type: BlockType) -> list[np.ndarray]:
    """For each leaf, the fields (8 * nbytes, count) of blocks in which only one bit is set."""
    probes = np.packbits(np.eye(8 * type.nbytes, dtype=np.uint8), axis=-1, bitorder="little")
    return [leaf.field(probes).astype(np.uint16) for leaf in type.leaves]


@functools.cache
def _rounds(type: BlockType) -> list[tuple[np.ndarray, ...]]:
    """What each byte holds: which bits (mask) of which field, shifted to the left and the right.

    A byte that holds parts of several fields is in as many rounds.
    """
    places = np.concatenate(bit_places(type), -1)
    parts: dict[tuple[int, int, int], int] = {}
    for i, (field, bit) in enumerate(zip(places.argmax(-1), places.max(-1), strict=True)):
        part = i // 8, int(field), i % 8 - int(bit).bit_length() + 1
        parts[part] = parts.get(part, 0) | int(bit)  # 0 for a bit that decoding ignores.
    rounds: list[list[tuple[int, ...]]] = []
    seen = collections.Counter()
    for (byte, field, shift), mask in parts.items():
        if seen[byte] == len(rounds):
            rounds.append([])
        rounds[seen[byte]].append((byte, field, mask, max(shift, 0), max(-shift, 0)))
        seen[byte] += 1
    return [tuple(np.array(column, np.uint16) for column in zip(*r, strict=True)) for r in rounds]


def _arrange(type: BlockType, fields: Sequence[np.ndarray]) -> np.ndarray:
    """Blocks from the fields of their leaves."""
    columns = np.concatenate([f.astype(np.uint16) for f in fields], -1)
    blocks = np.zeros((len(columns), type.nbytes), np.uint16)
    for byte, field, mask, left, right in _rounds(type):
        blocks[:, byte] |= (columns[:, field] & mask) << left >> right
    return blocks.astype(np.uint8)
