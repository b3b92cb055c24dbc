"""safetensors files, mapped into memory."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ...tree.internal import DTYPES, Entry, open_tensors
from ..bits import unpacked
from ..source import Source
from .derived import viewed

# Bits and NumPy's dtype of the dtypes that are packed in files; a view unpacks them.
_PACKED = {"F4": (4, ml_dtypes.float4_e2m1fn)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as a file holds it.

    Attributes:
        name: in the file.
        path: of the file, for error messages.
        source: its elements.
        nbytes: bytes in the file.
    """

    name: str
    path: Path
    source: Source
    nbytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.source.shape

    @property
    def dtype(self) -> np.dtype:
        """Its dtype."""
        return self.source.dtype

    def holding(self, source: Source) -> "Tensor":
        """The tensor with its elements in another form, for errors that name it."""
        return dataclasses.replace(self, source=source)

    def invalid(self, what: str, got: Any = None) -> ValueError:
        """An error that says what this tensor should have been, and what it is or holds."""
        found = f"{self.dtype} of shape {self.shape}" if got is None else got
        return ValueError(
            f"{self.path}: tensor {self.name!r} must be {what}; got {found}. Convert the model "
            "again, or report the file if other software reads it."
        )

    def check(self, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> "Tensor":
        """This tensor, if it has one of the dtypes, and one of the shapes if there are any.

        Raises:
            ValueError: it does not.
        """
        if self.dtype.name not in dtypes or (shapes and self.shape not in shapes):
            of = f" of shape {' or '.join(map(str, shapes))}" if shapes else ""
            raise self.invalid(f"{' or '.join(dtypes)}{of}")
        return self


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and the strings of its header.

    Raises:
        OSError, ValueError: as for `open_tensors`.
    """
    with open_tensors(path) as file:
        # Of the file that was checked, even if another has taken its name.
        data = np.memmap(file.file, np.uint8, "r")
        tensors = {
            name: Tensor(name, path, _source(path, name, data, file.start, entry), _nbytes(entry))
            for name, entry in file.entries.items()
        }
        return tensors, file.metadata


def _nbytes(entry: Entry) -> int:
    return entry.stop - entry.start


def _source(path, name, data, start, entry: Entry) -> Source:
    piece = data[start + entry.start : start + entry.stop]
    if entry.dtype in DTYPES:
        array = piece.view(DTYPES[entry.dtype]).reshape(entry.shape)
        return Source(entry.shape, array.dtype, lambda index: np.array(array[index]), array)
    bits, dtype = _PACKED.get(entry.dtype, (None, None))
    if bits is None or not entry.shape or entry.shape[-1] * bits % 8:
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {entry.dtype} and shape {entry.shape}, which "
            "cannot be read. Store it as bfloat16, or as F4 with an even number of columns."
        )
    array = piece.reshape(*entry.shape[:-1], entry.shape[-1] * bits // 8)
    words = Source(array.shape, array.dtype, lambda index: np.array(array[index]), array)
    return viewed(unpacked(words, bits, entry.shape[-1], -1), dtype)
