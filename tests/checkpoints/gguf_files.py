"""GGUF files for tests, written from the description of the format."""

import functools
import struct
from typing import Any

import numpy as np

from jaxquant import QTensor, checkpoints

from .ggml import GOLDEN

# ggml gives 0.0 where the codes of these give -0.0.
NEGATIVE_ZEROS = ("MXFP4", "NVFP4", "TQ2_0", "Q2_0")

# Type codes of metadata: a Python type and how `struct` packs it.
STRING, ARRAY, UINT32, BOOL, FLOAT32, UINT16, INT32 = 8, 9, 4, 7, 6, 2, 5
PACKED = {4: "<I", 7: "<B", 6: "<f", 2: "<H", 5: "<i", 10: "<Q", 0: "<B", 12: "<d"}


@functools.cache
def golden(name):
    """Code of a type, its blocks as bytes (n, nbytes), and the values of ggml (n, elements)."""
    with np.load(GOLDEN) as file:
        return tuple(file[f"{name}.{part}"] for part in ("number", "blocks", "values"))


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind, content):
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        inner, items = content
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, i) for i in items)
    return struct.pack(PACKED[kind], content)


def pair(key, kind, content):
    return string(key) + struct.pack("<I", kind) + value(kind, content)


def tensor(name, shape, number, offset):
    """Description of a tensor; `shape` is NumPy's."""
    axes = struct.pack(f"<I{len(shape)}q", len(shape), *reversed(shape))
    return string(name) + axes + struct.pack("<IQ", number, offset)


def padded(data, alignment=32):
    return data + bytes(-len(data) % alignment)


def gguf(pairs, tensors, version=3, alignment=32):
    """A file of metadata (key, kind, content) and tensors (name, shape, type code, bytes)."""
    header = b"GGUF" + struct.pack("<Iqq", version, len(tensors), len(pairs))
    header += b"".join(pair(*p) for p in pairs)
    data = b""
    for name, shape, number, content in tensors:
        header += tensor(name, shape, number, len(data))
        data += padded(content, alignment)
    return padded(header, alignment) + data


def array(name, content):
    """A float32 tensor for `gguf`."""
    content = np.asarray(content, np.float32)
    return name, content.shape, 0, content.tobytes()


def blocks(name, type_name, rows=2):
    """A tensor of golden blocks for `gguf`, and the values that ggml decodes it to."""
    number, raw, values = golden(type_name)
    values = values.reshape(rows, -1)
    return (name, values.shape, int(number), raw.tobytes()), values


def is_source(x):
    return isinstance(x, checkpoints.Source)


def values_of(stored) -> Any:
    """The numbers of a tensor that was opened."""
    value = checkpoints.put(stored.value)
    return np.asarray(value.dequantize() if isinstance(value, QTensor) else value)
