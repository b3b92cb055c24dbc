"""The C functions of ggml, which llama.cpp quantizes files with, from the package `xllamacpp`."""

import ctypes
from functools import cache
from typing import Any

import numpy as np

from ..llama_cpp import packaged_library


@cache
def library() -> Any:
    """The shared library of the package.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    found = ctypes.CDLL(str(packaged_library()))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    return found


class _Traits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("elements", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("nbytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def round_trip(number: int, weight: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """A matrix (N, K) through a type of ggml, with the importance (K,) of its columns."""
    ggml = library()
    traits = ggml.ggml_get_type_traits(number).contents
    rows, columns = weight.shape
    weight, importance = np.ascontiguousarray(weight), np.ascontiguousarray(importance)
    blocks = np.empty(weight.size // traits.elements * traits.nbytes, np.uint8)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (weight, blocks, importance)]
    ggml.ggml_quantize_chunk(
        ctypes.c_int(number),
        pointers[0],
        pointers[1],
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        pointers[2],
    )
    decoded = np.empty_like(weight)
    traits.to_float(blocks.ctypes.data, decoded.ctypes.data, decoded.size)
    return decoded
