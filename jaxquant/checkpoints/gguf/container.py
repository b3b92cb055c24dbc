"""The GGUF container: metadata, descriptions of tensors, and where their bytes lie.

The format is described in docs/gguf.md of https://github.com/ggml-org/ggml. Counts, lengths and
offsets of a file are compared with its size before anything is allocated.
"""

import dataclasses
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ...tree.internal import check_regular
from .block_table import block_type
from .block_type import BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_AXES = 4
# ggml keeps names in 64 bytes, the last of which is 0.
MAX_NAME_BYTES = 63
_DEFAULT_ALIGNMENT = 32
_ALIGNMENT = "general.alignment"
# The smallest entries: a key and a value of a byte each, a tensor without axes.
_MIN_PAIR_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8
# How `struct` calls the numbers of metadata, by type code.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    10: "Q",
    11: "q",
    12: "d",
}
_LENGTH = struct.Struct("<Q")
_UINT32, _ARRAY = 4, 9
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: in the file.
        type: how its elements are stored.
        shape: in NumPy's order: the last axis is the one stored contiguously.
        raw: its bytes in the mapped file, uint8 (nbytes,).
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    raw: np.ndarray


@dataclasses.dataclass(frozen=True)
class Container:
    """A file whose header has been read and checked.

    Attributes:
        path: of the file.
        metadata: Python values by key.
        tensors: in the order of the file.
        data: the mapped file, uint8.
        described: where the descriptions of the tensors start.
        start: where the first tensor starts.
        alignment: each tensor starts at a multiple of it after `start`.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    data: np.ndarray
    described: int
    start: int
    alignment: int


class _Cursor:
    """Reads the header of a file from front to back."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data, self.bytes, self.position = path, data, data.data, 0

    def error(self, field: str, problem: str) -> ValueError:
        return ValueError(
            f"{self.path}: {field}: {problem}. The file is damaged or incomplete; copy it again."
        )

    def require(self, count: int, size: int, field: str) -> None:
        """Raises unless `count` items of at least `size` bytes follow."""
        left = len(self.bytes) - self.position
        if not 0 <= count * size <= left:
            raise self.error(field, f"{count} x {size} bytes are more than the {left} left")

    def number(self, code: str, field: str) -> Any:
        return self.numbers(code, 1, field)[0]

    def numbers(self, code: str, count: int, field: str) -> list[Any]:
        size = struct.calcsize(f"<{code}")
        self.require(count, size, field)
        values = struct.unpack_from(f"<{count}{code}", self.bytes, self.position)
        self.position += count * size
        return list(values)

    def string(self, field: str) -> str:
        return self.strings(1, field)[0]

    def strings(self, count: int, field: str) -> list[str]:
        self.require(count, 8, field)
        spans, stop, size = [], self.position, len(self.bytes)
        for i in range(count):
            start = stop + _LENGTH.size
            stop = start + _LENGTH.unpack_from(self.bytes, stop)[0] if start <= size else start
            if stop > size:
                raise self.error(field, f"text {i} ends at {stop}, the file at {size}")
            spans.append((start, stop))
        self.position = stop
        try:
            return [str(self.bytes[start:stop], "utf-8") for start, stop in spans]
        except UnicodeDecodeError as error:
            raise self.error(field, f"not UTF-8 ({error.reason} at byte {error.start})") from error

    def value(self, kind: int, field: str, count: int | None = None) -> Any:
        """One value of metadata, or a list of `count`."""
        if kind == _ARRAY and count is None:
            inner = self.number("I", f"element type of {field}")
            return self.value(inner, field, self.number("Q", f"number of elements of {field}"))
        if kind not in _VALUES:
            within = "" if count is None else " as elements of an array"
            raise self.error(field, f"values of type {kind}{within} do not exist")
        values = _VALUES[kind](self, 1 if count is None else count, field)
        return values[0] if count is None else values

    def flags(self, count: int, field: str) -> list[bool]:
        values = self.numbers("B", count, field)
        if max(values, default=0) > 1:
            raise self.error(field, f"a bool must be 0 or 1; got {max(values)}")
        return [bool(v) for v in values]


def _numbers(code: str) -> Callable[[_Cursor, int, str], list[Any]]:
    return lambda cursor, count, field: cursor.numbers(code, count, field)


# Readers of `count` values of metadata, by type code. Arrays, type 9, hold values of one of these.
_VALUES: dict[int, Callable[[_Cursor, int, str], list[Any]]] = {
    **{kind: _numbers(code) for kind, code in _NUMBERS.items()},
    7: _Cursor.flags,
    8: _Cursor.strings,
}


def read_container(path: str | os.PathLike[str]) -> Container:
    """Maps one file and reads its header.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it is not a GGUF file of version 2 or 3 that is little-endian and complete.
    """
    path = Path(path)
    check_regular(path)
    size = path.stat().st_size
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    cursor = _Cursor(path, data)
    _check_version(cursor)
    n_tensors = cursor.number("q", "number of tensors")
    n_pairs = cursor.number("q", "number of metadata entries")
    cursor.require(n_pairs, _MIN_PAIR_BYTES, "number of metadata entries")
    cursor.require(n_tensors, _MIN_TENSOR_BYTES, "number of tensors")
    metadata = _read_metadata(cursor, n_pairs)
    alignment = _alignment(cursor, metadata)
    described = cursor.position
    headers = [_read_tensor(cursor, i) for i in range(n_tensors)]
    start = aligned(cursor.position, alignment)
    tensors = _place(cursor, headers, start, alignment)
    values = {key: value for key, (_, value) in metadata.items()}
    return Container(path, values, tensors, data, described, start, alignment)


def _check_version(cursor) -> None:
    magic = bytes(cursor.bytes[:4])
    if magic != MAGIC:
        raise ValueError(
            f"{cursor.path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}. Choose "
            "another file."
        )
    cursor.position = len(MAGIC)
    version = cursor.number("I", "version")
    if version in VERSIONS:
        return
    if version and not version & 0xFFFF:
        raise ValueError(
            f"{cursor.path} is a big-endian GGUF file (version bytes {version:#x}), which is not "
            "supported. Convert it with gguf-convert-endian of the gguf package."
        )
    raise ValueError(
        f"{cursor.path} is GGUF version {version}; versions 2 and 3 are supported. Convert the "
        "original model again with a current llama.cpp."
    )


def _read_metadata(cursor, count) -> dict[str, tuple[int, Any]]:
    """Type code and value by key."""
    metadata: dict[str, tuple[int, Any]] = {}
    for i in range(count):
        key = cursor.string(f"key {i} of the metadata")
        if not key or key in metadata:
            raise cursor.error(f"key {i} of the metadata", f"{key!r} is empty or repeated")
        kind = cursor.number("I", f"type of {key!r}")
        metadata[key] = kind, cursor.value(kind, f"value of {key!r}")
    return metadata


def _alignment(cursor, metadata) -> int:
    kind, alignment = metadata.get(_ALIGNMENT, (_UINT32, _DEFAULT_ALIGNMENT))
    if kind != _UINT32 or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(_ALIGNMENT, f"must be a power of two of type 4; got {alignment!r}")
    return alignment


def _read_tensor(cursor, index) -> tuple[str, BlockType, tuple[int, ...], int]:
    """Name, type, shape and offset."""
    name = cursor.string(f"name of tensor {index}")
    if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise cursor.error(f"name of tensor {index}", f"{name!r} is empty or too long")
    axes = cursor.number("I", f"number of axes of {name!r}")
    if axes > MAX_AXES:
        raise cursor.error(f"number of axes of {name!r}", f"{axes} is more than {MAX_AXES}")
    shape = tuple(reversed(cursor.numbers("q", axes, f"shape of {name!r}")))
    number = cursor.number("I", f"type of {name!r}")
    try:
        type = block_type(number)
    except ValueError as error:
        raise ValueError(f"{cursor.path}: type of {name!r}: {error}") from error
    if any(n < 1 for n in shape) or (shape or (1,))[-1] % type.elements:
        raise cursor.error(
            f"shape of {name!r}",
            f"{shape} is not of positive lengths, the last a multiple of {type.elements}, as "
            f"{type} requires",
        )
    return name, type, shape, cursor.number("Q", f"offset of {name!r}")


def _place(cursor, headers, start, alignment) -> tuple[TensorInfo, ...]:
    """Checks that the tensors follow each other, as ggml requires, up to the end of the file."""
    size, end, tensors = len(cursor.bytes), start, {}
    for name, type, shape, offset in headers:
        begin = aligned(end, alignment)
        if start + offset != begin:
            raise cursor.error(f"offset of {name!r}", f"must be {begin - start}; got {offset}")
        end = begin + math.prod(shape) // type.elements * type.nbytes
        if end > size:
            raise cursor.error(f"bytes of {name!r}", f"they end at {end}, the file at {size}")
        if name in tensors:
            raise cursor.error(f"name of tensor {len(tensors)}", f"{name!r} is repeated")
        tensors[name] = TensorInfo(name, type, shape, cursor.data[begin:end])
    if not (end if headers else cursor.position) <= size <= aligned(end, alignment):
        raise cursor.error("end of the tensors", f"they end at {end}, the file at {size}")
    return tuple(tensors.values())


def aligned(position: int, alignment: int) -> int:
    """The smallest multiple of the alignment that is not below a position."""
    return -(-position // alignment) * alignment


def read_containers(path: str | os.PathLike[str]) -> list[Container]:
    """The containers of a model: one, or all shards of which `path` names one.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is malformed, as for `read_container`, or the shards do not belong
            together.
    """
    path = Path(path)
    first = read_container(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or count < 2:
        return [first]
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise ValueError(
            f"{path}: split.count: the file is one of {count} shards, so its name must end in "
            f"-00001-of-{count:05d}.gguf, like the others'. Rename the files."
        )
    names = (f"{match['stem']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count))
    shards = [read_container(path.with_name(name)) for name in names]
    _check_shards(shards, count)
    return shards


def _check_shards(shards, count) -> None:
    seen = set()
    for i, shard in enumerate(shards):
        for key, wanted in (("split.count", count), ("split.no", i)):
            if shard.metadata.get(key) != wanted:
                raise ValueError(
                    f"{shard.path}: {key}: must be {wanted} in this shard; got "
                    f"{shard.metadata.get(key)!r}. Take all shards from one model."
                )
        names = {t.name for t in shard.tensors}
        if names & seen:
            raise ValueError(
                f"{shard.path}: name of tensor: {min(names & seen)!r} is in an earlier shard too. "
                "Take all shards from one model."
            )
        seen |= names
    total = shards[0].metadata.get("split.tensors.count", len(seen))
    if total != len(seen):
        raise ValueError(
            f"{shards[0].path}: split.tensors.count: must be {len(seen)}, the tensors in all "
            f"shards; got {total!r}. Take all shards from one model."
        )
