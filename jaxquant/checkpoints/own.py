"""Opens files that `jaxquant.save` wrote as checkpoints."""

import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..core import QTensor, bits_of, describe
from ..tree.internal import DTYPES, TensorFile, check_tensor, leaves_with_paths, map_tree
from .checkpoint import Checkpoint
from .source import Index, Source
from .stored import Stored


class _Mapped:
    """A stored array in a mapped file, which is checked when it is first read."""

    def __init__(self, file: TensorFile, name: str, checksum: int) -> None:
        entry = file.entries[name]
        data = np.memmap(file.file, np.uint8, "r")
        piece = data[file.start + entry.start : file.start + entry.stop]
        self.array = piece.view(DTYPES[entry.dtype]).reshape(entry.shape)
        self.path, self.name, self.checksum = file.path, name, checksum
        self.is_checked = False

    def read(self) -> np.ndarray:
        """The array, if it has its checksum.

        Raises:
            ValueError: it does not.
        """
        if not self.is_checked:
            check_tensor(self.path, self.name, self.array, self.checksum)
            self.is_checked = True
        return self.array


def open_own(path: str | os.PathLike) -> Checkpoint:
    """Opens a file that `jaxquant.save` wrote. Tensors are named by their paths in the tree.

    A tensor is checked against its checksum when its first slice is read.

    Raises:
        OSError, ValueError: as for `jaxquant.load`.
    """
    tree, metadata = map_tree(path, _Mapped, _restore)
    paths, leaves, _ = leaves_with_paths(tree, is_leaf=lambda x: isinstance(x, QTensor))
    tensors = {
        name: _stored(name, leaf)
        for name, leaf in zip(paths, leaves, strict=True)
        if isinstance(leaf, Source | QTensor)
    }
    return Checkpoint(Path(path), "jaxquant", tensors, metadata, is_tree=True)


def _stored(name: str, value: Any) -> Stored:
    if isinstance(value, QTensor):
        return Stored(name, describe(value), value, value.nbytes)
    return Stored(name, str(value.dtype), value, value.size * bits_of_any(value.dtype) // 8)


def bits_of_any(dtype: np.dtype) -> int:
    """Bits per element, also of dtypes that are not numbers."""
    is_number = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
    return bits_of(dtype) if is_number else 8 * dtype.itemsize


def _restore(stored: _Mapped, dtype: np.dtype | None, shape: tuple[int, ...] | None) -> Source:
    if dtype is None or shape is None:
        array = stored.array
        return Source(array.shape, array.dtype, lambda index: np.array(stored.read()[index]), array)
    bits = bits_of_any(dtype)
    if math.prod(shape) * bits > 8 * stored.array.nbytes:
        raise ValueError(f"{dtype} of shape {shape} does not fit {stored.array.nbytes} bytes")
    if bits >= 8:
        return Source(
            shape,
            dtype,
            lambda index: np.array(stored.read().view(dtype).reshape(shape)[index]),
            stored.array,
        )

    def reader(index: Index) -> np.ndarray:
        first, *rest = index or (slice(0, 1),)
        inner = math.prod(shape[1:])
        start, stop = first.start * inner, first.stop * inner
        count = 8 // bits
        packed = stored.read().view(np.uint8)[start // count : -(-stop // count)]
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (packed[:, None] >> shifts) & (2**bits - 1)
        begin = start - start // count * count
        codes = codes.reshape(-1)[begin : begin + stop - start]
        codes = codes.reshape(first.stop - first.start, *shape[1:])[(slice(None), *rest)]
        return from_bits(codes, dtype).reshape(() if not shape else codes.shape)

    return Source(shape, dtype, reader, stored.array)


def from_bits(codes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Bit patterns in the low bits of bytes, as elements of a dtype of less than 8 bits."""
    if not jnp.issubdtype(dtype, jnp.signedinteger):
        is_integer = jnp.issubdtype(dtype, jnp.integer)
        return codes.astype(dtype) if is_integer else codes.view(dtype)
    sign = 2 ** (bits_of(dtype) - 1)
    return ((codes ^ sign).astype(np.int8) - sign).astype(dtype)
