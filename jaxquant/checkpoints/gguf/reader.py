"""Opens GGUF files as checkpoints."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...core import FP8_E4M3, Format, QTensor
from ..checkpoint import Checkpoint
from ..source import Index, Source
from ..stored import Stored
from .block_type import BlockType, Leaf, Nested
from .container import TensorInfo
from .renamed import Entry, read_entries

_FACTOR_NOTE = "the factor of the tensor is rounded with each scale, by at most one float32 ulp"
_SHIFT_NOTE = "the file stores norms plus {}, which is subtracted"


def open_gguf(path: str | os.PathLike[str], names: str = "stored") -> Checkpoint:
    """Opens a GGUF file. Only its header is read; arrays are mapped.

    Weights are (N, K) with groups along the last axis, and decode to the float32 values that ggml's
    own decoder gives, bit for bit, unless `Stored.note` says otherwise.

    Args:
        path: of the file, or of one of its shards, which are opened as one.
        names: "stored" for tensors as they are in the file, or "huggingface" for tensors as a model
            of Hugging Face has them: renamed, the rows of query and key projections in their
            original order, and the weights of Gemma's norms without the one that GGUF adds. Tensors
            without a counterpart, such as stacked experts, keep their names.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is malformed or of a kind that is not supported (the error names the file
            and the field), or the architecture has no table of names.
    """
    containers, entries = read_entries(path, names)
    tensors = {name: _stored(entry) for name, entry in entries.items()}
    return Checkpoint(Path(path), "gguf", tensors, containers[0].metadata)


def _stored(entry: Entry) -> Stored:
    tensor, renamed, factor = entry
    type, shape = tensor.type, tensor.shape
    notes = [type.note]
    if type.format is None:
        value = Plain(type.codes, tensor.raw, shape, renamed.rows, renamed.shift).source()
    else:
        raw = tensor.raw.reshape(*shape[:-1], shape[-1] // type.elements, type.nbytes)
        scales = None if factor is None else _factors(factor, tensor)
        value = Blocks(type, raw, renamed.rows).value(scales)
    notes += [_FACTOR_NOTE] if factor is not None else []
    notes += [_SHIFT_NOTE.format(renamed.shift)] if renamed.shift else []
    nbytes = tensor.raw.size + (0 if factor is None else factor.raw.size)
    return Stored(renamed.name, type.name, value, nbytes, "; ".join(n for n in notes if n))


def _factors(factor: TensorInfo, tensor: TensorInfo) -> Source:
    """The factor with the axes of the tensor."""
    is_shared = factor.raw.size == factor.type.nbytes
    shape = (1,) * len(tensor.shape) if is_shared else (*factor.shape, 1, 1)
    return Plain(factor.type.codes, factor.raw, shape).source()


def _select(raw: np.ndarray, rows: np.ndarray | None, index: Index) -> np.ndarray:
    """`raw[index]`, with the first axis in the order of `rows`."""
    if rows is None:
        return raw[index]
    return raw[rows[index[0]]][(slice(None), *index[1:])]


@dataclasses.dataclass(frozen=True)
class Plain:
    """An array of numbers in a mapped file.

    Attributes:
        leaf: the numbers.
        raw: their bytes, uint8 (nbytes,).
        shape: of the array.
        rows: the row of the file that each index along the first axis selects; None for the same.
        shift: what the file adds to each number.
    """

    leaf: Leaf
    raw: np.ndarray
    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    shift: int = 0

    def source(self) -> Source:
        """The array."""
        raw = self.raw.reshape(*self.shape, self.leaf.dtype.itemsize)

        def reader(index: Index) -> np.ndarray:
            selected = _select(raw, self.rows, index)
            values = self.leaf.decode(selected.reshape(-1, raw.shape[-1]))
            values = values.reshape(selected.shape[:-1])
            return values - self.leaf.dtype.type(self.shift) if self.shift else values

        return Source(self.shape, self.leaf.dtype, reader, self.raw)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a tensor in a mapped file.

    Attributes:
        type: of the blocks.
        raw: uint8 (..., blocks of a row, bytes of a block).
        rows: the row of the file that each index along the first axis selects; None for the same.
    """

    type: BlockType
    raw: np.ndarray
    rows: np.ndarray | None = None

    def source(self, leaf: Leaf) -> Source:
        """One array of the blocks."""
        *lead, blocks, _ = self.raw.shape

        def reader(index: Index) -> np.ndarray:
            *outer, inner = index
            first, last = inner.start // leaf.count, -(-inner.stop // leaf.count)
            raw = _select(self.raw, self.rows, (*outer, slice(first, last)))
            shape = (*raw.shape[:-2], raw.shape[-2] * leaf.count)
            decoded = leaf.decode(raw.reshape(-1, raw.shape[-1])).reshape(shape)
            cut = slice(inner.start - first * leaf.count, inner.stop - first * leaf.count)
            return np.ascontiguousarray(decoded[..., cut])

        return Source((*lead, blocks * leaf.count), leaf.dtype, reader, self.raw)

    def value(self, factor: Source | None = None) -> QTensor:
        """The tensor, with a Source in place of each array."""
        assert self.type.format is not None
        scale, offset = self._part(self.type.scale), self._part(self.type.offset)
        if factor is not None:
            scale = _qtensor(scale, factor, None, FP8_E4M3)
        return _qtensor(self.source(self.type.codes), scale, offset, self.type.format)

    def _part(self, part: Leaf | Nested | None) -> Any:
        if isinstance(part, Nested):
            return _qtensor(self.source(part.codes), self.source(part.scale), None, part.format)
        return None if part is None else self.source(part)


def _qtensor(codes: Any, scale: Any, offset: Any, format: Format) -> QTensor:
    """A QTensor of Sources."""
    return QTensor(codes, scale, offset=offset, format=format, dtype=jnp.dtype("float32"))
