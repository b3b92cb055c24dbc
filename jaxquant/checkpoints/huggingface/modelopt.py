"""Checkpoints of NVIDIA's Model Optimizer: NVFP4, FP8, MXFP8, INT8 and INT4."""

import dataclasses
from functools import partial

import numpy as np

from ...core import FP8_E4M3, INT4, INT8, MXFP8, NVFP4, ArrayConfig, Format, Inputs, QTensor
from ..bits import unpacked
from ..source import Source
from ..stored import Stored
from .derived import converted, reshaped
from .fields import Fields
from .mapped import Tensor
from .module import (
    E8M0,
    FLOATS,
    Module,
    Pool,
    as_e8m0,
    as_float4,
    check_matrix,
    factors_of,
    nested_scale,
    scalar,
    scale_of,
    shifted,
    with_scale,
)

# Algorithms, and which formats of weights they have.
ALGORITHMS: dict[str, tuple[Format, ...]] = {
    "FP8": (FP8_E4M3,),
    "FP8_PER_CHANNEL_PER_TOKEN": (FP8_E4M3,),
    "NVFP4": (NVFP4,),
    "W4A16_NVFP4": (NVFP4,),
    "NVFP4_AWQ": (NVFP4,),
    "MXFP8": (MXFP8,),
    "W4A16_AWQ": (INT4,),
    "W8A8_SQ_PER_CHANNEL": (INT8,),
    "MIXED_PRECISION": (FP8_E4M3, NVFP4, MXFP8, INT4, INT8),
}


def read(pool: Pool, fields: Fields) -> list[Stored]:
    """The weights of quant_method "modelopt"."""
    name = fields.one_of("quant_algo", ALGORITHMS)
    found = []
    for module in pool.modules("weight_scale"):
        codes = check_matrix(module.need("weight"), (2, 3))
        scale = module.need("weight_scale")
        # Bytes hold 4-bit floats if there is a second scale.
        key = codes.dtype.name, scale.dtype.name in E8M0, "weight_scale_2" in module
        format, reader = _READERS.get(key, (None, None))
        if format not in ALGORITHMS[name] or reader is None:
            wanted = " or ".join(map(str, ALGORITHMS[name]))
            raise codes.invalid(f"a weight in {wanted} for quant_algo {name}, with scales to match")
        found += [reader(module, codes, scale)]
    return found


def _read_nvfp4(module: Module, words: Tensor, scale: Tensor) -> Stored:
    codes = as_float4(unpacked(words.source, 4, 2 * words.shape[-1], -1))
    inner = _grid(module, scale.check(("float8_e4m3fn",)), codes.shape, 16)
    factor = module.need("weight_scale_2").check(("float32",))
    outer = reshaped(factor.source, factors_of(factor, codes.shape))
    module.take("input_scale")
    return _stored(module, NVFP4, codes, nested_scale(inner, outer), None)


def _read_bytes(format: Format, module: Module, codes: Tensor, scale: Tensor) -> Stored:
    """8-bit codes with one scale, or one for each row; activations in the same format."""
    scale.check(FLOATS)
    is_whole = scale.source.size == 1
    blocks = codes.shape if is_whole else (*(1 for _ in codes.shape[:-1]), codes.shape[-1])
    grid = scale_of(module, scale, codes.shape, blocks)
    static = scalar(module.take("input_scale"))
    inputs = (
        Inputs(ArrayConfig(format=format))
        if static is None
        else with_scale(ArrayConfig(format=format, per_tensor=True), static)
    )
    return _stored(module, format, codes.source, grid, inputs)


def _read_mxfp8(module: Module, codes: Tensor, scale: Tensor) -> Stored:
    grid = _grid(module, scale.holding(as_e8m0(scale)), codes.shape, 32)
    return _stored(module, MXFP8, codes.source, grid, Inputs(ArrayConfig(format=MXFP8)))


def _read_int4(module: Module, words: Tensor, scale: Tensor) -> Stored:
    """Two rows in each byte, in two's complement."""
    check_matrix(words)
    codes = unpacked(words.source, 4, 2 * words.shape[0], 0)
    signed = shifted(converted(codes, np.uint8, lambda x: x ^ 8), 8, INT4.dtype)
    columns = scale.check(FLOATS).shape[-1] if scale.shape else 0
    if not columns or codes.shape[-1] % columns:
        raise scale.invalid(f"one scale per group of the weight of shape {codes.shape}")
    grid = _grid(module, scale, codes.shape, codes.shape[-1] // columns)
    module.take("input_scale")
    return _stored(module, INT4, signed, grid, None)


def _grid(module: Module, scale: Tensor, shape: tuple[int, ...], group: int) -> Source:
    return scale_of(module, scale, shape, (*(1 for _ in shape[:-1]), group))


def _stored(
    module: Module,
    format: Format,
    codes: Source,
    scale: Source | QTensor,
    inputs: Inputs | None,
) -> Stored:
    multiplier = module.take("pre_quant_scale")
    if multiplier is not None:
        factors = multiplier.check(FLOATS, codes.shape[-1:]).source
        inputs = dataclasses.replace(inputs or Inputs(), multiplier=factors)
    return module.stored(f"modelopt {format}", format, codes=codes, scale=scale, inputs=inputs)


# Format and reader by the dtype of the codes, whether the scales are exponents, and whether there
# is a second scale.
_READERS = {
    ("uint8", False, True): (NVFP4, _read_nvfp4),
    ("float8_e4m3fn", False, False): (FP8_E4M3, partial(_read_bytes, FP8_E4M3)),
    ("float8_e4m3fn", True, False): (MXFP8, _read_mxfp8),
    ("int8", False, False): (INT8, partial(_read_bytes, INT8)),
    ("uint8", False, False): (INT4, _read_int4),
}
