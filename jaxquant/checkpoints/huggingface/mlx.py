"""MLX: affine codes of 2 to 8 bits with scales and biases, mxfp4, mxfp8 and nvfp4."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ...core import (
    MXFP4,
    MXFP8,
    NVFP4,
    UINT2,
    UINT3,
    UINT4,
    UINT5,
    UINT6,
    UINT8,
    Format,
)
from ..bits import unpacked
from ..stored import Stored
from .derived import viewed
from .fields import MAX_SIZE, Fields
from .module import FLOATS, Module, Pool, check_matrix, scale_of

_AFFINE: dict[int, Format] = {2: UINT2, 3: UINT3, 4: UINT4, 5: UINT5, 6: UINT6, 8: UINT8}
# Formats of other modes; affine has one for each number of bits.
_MODES: dict[str, Format | None] = {"affine": None, "mxfp4": MXFP4, "mxfp8": MXFP8, "nvfp4": NVFP4}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a module is quantized: elements per scale, bits per code, and a format or None."""

    group_size: int
    bits: int
    format: Format | None


def read(pool: Pool, fields: Fields) -> list[Stored]:
    """The weights of a model with a "quantization" table."""
    general = _settings(fields)
    return [
        _read_module(module, _settings_of(module, general, fields))
        for module in pool.modules("scales")
    ]


def _settings(fields: Fields) -> Settings:
    format = _MODES[fields.one_of("mode", _MODES, "affine")]
    # Modes of floats fix both; 64 and 4 are MLX's defaults for affine.
    size, bits = (format.group_size, format.bits) if format else (64, 4)
    found = Settings(
        fields.integer("group_size", 1, MAX_SIZE, size),
        fields.integer("bits", 2, 8, bits),
        format,
    )
    if format is None and found.bits not in _AFFINE:
        raise fields.invalid("bits", f"one of {', '.join(map(str, _AFFINE))}")
    if format is not None and (found.group_size, found.bits) != (size, bits):
        raise fields.invalid("mode", f"affine, unless group_size is {size} and bits is {bits}")
    return found


def _settings_of(module: Module, general: Settings, fields: Fields) -> Settings:
    """The settings of a module: those under its path, or the general ones.

    MLX does not combine them: what a module's own settings lack has MLX's default, such as the
    mode "affine" of the routers in models whose mode is "mxfp4".
    """
    name = module.prefix.removesuffix(".")
    if name not in fields or isinstance(fields.values[name], bool):
        return general
    return _settings(fields.section(name))


def _read_module(module: Module, settings: Settings) -> Stored:
    bits, format = settings.bits, settings.format
    scales = module.need("scales")
    words = check_matrix(module.need("weight").check(("uint32",)), (2, 3))
    columns = words.shape[-1] * 32 // bits
    codes = unpacked(words.source, bits, columns, -1)
    blocks = (*(1 for _ in words.shape[:-1]), settings.group_size)
    shape = codes.shape
    grid = (*shape[:-1], -(-columns // settings.group_size))
    if columns % settings.group_size or scales.shape != grid:
        raise scales.invalid(f"of shape {grid}, for a weight of shape {shape} in {bits} bits")
    parts: dict[str, Any] = {}
    note = ""
    if format is None:
        format = _AFFINE[bits]
        parts["scale"] = scale_of(module, scales.check(FLOATS), shape, blocks)
        names = [name for name in ("biases", "qbiases") if name in module] or ["biases"]
        offset = module.need(names[0]).check(FLOATS, scales.shape)
        parts["offset"] = scale_of(module, offset, shape, blocks)
        if scales.dtype.itemsize < 4:
            note = f"MLX multiplies and adds in {scales.dtype}; here, both are done in float32"
    else:
        parts["scale"] = viewed(scales.check(("uint8",)).source, jnp.dtype(format.scale_dtype))
    parts["codes"] = viewed(codes, format.dtype)
    return module.stored(f"mlx {format} g{settings.group_size}", format, note=note, **parts)
