"""Opens files that `jaxquant.save` wrote as checkpoints."""

import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..core import QTensor, bits_of, describe, packed_bytes
from ..tree.internal import (
    DTYPES,
    TensorFile,
    check_size,
    check_sortable,
    check_tensor,
    from_bits,
    leaves_with_paths,
    map_tree,
    unpack,
)
from .checkpoint import Checkpoint
from .source import Index, Source
from .stored import Stored


class _Mapped:
    """A stored array in a mapped file, which is checked when it is first read."""

    def __init__(self, file: TensorFile, data: np.memmap, name: str, checksum: int) -> None:
        entry = file.entries[name]
        piece = data[file.start + entry.start : file.start + entry.stop]
        self.array = piece.view(DTYPES[entry.dtype]).reshape(entry.shape)
        self.path, self.name, self.checksum = file.path, name, checksum
        self.is_checked = False

    def read(self) -> np.ndarray:
        """The array.

        Raises:
            ValueError: it does not have its checksum.
        """
        if not self.is_checked:
            check_tensor(self.path, self.name, self.array, self.checksum)
            self.is_checked = True
        return self.array

    def restore(
        self, dtype: np.dtype | None, shape: tuple[int, ...] | None, bits: int | None = None
    ) -> Source:
        """The array that it stores: itself, or bytes of an array of this dtype, shape and bits."""
        array = self.array
        if dtype is None or shape is None:
            return Source(array.shape, array.dtype, lambda i: np.array(self.read()[i]), array)
        form = jax.ShapeDtypeStruct(shape, dtype)
        check_size(array.nbytes, dtype, shape, bits)
        if (bits or bits_of(dtype)) < 8:
            return Source(shape, dtype, lambda i: _packed_part(self.read(), form, bits, i), array)
        return Source(shape, dtype, lambda index: _part(self.read(), form, index), array)


def _part(stored: np.ndarray, form: jax.ShapeDtypeStruct, index: Index) -> np.ndarray:
    return np.array(stored.view(form.dtype).reshape(form.shape)[index])


def _packed_part(
    stored: np.ndarray, form: jax.ShapeDtypeStruct, bits: int | None, index: Index
) -> np.ndarray:
    """`_part` of codes of less than a byte, packed along the flat array: unpacks whole rows."""
    bits, inner = bits or bits_of(form.dtype), math.prod(form.shape[1:])
    first, *rest = index or (slice(0, 1),)
    start, stop = first.start * inner, first.stop * inner
    begin = start // 8 * 8  # Eight codes take whole bytes.
    codes = unpack(stored.view(np.uint8)[begin * bits // 8 : -(-stop * bits // 8)], bits)
    codes = codes[start - begin :][: stop - start]
    rows = codes.reshape(first.stop - first.start, *form.shape[1:])[(slice(None), *rest)]
    return from_bits(rows, bits, form.dtype).reshape(rows.shape if form.shape else ())


def open_own(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a file that `jaxquant.save` wrote. Tensors are named by their paths in the tree.

    A tensor is checked against its checksum when its first slice is read.

    Raises:
        OSError, ValueError: as for `jaxquant.load`.
    """
    maps: list[np.memmap] = []

    def get(file: TensorFile, name: str, checksum: int) -> _Mapped:
        if not maps:
            maps.append(np.memmap(file.file, np.uint8, "r"))
        return _Mapped(file, maps[0], name, checksum)

    tree, metadata = map_tree(path, get, _Mapped.restore)
    check_sortable(path, tree)
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
    return Stored(name, str(value.dtype), value, packed_bytes(value))
