"""Reads the tensors of a file that PyTorch wrote before 2020, without PyTorch.

Such a file is a sequence of pickles: a number that all of them start with, the version, the sizes
of C types, the tensors by name, and the keys of their storages. Then follow the storages, each
a count and its elements. Unpickling makes dicts and tensors and calls nothing else, so that a file
cannot run code.
"""

import collections
import math
import pathlib
import pickle
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001


class Tensor(NamedTuple):
    """Where a tensor is: its storage, the first element there, its shape and strides."""

    storage: tuple[str, np.dtype]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage, offset, shape, strides, *_):
    return Tensor(storage, offset, shape, strides)


# All that a pickle may name. Types of elements cannot be called.
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "LongStorage"): np.dtype("<i8"),
}


class Unpickler(pickle.Unpickler):
    """Reads dicts of tensors."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """What a name stands for."""
        if (module_name, global_name) not in _NAMES:
            raise ValueError(
                "The file must hold nothing but float32 and int64 tensors by name; got "
                f"{module_name}.{global_name}."
            )
        return _NAMES[module_name, global_name]

    def persistent_load(self, pid: Any) -> tuple[str, np.dtype]:
        """The key and the dtype of a storage."""
        _, dtype, key, *_ = pid
        return key, dtype


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors by name.

    Raises:
        ValueError: the file is of another kind or cut short, holds other objects than tensors, or
            a tensor that reaches beyond its storage.
    """
    with path.open("rb") as file:
        start = [_load(file) for _ in range(3)][:2]
        if start != [_MAGIC, _VERSION]:
            raise ValueError(f"{path} must be a file of PyTorch before 2020; it starts {start}.")
        tensors = _load(file)
        if not (isinstance(tensors, dict) and all(isinstance(x, Tensor) for x in tensors.values())):
            raise ValueError(f"{path} must hold tensors by name; got {tensors!r:.200}.")
        dtypes, keys = dict(tensor.storage for tensor in tensors.values()), _load(file)
        if set(keys) != set(dtypes):
            raise ValueError(
                f"{path} must hold the storages {[*dtypes]} of its tensors; got {keys}."
            )
        storages = {key: _storage(file, dtypes[key]) for key in keys}
    return {name: _elements(name, x, storages[x.storage[0]]) for name, x in tensors.items()}


def _load(file: BinaryIO) -> Any:
    """The next pickle in the file."""
    try:
        return Unpickler(file).load()
    except (EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"The file is cut short, or not one of PyTorch before 2020: {error}."
        ) from error


def _storage(file: BinaryIO, dtype: np.dtype) -> np.ndarray:
    """The next storage in the file."""
    count = int.from_bytes(file.read(8), "little")
    found = file.read(count * dtype.itemsize)
    if len(found) != count * dtype.itemsize:
        raise ValueError(f"The file is cut short: a storage must have {count} elements of {dtype}.")
    return np.frombuffer(found, dtype)


def _elements(name: str, tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """The values of a tensor, a view of its storage."""
    steps = [(n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
    # Without elements, a tensor can be anywhere.
    last = tensor.offset + sum(steps) if math.prod(tensor.shape) else -1
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0 or last >= len(storage):
        raise ValueError(
            f"{name} must lie within the {len(storage)} elements of its storage; got {tensor}."
        )
    bytes_of = [stride * storage.itemsize for stride in tensor.strides]
    start = storage[tensor.offset :]
    return np.lib.stride_tricks.as_strided(start, tensor.shape, bytes_of, writeable=False)
