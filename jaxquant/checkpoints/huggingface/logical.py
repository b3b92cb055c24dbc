"""Parts of quantized weights as NumPy arrays, with the axes of the weight: (N, K)."""

from typing import Any

import numpy as np

from ...core import QTensor
from ..source import Source


def as_numpy(x: Any) -> np.ndarray:
    """An array of a device or of a file."""
    return x.read() if isinstance(x, Source) else np.asarray(x)


def logical(q: QTensor, part: Any) -> np.ndarray:
    """Codes, scales or zero points with their axes in the order of the weight's."""
    return as_numpy(part).transpose(q.stored_axes(range(q.ndim)))


def check_weight(name: str, q: QTensor) -> None:
    """Raises unless files of safetensors can hold a quantized weight under its name.

    Raises:
        ValueError: it is empty, not a matrix, or not named "....weight"; or it has parts that
            files do not have.
    """
    if not name.endswith(".weight") or q.ndim != 2 or not q.size:
        raise ValueError(
            "Quantized weights must be matrices (N, K) with elements, and names such as "
            f"'layers.0.q_proj.weight'; got {name!r} of shape {q.shape}. Unstack experts and "
            "layers."
        )
    is_integer = q.zero_point is not None and q.format.rounds
    extra = {
        "a zero point of floating-point codes": None if is_integer else q.zero_point,
        "an offset": q.offset,
        "values in training": q.values,
        "a multiplier of activations": q.inputs and q.inputs.multiplier,
        "a permutation of activations": q.inputs and q.inputs.permutation,
        "a rotation of activations": q.inputs and q.inputs.rotation,
    }
    found = [what for what, part in extra.items() if part is not None]
    if found:
        raise ValueError(
            f"{name} has {found[0]}, which files of Hugging Face folders cannot hold. Dequantize "
            "it, or quantize it again."
        )
