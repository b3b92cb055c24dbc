"""Weights stored as (K, N) integers with scales (K / g, N): AutoAWQ and AutoGPTQ."""

import dataclasses
from typing import Any

import numpy as np

from ...core import INT2, INT3, INT4, INT8, Format
from ..bits import unpack_columns, unpacked, words_for
from ..source import Index, Source
from ..stored import Stored
from .compressed_config import check_pattern, names_module
from .derived import converted
from .fields import Fields
from .group_index import as_source, permutation_of, permuted
from .mapped import Tensor
from .module import (
    FLOATS,
    Module,
    Pool,
    check_matrix,
    guarded,
    scale_of,
    shifted,
    with_permutation,
)

FORMATS: dict[int, Format] = {2: INT2, 3: INT3, 4: INT4, 8: INT8}
# Checkpoint formats of GPTQ: how much less than the zero point the file stores.
_MINUS = {"gptq": 1, "gptq_v2": 0}
_VERSIONS = ("gemm", "GEMM")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How GPTQ quantized a module.

    Attributes:
        bits: per code.
        group_size: rows of the kernel per scale; -1 for all.
        is_symmetric: whether all zero points are in the middle.
        reorders: whether groups may be in any order.
    """

    bits: int
    group_size: int
    is_symmetric: bool
    reorders: bool


def read_awq(pool: Pool, fields: Fields) -> list[Stored]:
    """The weights of quant_method "awq", version "gemm"."""
    for key in ("version", "checkpoint_format"):
        if key in fields:
            fields.one_of(key, _VERSIONS)
    names = [key for key in ("bits", "w_bit") if key in fields] or ["bits"]
    fields.integer(names[0], 4, 4)
    if not fields.flag("zero_point", True):
        raise fields.invalid("zero_point", "true, as AutoAWQ's version gemm has it")
    names = [key for key in ("group_size", "q_group_size") if key in fields] or ["group_size"]
    size = fields.group_size(names[0])
    return [_read_awq_module(module, size) for module in pool.modules("qweight")]


def _read_awq_module(module: Module, group_size: int) -> Stored:
    words = check_matrix(module.need("qweight").check(("int32", "uint32")))
    rows, columns = words.shape[0], 8 * words.shape[1]
    codes = shifted(_awq_columns(words, columns), 8, INT4.dtype)
    blocks = (rows if group_size < 0 else group_size, 1)
    scale = module.need("scales").check(FLOATS)
    grid = scale_of(module, scale, (rows, columns), blocks)
    shape = (-(-rows // blocks[0]), columns // 8)
    zeros = module.need("qzeros").check(("int32", "uint32"), shape)
    zero_point = shifted(_awq_columns(zeros, columns), 8, INT4.dtype)
    zero_point = scale_of(module, zeros.holding(zero_point), (rows, columns), blocks)
    parts: dict[str, Any] = {"codes": codes, "scale": grid, "zero_point": zero_point}
    return module.stored(f"awq int4 g{blocks[0]}", INT4, order=(-1, -2), **parts)


def _awq_columns(words: Tensor, columns: int) -> Source:
    return unpacked(words.source, 4, columns, -1, lambda x, *_: unpack_columns(x), 8)


def read_gptq(pool: Pool, fields: Fields) -> list[Stored]:
    """The weights of quant_method "gptq", in checkpoint_format gptq (v1) or gptq_v2."""
    form = fields.one_of("checkpoint_format", _MINUS, "gptq")
    if fields.flag("is_marlin_format", False):
        raise fields.invalid("is_marlin_format", "false. Choose the model before it was repacked")
    general = _settings(fields)
    dynamic = fields.section("dynamic")
    for pattern in dynamic.values:
        check_pattern(fields, "dynamic", f"re:{pattern.removeprefix('+:').removeprefix('-:')}")
    return [
        _read_gptq_module(module, _settings_of(module, general, fields, dynamic), _MINUS[form])
        for module in pool.modules("qweight")
    ]


def _settings(fields: Fields) -> Settings:
    bits = fields.integer("bits", 2, 8)
    if bits not in FORMATS:
        raise fields.invalid("bits", f"one of {', '.join(map(str, FORMATS))}")
    return Settings(
        bits, fields.group_size(), fields.flag("sym", True), fields.flag("desc_act", False)
    )


def _settings_of(module: Module, general: Settings, fields: Fields, dynamic: Fields) -> Settings:
    """The settings of a module: the first pattern that matches its name overrides the general."""
    name = module.prefix.removesuffix(".")
    for pattern in dynamic.values:
        target = f"re:{pattern.removeprefix('+:').removeprefix('-:')}"
        if not pattern.startswith("-:") and names_module(target, name):
            return _settings(dynamic.section(pattern).over(fields))
    return general


def _read_gptq_module(module: Module, settings: Settings, minus: int) -> Stored:
    bits = settings.bits
    words = check_matrix(module.need("qweight").check(("int32", "uint32")))
    rows, columns = words.shape[0] * 32 // bits, words.shape[1]
    index = module.take("g_idx")
    if index is not None:
        index.check(("int32", "int64"), (rows,))
    elif settings.reorders:
        raise module.invalid("has no tensor 'g_idx', which desc_act needs")
    size = rows if settings.group_size < 0 else settings.group_size
    blocks, groups = (size, 1), -(-rows // size)
    codes = unpacked(words.source, bits, rows, 0)
    permutation = None if index is None else permutation_of(index, size)
    if permutation is not None:
        codes = permuted(codes, 0, permutation)
    format, half = FORMATS[bits], 1 << (bits - 1)
    codes = shifted(codes, half, format.dtype)
    scale = module.need("scales").check(FLOATS)
    grid = scale_of(module, scale, (rows, columns), blocks)
    zeros = module.need("qzeros")
    zeros.check(("int32", "uint32"), (groups, words_for(columns, bits)))
    field = unpacked(zeros.source, bits, columns, -1)
    parts: dict[str, Any] = {"scale": grid}
    parts["inputs"] = with_permutation(None, as_source(permutation))
    if settings.is_symmetric:
        codes = guarded(codes, _check_middle(zeros, field, half, size))
    else:
        mask = np.uint8((1 << bits) - 1)
        zero_point = converted(field, np.uint8, lambda x: (x + np.uint8(minus)) & mask)
        zero_point = zeros.holding(shifted(zero_point, half, format.dtype))
        parts["zero_point"] = scale_of(module, zero_point, (rows, columns), blocks)
    kind = f"gptq {bits} bits g{size}"
    return module.stored(kind, format, order=(-1, -2), codes=codes, **parts)


def _check_middle(zeros: Tensor, field: Source, half: int, size: int):
    """Zero points of symmetric weights are all in the middle, whatever version wrote them.

    Files of GPTQModel 5 and later say version 1, but store the zero points as version 2 does.
    """

    def check(index: Index) -> None:
        rows, columns = index
        part = field.read((slice(rows.start // size, -(-rows.stop // size)), columns))
        if part.size and not (np.all(part == half) or np.all(part == half - 1)):
            raise zeros.invalid(
                f"{half - 1} (version 1) or {half} (version 2) everywhere, because sym is true",
                f"{np.unique(part).tolist()}",
            )

    return check
