"""The safetensors container: a JSON header, then the bytes of the arrays.

This replaces the `safetensors` package, which opens the file by name for each array, so that a
file replaced in the meantime looks altered; writes metadata in random order; and cannot return
8-bit floating-point dtypes to NumPy.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

# NumPy's dtype of each dtype of safetensors.
DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
}
_BITS = {name: 8 * np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
# Dtypes that NumPy does not have in this packed form.
_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_NAMES = {np.dtype(dtype).name: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
# The longest header that safetensors reads.
MAX_HEADER_BYTES = 100_000_000
# The errors that malformed JSON values raise.
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Entry(NamedTuple):
    """Where an array lies: its dtype by safetensors' name, and its bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A safetensors file, open for reading and checked to be whole.

    Attributes:
        path: its name, for error messages.
        file: the open file. All reads go through it, so they see one version of the file.
        start: where the first array starts.
        entries: of each array, by name.
        metadata: strings of the header.
    """

    path: str | os.PathLike[str]
    file: io.BufferedReader
    start: int
    entries: dict[str, Entry]
    metadata: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """One array, by name.

        Raises:
            ValueError: NumPy does not have its dtype.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{self.path}: tensor {name!r} has dtype {entry.dtype}, which NumPy does not have. "
                "Store it as bfloat16 or float32."
            )
        array = np.empty(entry.stop - entry.start, np.uint8)
        self.file.seek(self.start + entry.start)
        count = self.file.readinto(array.data)
        if count != array.size:
            raise ValueError(f"{self.path} was truncated while {name!r} was read. Copy it again.")
        return array.view(DTYPES[entry.dtype]).reshape(entry.shape)


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts like one of safetensors, whatever its name.

    It starts with the length of its header, which may be any bytes, and with the header, an object
    in JSON.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is a folder or a device.
    """
    check_regular(path)
    with open(path, "rb") as file:
        start, size = file.read(9), os.fstat(file.fileno()).st_size
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < size


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[TensorFile]:
    """Yields a safetensors file, open for reading.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is a folder or a device, truncated, altered, or not safetensors.
    """
    check_regular(path)
    with open(path, "rb") as file:
        length, header = _read_header(file, path)
        try:
            metadata = header.pop(METADATA, {})
            check_strings(metadata)
            entries = {name: _entry(fields) for name, fields in header.items()}
            size = _contiguous_bytes(entries)
        except MALFORMED as error:
            raise ValueError(
                f"{path} was altered: its header is malformed, {summary(error)}. Copy it again."
            ) from error
        _check_size(file, 8 + length + size, path)
        yield TensorFile(path, file, 8 + length, entries, metadata)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raises if there is something other than a regular file at `path`.

    Raises:
        FileNotFoundError: there is nothing.
        IsADirectoryError: it is a folder.
        ValueError: it is a device, a FIFO or a socket, which reading could block and replacing
            would destroy.
    """
    # A Path, because "" is the current folder.
    mode = os.stat(Path(path)).st_mode
    if stat.S_ISDIR(mode):
        example = Path(path) / "model.safetensors"
        raise IsADirectoryError(f"{path} is a folder; name a file, such as {example}.")
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{path} is a device, FIFO or socket (mode {stat.filemode(mode)}); name a regular file."
        )


def check_strings(metadata: Mapping[str, str]) -> None:
    """Raises if metadata is not of strings.

    Raises:
        ValueError: a key or value is not a str.
    """
    if not all(isinstance(s, str) for item in metadata.items() for s in item):
        raise ValueError(f"metadata must map str to str; got {metadata!r}. Use json.dumps.")


def summary(error: BaseException) -> str:
    """The first line of an error, shortened."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) < 200 else f"{text[:200]}..."


def bytes_of_array(array: np.ndarray) -> Iterator[Any]:
    """The bytes of a C-contiguous array, in one piece."""
    yield array.reshape(-1).view(np.uint8).data


def write_tensors(
    file: BinaryIO,
    arrays: Mapping[str, Any],
    metadata: Mapping[str, str],
    pieces: Callable[[Any], Iterator[Any]] = bytes_of_array,
) -> None:
    """Writes arrays and strings. The bytes do not depend on their order.

    Args:
        file: open for writing.
        arrays: by name, C-contiguous and little-endian, of dtypes that safetensors has; or what
            has their dtype, shape and nbytes.
        metadata: strings for the header.
        pieces: the bytes of an array, piece by piece.

    Raises:
        ValueError: the header would be longer than safetensors can read.
    """
    # The widest first, so that each array is aligned in the file, as safetensors requires.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {METADATA: dict(metadata)}
    stop = 0
    for name in order:
        array = arrays[name]
        start, stop = stop, stop + array.nbytes
        fields = {"dtype": _NAMES[array.dtype.name], "shape": list(array.shape)}
        header[name] = {**fields, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"The tree has too many leaves for one file: its header takes {len(text)} bytes, and "
            f"safetensors reads {MAX_HEADER_BYTES}. Stack the layers, or save parts of it."
        )
    file.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        for piece in pieces(arrays[name]):
            file.write(piece)


def _read_header(file, path) -> tuple[int, dict[str, Any]]:
    """Length and contents of the header."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    text = file.read(min(length, MAX_HEADER_BYTES, size))
    is_container = length <= MAX_HEADER_BYTES and text.startswith(b"{")
    if not is_container and b'"weight_map"' in start + text[:65536]:
        raise ValueError(
            f"{path} is the index of a checkpoint of several files, "
            "which jaxquant.checkpoints.open reads. Name one of its .safetensors files here."
        )
    if not is_container:
        raise ValueError(
            f"{path} is not a safetensors file: {size} bytes, and no header at the start. Choose "
            "another file."
        )
    if len(text) == length:
        try:
            return length, dict(json.loads(text))
        except MALFORMED as error:
            raise ValueError(
                f"{path} was altered: its header is malformed, {summary(error)}. Copy it again."
            ) from error
    _check_size(file, 8 + length, path)
    return length, {}


def _check_size(file, expected, path):
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        state = "truncated" if size < expected else "altered"
        raise ValueError(
            f"{path} is {state}: it has {size} bytes, but its header says {expected}. Copy it "
            "again."
        )


def _entry(fields) -> Entry:
    dtype, shape, (start, stop) = (fields[k] for k in ("dtype", "shape", "data_offsets"))
    if dtype not in _BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    if not all(type(n) is int for n in (*shape, start, stop)):
        raise TypeError(f"sizes must be integers, got shape {shape}, offsets {start}, {stop}")
    np.broadcast_to(np.uint8(0), shape)  # Raises unless it is a shape.
    if math.prod(shape) * _BITS[dtype] != 8 * (stop - start):
        raise ValueError(f"{dtype} of shape {shape} does not take {stop - start} bytes")
    return Entry(dtype, tuple(shape), start, stop)


def _contiguous_bytes(entries) -> int:
    """The bytes of all arrays, which must be contiguous."""
    end = 0
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.stop)):
        if entry.start != end:
            raise ValueError(f"a tensor starts at byte {entry.start}, not {end}")
        end = entry.stop
    return end
