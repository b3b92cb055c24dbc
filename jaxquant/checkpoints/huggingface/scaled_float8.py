"""Weights in 8-bit floats: "fp8" (DeepSeek, Qwen) with scales of blocks, and "fbgemm_fp8"."""

import numpy as np

from ...core import FP8_E4M3, MXFP4, MXFP8, ArrayConfig, Format, Inputs
from ..bits import unpacked
from ..stored import Stored
from .derived import viewed
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
    grid_of,
    scalar,
    scale_of,
    squeezed,
    with_scale,
)

# Names of scales, all of which are multiplied with, beside "X.weight" or "X".
_SCALES_OF_WEIGHT = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale")
_SCALES_OF_STACK = ("_scale_inv", "_scale")
_STATIC_SCALES = ("input_scale", "activation_scale", "qscale_act")
_SCHEMES = {"dynamic": True, "static": False}
_CODES = ("float8_e4m3fn", "int8")


def read(pool: Pool, fields: Fields) -> list[Stored]:
    """The weights of quant_method "fp8"."""
    fields.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    block = fields.pair("weight_block_size", ())
    is_dynamic = _SCHEMES[fields.one_of("activation_scheme", _SCHEMES, "dynamic")]
    return [_read_module(module, suffix, block, is_dynamic) for module, suffix in _quantized(pool)]


def _quantized(pool: Pool):
    """Each module with codes, and the suffix of its codes."""
    for name, tensor in pool.folder.tensors.items():
        if tensor.dtype.name in _CODES and name in pool.rest and len(tensor.shape) > 1:
            is_weight = name == "weight" or name.endswith(".weight")
            yield (
                (Module(pool, name.removesuffix("weight")), "weight")
                if is_weight
                else (Module(pool, name), "")
            )


def _read_module(module: Module, suffix: str, block: tuple[int, ...], is_dynamic: bool) -> Stored:
    codes = check_matrix(module.need(suffix), (2, 3))
    scale = _take_scale(module, suffix)
    stored, format = codes.source, FP8_E4M3
    if codes.dtype == np.int8:
        # DeepSeek-V4 keeps two 4-bit floats in each int8.
        scale.check(E8M0)
        stored, format = unpacked(viewed(stored, np.uint8), 4, 2 * codes.shape[-1], -1), MXFP4
        stored = as_float4(stored)
    blocks = _blocks(codes, scale, stored.shape, block)
    is_exponent = scale.dtype.name in E8M0
    if is_exponent and blocks[-2:] == (1, 32):
        format = MXFP8 if format is FP8_E4M3 else format
    elif format is MXFP4:
        raise scale.invalid(f"of shape {(*stored.shape[:-1], stored.shape[-1] // 32)}")
    holder = scale.holding(as_e8m0(scale)) if is_exponent else scale.check(FLOATS)
    grid = scale_of(module, holder, stored.shape, blocks)
    inputs = _inputs(module, format, blocks, stored.shape, is_dynamic)
    kind = f"fp8 blocks {blocks[-2]}x{blocks[-1]}" if format is FP8_E4M3 else f"fp8 {format}"
    return module.stored(kind, format, suffix=suffix, codes=stored, scale=grid, inputs=inputs)


def _take_scale(module: Module, suffix: str) -> Tensor:
    names = _SCALES_OF_WEIGHT if suffix else _SCALES_OF_STACK
    present = [name for name in names if name in module]
    if len(present) != 1:
        wanted = " or ".join(module.prefix + name for name in names[:2])
        raise module.invalid(f"needs one tensor {wanted}; got {present}")
    return module.need(present[0])


def _blocks(
    codes: Tensor, scale: Tensor, shape: tuple[int, ...], block: tuple[int, ...]
) -> tuple[int, ...]:
    """The block shape that fits the scales: that of the configuration, or another usual one."""
    *batch, rows, columns = shape
    ones = (1,) * len(batch)
    usual = [(*ones, rows, columns), (*ones, 1, columns)]
    blocks = [*([(*ones, *block)] if block else []), *usual, (*ones, 1, 32)]
    # Without its axes of length 1, the grid of the blocks could look like one scale per row.
    for same, some in ((tuple, blocks), (squeezed, usual)):
        for each in some:
            if same(scale.shape) == same(grid_of(shape, each)):
                return each
    # One scale for all matrices of a stack.
    if scale.source.size == 1:
        return shape
    wanted = " or ".join(map(str, dict.fromkeys(grid_of(shape, each) for each in blocks)))
    raise scale.invalid(f"of shape {wanted}, for weight {codes.name!r} of shape {shape}")


def _inputs(
    module: Module,
    format: Format,
    blocks: tuple[int, ...],
    shape: tuple[int, ...],
    is_dynamic: bool,
) -> Inputs | None:
    """How activations are quantized: in the groups of the weights, or with a static scale."""
    static = next((name for name in _STATIC_SCALES if name in module), None)
    scale = None if static is None else scalar(module.take(static))
    if format is MXFP4:
        return None
    if not is_dynamic:
        if scale is None:
            raise module.invalid("has no tensor 'input_scale', but activation_scheme is static")
        return with_scale(ArrayConfig(format=FP8_E4M3, per_tensor=True), scale)
    size = None if format.group_size or blocks[-1] == shape[-1] else blocks[-1]
    if shape[-1] % (size or 1):
        return None
    return Inputs(ArrayConfig(format=format, group_size=size))


def read_fbgemm(pool: Pool, fields: Fields) -> list[Stored]:
    """The weights of quant_method "fbgemm_fp8": one scale for each row.

    Stacked experts are (E, K, N), and scales of their columns (E, 1, N) or, in some, (E, N, 1).
    """
    found = []
    for module, suffix in _quantized(pool):
        codes = check_matrix(module.need(suffix).check(("float8_e4m3fn",)), (2, 3))
        scale = _take_scale(module, suffix).check(FLOATS)
        *batch, rows, columns = codes.shape
        blocks = (1, rows, 1) if batch else (1, columns)
        scales = scale_of(module, scale, codes.shape, blocks)
        inputs = Inputs(ArrayConfig(format=FP8_E4M3))
        parts = {"codes": codes.source, "scale": scales, "inputs": inputs}
        found += [module.stored("fbgemm fp8", FP8_E4M3, suffix=suffix, **parts)]
    return found
