"""Quantized weights as tensors and configuration of compressed-tensors, which vLLM serves."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ...core import (
    FP8_E4M3,
    INT2,
    INT3,
    INT4,
    INT5,
    INT6,
    INT8,
    MXFP4,
    MXFP8,
    ArrayConfig,
    Format,
    QTensor,
)
from ..bits import pack
from .logical import as_numpy, check_weight, logical
from .module import FLOATS

# Bits of integers, and the names of formats with floating-point codes.
INTEGERS: dict[Format, int] = {INT2: 2, INT3: 3, INT4: 4, INT5: 5, INT6: 6, INT8: 8}
FLOATING: dict[Format, tuple[int, str]] = {
    FP8_E4M3: (8, "float-quantized"),
    MXFP8: (8, "mxfp8-quantized"),
    MXFP4: (4, "mxfp4-pack-quantized"),
}
_ACTIVATIONS: dict[Format, tuple[int, str]] = {
    INT8: (8, "int"),
    INT4: (4, "int"),
    FP8_E4M3: (8, "float"),
    MXFP8: (8, "float"),
}
Tensors = dict[str, np.ndarray]


def to_compressed(name: str, q: QTensor) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a weight by the end of their names, and its entry in config_groups.

    Raises:
        ValueError: compressed-tensors cannot represent it.
    """
    check_weight(name, q)
    if q.format not in INTEGERS and q.format not in FLOATING:
        known = ", ".join(map(str, (*INTEGERS, *FLOATING)))
        raise ValueError(
            f"{name} is in {q.format}; compressed-tensors has {known}. Quantize it to one of these."
        )
    activations, tensors = _activations(name, q)
    scale = _scale(name, q)
    if q.format not in INTEGERS:
        bits, form = FLOATING[q.format]
        own = _floats(q)
    else:
        bits, form = INTEGERS[q.format], "pack-quantized"
        is_packed = bits < 8 or activations is None
        # A packed weight has at least one scale per row, as integers in groups have.
        if scale.shape[0] == 1 and (is_packed or scale.shape[1] > 1):
            scale = np.broadcast_to(scale, (q.shape[0], scale.shape[1]))
        zero = _zero_point(name, q, scale.shape)
        if is_packed:
            own = _packed(q, bits, zero)
        else:
            form = "int-quantized"
            own = {"weight": logical(q, q.codes)}
            own |= {} if zero is None else {"weight_zero_point": zero}
    strategy = _strategy(name, q, scale.shape)
    weights = {
        "num_bits": bits,
        "type": "int" if q.format in INTEGERS else "float",
        "symmetric": q.zero_point is None,
        "dynamic": False,
        **strategy,
    }
    own["weight_scale"] = scale.view(np.uint8) if scale.dtype.itemsize == 1 else scale
    group = {"format": form, "weights": weights, "input_activations": activations}
    return tensors | own, group


def _floats(q: QTensor) -> Tensors:
    codes = logical(q, q.codes)
    if q.format.bits == 8:
        return {"weight": codes}
    return {"weight_packed": pack(codes.view(np.uint8) & 15, 4, np.uint8)}


def _packed(q: QTensor, bits: int, zero: np.ndarray | None) -> Tensors:
    half = 1 << (bits - 1)
    codes = logical(q, q.codes).astype(np.int16) + half
    tensors = {
        "weight_packed": pack(codes, bits, np.int32),
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if zero is not None:
        tensors["weight_zero_point"] = pack(zero.astype(np.int16) + half, bits, np.int32, 0)
    return tensors


def _zero_point(name: str, q: QTensor, grid: tuple[int, ...]) -> np.ndarray | None:
    """Zero points, int8, one for each scale."""
    if q.zero_point is None:
        return None
    zero, half = logical(q, q.zero_point), 1 << (INTEGERS[q.format] - 1)
    low, high = float(zero.min()), float(zero.max())
    if not jnp.issubdtype(zero.dtype, jnp.integer) or low < -half or high >= half:
        raise ValueError(
            f"{name} has zero points in {zero.dtype} from {low:g} to {high:g}; files have integers "
            f"from {-half} to {half - 1} for {q.format}. Quantize it again."
        )
    if any(n not in (1, whole) for n, whole in zip(zero.shape, grid, strict=True)):
        raise ValueError(
            f"{name} has zero points of shape {zero.shape} and scales of shape {grid}; files have "
            "one for each scale. Quantize it again."
        )
    return np.broadcast_to(zero.astype(np.int8), grid)


def _scale(name: str, q: QTensor) -> np.ndarray:
    """Scales that files have: floats, or exponents for the formats of groups of 32."""
    dtypes = (q.format.scale_dtype,) if q.format.group_size else FLOATS
    found = q.scale.format if isinstance(q.scale, QTensor) else q.scale.dtype.name
    if found not in dtypes:
        raise ValueError(
            f"{name} has scales in {found}; files have {' or '.join(dtypes)} for {q.format}. "
            "Quantize it again with such a scale_dtype."
        )
    return logical(q, q.scale)


def _strategy(name: str, q: QTensor, grid: tuple[int, ...]) -> dict[str, Any]:
    """Which elements share a scale."""
    (rows, columns), (across, along) = q.shape, grid
    size, fixed = columns // along, q.format.group_size
    if across == rows and size == (fixed or size):
        is_grouped = along > 1 or fixed
        return {"strategy": "group", "group_size": size} if is_grouped else {"strategy": "channel"}
    if fixed or (q.format in INTEGERS and grid != (1, 1)):
        raise ValueError(
            f"{name} has scales of shape {grid} for shape {q.shape}; files have one per row "
            f"or per group of {fixed or 'some'} columns. Pass weights as (N, K), quantized along "
            "axis 1."
        )
    if grid == (1, 1):
        return {"strategy": "tensor"}
    return {"strategy": "block", "block_structure": [rows // across, size]}


def _activations(name: str, q: QTensor) -> tuple[dict[str, Any] | None, Tensors]:
    """How activations are quantized, and their scale and zero point if these are static."""
    inputs = q.inputs
    config: ArrayConfig | None = None if inputs is None else inputs.config
    if inputs is None or config is None:
        return None, {}
    if config.format not in _ACTIVATIONS:
        raise ValueError(
            f"{name} quantizes activations to {config.format}; compressed-tensors has "
            f"{', '.join(map(str, _ACTIVATIONS))}. Replace its inputs by None."
        )
    bits, kind = _ACTIVATIONS[config.format]
    size = config.group_size or config.format.group_size
    is_whole = config.per_tensor or inputs.scale is not None
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "token"}
    args = {
        "num_bits": bits,
        "type": kind,
        "symmetric": config.symmetric,
        "dynamic": inputs.scale is None,
        **({"strategy": "tensor"} if is_whole else strategy),
    }
    parts = {"input_scale": inputs.scale, "input_zero_point": inputs.zero_point}
    static = {end: as_numpy(x) for end, x in parts.items() if x is not None}
    for end, x in static.items():
        if x.size != 1:
            raise ValueError(
                f"{name} has an {end} of shape {x.shape}; files have one for all activations. "
                "Calibrate it per tensor, or leave it dynamic."
            )
    return args, {end: x.reshape(1) for end, x in static.items()}
