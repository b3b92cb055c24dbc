"""Opens GGUF files as checkpoints."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...core import Format, QTensor
from ..checkpoint import Checkpoint
from ..source import Index, Source
from ..stored import Stored
from .block_type import BlockType, Leaf, Nested
from .container import TensorInfo, read_containers


def open_gguf(path: str | os.PathLike) -> Checkpoint:
    """Opens a GGUF file. Only its header is read; arrays are mapped.

    Weights are (N, K) with groups along the last axis, and decode to the float32 values that ggml's
    own decoder gives, bit for bit, unless `Stored.note` says otherwise.

    Args:
        path: of the file, or of one of its shards, which are opened as one.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is malformed or of a kind that is not supported; the error names the file
            and the field.
    """
    containers = read_containers(path)
    tensors = {t.name: _stored(t) for c in containers for t in c.tensors}
    return Checkpoint(Path(path), "gguf", tensors, containers[0].metadata)


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
            raw = self._select(outer)[..., first:last, :]
            shape = (*raw.shape[:-2], raw.shape[-2] * leaf.count)
            decoded = leaf.decode(raw.reshape(-1, raw.shape[-1])).reshape(shape)
            cut = slice(inner.start - first * leaf.count, inner.stop - first * leaf.count)
            return np.ascontiguousarray(decoded[..., cut])

        return Source((*lead, blocks * leaf.count), leaf.dtype, reader)

    def _select(self, outer):
        if self.rows is None or not outer:
            return self.raw[tuple(outer)]
        return self.raw[self.rows[outer[0]]][(slice(None), *outer[1:])]

    def value(self) -> Source | QTensor:
        """The tensor, with a Source in place of each array."""
        if self.type.format is None:
            return self.source(self.type.codes)
        scale, offset = self._part(self.type.scale), self._part(self.type.offset)
        return _qtensor(self.source(self.type.codes), scale, offset, self.type.format)

    def _part(self, part: Leaf | Nested | None) -> Any:
        if isinstance(part, Nested):
            return _qtensor(self.source(part.codes), self.source(part.scale), None, part.format)
        return None if part is None else self.source(part)


def _qtensor(codes: Any, scale: Any, offset: Any, format: Format) -> QTensor:
    """A QTensor of Sources."""
    return QTensor(codes, scale, offset=offset, format=format, dtype=jnp.dtype("float32"))


def _stored(tensor: TensorInfo) -> Stored:
    type, shape = tensor.type, tensor.shape or (1,)
    raw = tensor.raw.reshape(*shape[:-1], shape[-1] // type.elements, type.nbytes)
    value = Blocks(type, raw).value()
    if not tensor.shape:
        value = Source((), type.codes.dtype, lambda _: type.codes.decode(raw).reshape(()))
    return Stored(tensor.name, type.name, value, tensor.raw.size, type.note)
