"""Writes GGUF files with other tensors."""

import dataclasses
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from ...core import FP8_E4M3, QTensor
from ...tree.internal import replacing
from ..source import Source
from .block_table import BLOCK_TYPES
from .block_type import BlockType, Leaf, Nested
from .container import Container, TensorInfo, aligned
from .renamed import Entry, read_entries

Array = np.ndarray | jax.Array | Source


class Planned(NamedTuple):
    """What takes the place of a tensor: its type, and a function that makes its bytes."""

    type: BlockType
    encode: Callable[[], np.ndarray]


def write_gguf(
    path: str | os.PathLike[str],
    template: str | os.PathLike[str],
    tensors: Mapping[str, Array | QTensor],
    names: str = "stored",
) -> None:
    """Writes a GGUF file: a template with some of its tensors replaced.

    Metadata (configuration and tokenizer) and the other tensors are copied. A QTensor is written
    exactly: its codes, scales and offsets become the blocks of a type of GGUF that has the same
    ones, preferably the template's. One that was read from a GGUF file gives the bytes that were
    read. Of those that `quantize` makes, these fit:

        ArrayConfig(format=INT4, group_size=32, scale_dtype="float16")      Q4_0
        ArrayConfig(format=INT8, group_size=32, scale_dtype="float16")      Q8_0
        ArrayConfig(format=MXFP4)                                           MXFP4
        ArrayConfig(format=NVFP4)                                           NVFP4

    quantized along the last axis of an array (N, K), or along the contracted axis of a kernel
    (K, N) that is stored in the order (-1, -2). Arrays are written in their dtype.

    Args:
        path: of the new file.
        template: path of a GGUF file that is not split.
        tensors: by name, each in the shape that the template's tensor has.
        names: of `tensors`, as for `open_gguf`. With "huggingface", rows of queries and keys are
            permuted and norms are shifted as GGUF needs them.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the template is malformed, has no tensor of a name, or a tensor does not have
            its shape or cannot be represented exactly.
    """
    containers, entries = read_entries(template, names)
    if len(containers) > 1:
        raise ValueError(
            f"{template} is one of {len(containers)} shards, which cannot be a template. Merge "
            "them with llama-gguf-split --merge."
        )
    planned: dict[str, Planned] = {}
    for name, value in tensors.items():
        if name not in entries:
            raise ValueError(
                f"{template} has no tensor {name!r}; it has {', '.join(list(entries)[:6])}, ..."
            )
        plan = _plan_quantized if isinstance(value, QTensor) else _plan_array
        planned |= plan(name, value, entries[name])
    with replacing(path) as file:
        _write(file, containers[0], planned)


def _plan_array(name: str, value: Any, entry: Entry) -> dict[str, Planned]:
    types = {t.codes.dtype: t for t in BLOCK_TYPES.values() if t.format is None}
    type = types.get(np.dtype(value.dtype))
    if type is None or tuple(value.shape) != entry.info.shape:
        raise ValueError(
            f"{name!r} must be an array of shape {entry.info.shape} and one of the dtypes "
            f"{', '.join(map(str, types))}; got {value.dtype} of shape {tuple(value.shape)}."
        )

    def encode() -> np.ndarray:
        array = _rows(value, entry)
        shift = entry.renamed.shift
        array = array + array.dtype.type(shift) if shift else array
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    return {entry.info.name: Planned(type, encode), **_factor(entry, np.ones(1, np.float32), name)}


def _plan_quantized(name: str, q: Any, entry: Entry) -> dict[str, Planned]:
    info, factor = entry.info, np.ones(1, np.float32)
    if q.zero_point is not None or (q.inputs is not None and q.inputs.changes_weight):
        raise ValueError(
            f"{name!r} has a zero point, a multiplier, a permutation or a rotation, which GGUF "
            f"files do not have; got {q}. The offsets of types such as Q4_1 cannot hold "
            "-zero_point * scale exactly. Quantize with a symmetric scheme."
        )
    if entry.renamed.shift:
        raise ValueError(
            f"{name!r} must be an array, because the file adds {entry.renamed.shift} to it; got "
            f"{q}. Dequantize it."
        )
    if _is_nested(q.scale) and q.scale.format == FP8_E4M3:
        factor = _read(q.scale.scale)
        q = dataclasses.replace(q, scale=q.scale.codes)
    candidates = (info.type, *BLOCK_TYPES.values())
    fitting = [t for t in candidates if t.is_written and _fits(t, q, info.shape)]
    if not fitting:
        raise ValueError(
            f"{name!r} fits no type of GGUF; got {q} for shape {info.shape}. Quantize along the "
            "last axis of (N, K) with format INT4 or INT8, group_size=32 and "
            "scale_dtype='float16', or give it as a float16 or float32 array. The types IQ1, IQ2 "
            "and IQ3 are only read."
        )
    type = fitting[0]

    def encode() -> np.ndarray:
        arrays = [_converted(_rows(a, entry), leaf, name) for leaf, a in _pairs(type, q)]
        flat = [a.reshape(-1, leaf.count) for a, leaf in zip(arrays, type.leaves, strict=True)]
        try:
            return type.encode(flat).reshape(-1)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}; got {q}.") from error

    return {info.name: Planned(type, encode), **_factor(entry, factor, name)}


def _factor(entry: Entry, values: np.ndarray, name: str) -> dict[str, Planned]:
    """The factor of the scales, in the tensor where the template has it."""
    if entry.factor is not None:
        info = entry.factor
        count = info.raw.size // info.type.nbytes
        if values.size in (1, count):
            data = np.broadcast_to(values.astype(np.float32).reshape(-1), count)
            return {info.name: Planned(info.type, lambda: data.copy().view(np.uint8))}
    if entry.factor is None and (values == 1).all():
        return {}
    raise ValueError(
        f"{name!r} has {values.size} factors of its scales, {values.reshape(-1)[:4]}, for which "
        "the template has no tensor. Take a template that has one."
    )


def _pairs(type: BlockType, q: Any) -> list[tuple[Leaf, Any]]:
    """The arrays of a QTensor beside the leaves of a type; empty if they do not correspond."""
    pairs = [(type.codes, q.codes)]
    for part, value in ((type.scale, q.scale), (type.offset, q.offset)):
        if isinstance(part, Nested) and _is_nested(value) and value.format == part.format:
            pairs += [(part.codes, value.codes), (part.scale, value.scale)]
        elif isinstance(part, Leaf) and value is not None and not isinstance(value, QTensor):
            pairs += [(part, value)]
        elif part is not None or value is not None:
            return []
    return pairs


def _is_nested(scale: Any) -> bool:
    """Whether scales or offsets are codes * scale, with an array as the scale."""
    if not isinstance(scale, QTensor) or isinstance(scale.scale, QTensor):
        return False
    return scale.zero_point is None and scale.offset is None


def _fits(type: BlockType, q: Any, shape: tuple[int, ...]) -> bool:
    """Whether the type has the same arrays as a QTensor. A template's axes are those stored."""
    pairs = _pairs(type, q)
    if q.format != type.format or not pairs or not shape or shape[-1] % type.elements:
        return False
    blocks = shape[-1] // type.elements
    return all(tuple(a.shape) == (*shape[:-1], blocks * leaf.count) for leaf, a in pairs)


def _read(array: Array) -> np.ndarray:
    return array.read() if isinstance(array, Source) else np.asarray(array)


def _rows(array: Array, entry: Entry) -> np.ndarray:
    """The array with its rows in the order of the file."""
    values = _read(array)
    return values if entry.renamed.rows is None else values[np.argsort(entry.renamed.rows)]


def _converted(array: np.ndarray, leaf: Leaf, name: str) -> np.ndarray:
    """The array in the dtype of the leaf, which must have the same values."""
    if array.dtype == leaf.dtype:
        return array
    with np.errstate(over="ignore"):
        converted = array.astype(leaf.dtype)
    if not np.array_equal(converted.astype(np.float64), array.astype(np.float64), equal_nan=True):
        raise ValueError(
            f"{name!r}: GGUF keeps its scales in {leaf.dtype}, which does not have all of the "
            f"{array.dtype} values. Quantize with scale_dtype='{leaf.dtype}'."
        )
    return converted


def _write(file: BinaryIO, container: Container, planned: Mapping[str, Planned]) -> None:
    alignment = container.alignment
    types = {
        t.name: planned[t.name].type if t.name in planned else t.type for t in container.tensors
    }
    file.write(container.data[: container.described].data)
    offset = 0
    for tensor in container.tensors:
        file.write(_description(tensor, types[tensor.name], offset))
        offset = aligned(offset + _nbytes(tensor, types[tensor.name]), alignment)
    # Files end with the last tensor or with the padding after it; the template says which.
    ends_aligned = container.data.size % alignment == 0
    for tensor in container.tensors:
        _pad(file, alignment)
        plan = planned.get(tensor.name)
        file.write((tensor.raw if plan is None else plan.encode()).data)
    if ends_aligned:
        _pad(file, alignment)


def _nbytes(tensor: TensorInfo, type: BlockType) -> int:
    return (
        tensor.raw.size // tensor.type.nbytes * tensor.type.elements // type.elements * type.nbytes
    )


def _description(tensor: TensorInfo, type: BlockType, offset: int) -> bytes:
    name, axes = tensor.name.encode(), len(tensor.shape)
    lengths = struct.pack(f"<I{axes}q", axes, *reversed(tensor.shape))
    return struct.pack("<Q", len(name)) + name + lengths + struct.pack("<IQ", type.number, offset)


def _pad(file: BinaryIO, alignment: int) -> None:
    position = file.tell()
    file.write(bytes(aligned(position, alignment) - position))
