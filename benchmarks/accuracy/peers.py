"""Other programs' quantizers, on the same weights and importance: what their files decode to."""

import ctypes
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.methods import MeanSquare, SecondMoment

# Types of llama.cpp with blocks of 32, which divide all widths, by their codes.
GGML_TYPES: Mapping[str, int] = {
    "llama.cpp Q4_0, imatrix": 2,
    "llama.cpp IQ4_NL, imatrix": 20,
    "llama.cpp Q4_1, imatrix": 3,
}


def ggml() -> Any:
    """The C functions of ggml in the package `xllamacpp`, or None if it is not installed."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(str(next(pathlib.Path(spec.origin).parent.glob("xllamacpp*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    return library


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


def bits_of(library: Any, number: int) -> float:
    """Bits per weight of a type of ggml."""
    traits = library.ggml_get_type_traits(number).contents
    return 8 * traits.nbytes / traits.elements


def by_ggml(library: Any, number: int, layers: Any, statistics: Mapping[str, Any]) -> Any:
    """The kernels of stacked layers, quantized with an importance matrix and decoded again."""
    out = dict(layers)
    for name, layer in layers.items():
        if not isinstance(layer, Mapping) or "kernel" not in layer:
            continue
        second = statistics[f"layers/0/{name}/kernel"][SecondMoment]
        square = MeanSquare(np.diagonal(second.total, axis1=-2, axis2=-1), second.count).finish()
        kernel = np.asarray(layer["kernel"], np.float32)
        pairs = zip(kernel, np.asarray(square, np.float32), strict=True)
        decoded = np.stack([_round_trip(library, number, *pair) for pair in pairs])
        out[name] = {**layer, "kernel": jnp.asarray(decoded)}
    return out


def _round_trip(
    library: Any, number: int, weight: np.ndarray, importance: np.ndarray
) -> np.ndarray:
    """A matrix (N, K) through a type of ggml."""
    traits = library.ggml_get_type_traits(number).contents
    rows, columns = weight.shape
    weight, importance = np.ascontiguousarray(weight), np.ascontiguousarray(importance)
    blocks = np.empty(weight.size // traits.elements * traits.nbytes, np.uint8)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (weight, blocks, importance)]
    library.ggml_quantize_chunk(
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
