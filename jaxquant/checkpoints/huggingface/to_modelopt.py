"""Quantized weights in the naming of NVIDIA's Model Optimizer, which has NVFP4 exactly."""

import numpy as np

from ...core import FP8_E4M3, NVFP4, QTensor
from ..bits import pack
from .logical import as_numpy, check_weight, logical

ALGORITHM = "W4A16_NVFP4"


def to_modelopt(name: str, q: QTensor) -> dict[str, np.ndarray]:
    """The tensors of a weight by the end of their names.

    Raises:
        ValueError: it is not in NVFP4 with groups along the last axis, or quantizes activations.
    """
    check_weight(name, q)
    inner, factor = q.scale, np.float32(1)
    if isinstance(inner, QTensor):
        outer = as_numpy(inner.scale)
        factor = outer.reshape(-1)[0] if outer.size == 1 else outer
        inner = inner.codes
    grid = (q.shape[0], q.shape[1] // 16)
    scale = logical(q, inner)
    is_nvfp4 = q.format == NVFP4 and scale.dtype.name == FP8_E4M3.dtype and scale.shape == grid
    if not is_nvfp4 or np.ndim(factor) or (q.inputs and q.inputs.config):
        raise ValueError(
            f"{name} must be in nvfp4 with e4m3 scales of shape {grid} under one float32 scale, "
            f"and leave activations in float; got {q.format} with scales {scale.dtype} of shape "
            f"{scale.shape}, inputs {q.inputs and q.inputs.config}."
        )
    codes = logical(q, q.codes).view(np.uint8) & 15
    return {
        "weight": pack(codes, 4, np.uint8),
        "weight_scale": scale,
        "weight_scale_2": np.asarray(factor, np.float32),
    }
