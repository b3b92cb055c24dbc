"""compressed-tensors: the format of llm-compressor, which vLLM serves."""

from typing import Any

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
    NVFP4,
    Format,
    Inputs,
    QTensor,
)
from ..bits import Layout, unpack, unpack_padded, unpacked, words_for
from ..source import Index, Source
from ..stored import Stored
from .compressed_config import Args, Group, activations, group_of, read_groups
from .derived import computed, converted
from .fields import Fields
from .group_index import as_source, permutation_of, permuted
from .mapped import Tensor
from .module import (
    FLOATS,
    Module,
    Pool,
    as_e8m0,
    as_float4,
    check_matrix,
    factors_of,
    guarded,
    nested_scale,
    scalar,
    scale_of,
    shifted,
    with_permutation,
    with_scale,
)

# Codes of integers packed into words, by their bits.
PACKED = {2: INT2, 3: INT3, 4: INT4, 5: INT5, 6: INT6, 7: INT8, 8: INT8}
_NESTED_NOTE = (
    "the file divides block scales by a global scale; they are multiplied with its reciprocal, "
    "which differs by at most an ulp in float32 and not in bfloat16"
)
_SCALES = (*FLOATS, "float64")


def read(pool: Pool, fields: Fields) -> list[Stored]:
    """The quantized weights."""
    groups = read_groups(fields)
    found = []
    for module in pool.modules("weight_packed", "weight_scale"):
        name = module.prefix.removesuffix(".")
        group = group_of(groups, name)
        if group is None:
            raise fields.invalid("config_groups", f"groups, one of which targets {name!r}")
        found += [_read_module(module, group)]
    return found


def _read_module(module: Module, group: Group) -> Stored:
    args = group.weights
    packed = module.take("weight_packed")
    codes = module.need("weight") if packed is None else packed
    check_matrix(codes, (2, 3))
    kinds = _WHOLE if packed is None else _PACKED
    scale = module.need("weight_scale")
    key = codes.dtype.name, scale.dtype.name in ("uint8", "float8_e8m0fnu")
    if key not in kinds:
        wanted = " or ".join(sorted({dtype for dtype, _ in kinds}))
        raise codes.invalid(f"of dtype {wanted}, with a scale that fits it")
    is_integer, bits, reader = kinds[key]
    if args.is_integer is not is_integer or args.bits not in bits:
        wanted = f"{'int' if is_integer else 'float'} of {bits[0]} bits"
        raise group.fields.invalid("weights", f"{wanted}, as tensor {codes.name!r} is")
    return reader(module, group, codes, scale)


def _read_integers(module: Module, group: Group, codes: Tensor, scale: Tensor) -> Stored:
    """int8 codes, one in each byte."""
    return _finish(module, group, INT8, codes.source, scale)


def _read_packed(module: Module, group: Group, words: Tensor, scale: Tensor) -> Stored:
    """Integers of 2 to 8 bits in words of 32 bits."""
    bits = group.weights.bits
    shape = module.need("weight_shape").check(("int64", "int32"), (len(words.shape),))
    *rows, columns = (int(n) for n in shape.source.read())
    dense, padded = words_for(columns, bits), -(-columns // (32 // bits))
    if columns < 1 or words.shape not in ((*rows, dense), (*rows, padded)):
        raise words.invalid(
            f"int32 of shape {(*rows, dense)} for the weight_shape {(*rows, columns)} in {bits} "
            "bits"
        )
    # Where both layouts take as many words, the version tells them apart.
    is_dense = words.shape[-1] == dense and (dense < padded or group.splits_codes)
    layout = unpack if is_dense else unpack_padded
    format = PACKED[bits]
    codes = _unpack(words.source, bits, columns, -1, layout)
    codes = shifted(codes, 1 << (bits - 1), format.dtype)
    return _finish(module, group, format, codes, scale, layout)


def _read_floats(module: Module, group: Group, codes: Tensor, scale: Tensor) -> Stored:
    return _finish(module, group, FP8_E4M3, codes.source, scale)


def _read_mxfp8(module: Module, group: Group, codes: Tensor, scale: Tensor) -> Stored:
    _check_groups(group, MXFP8)
    grid = scale_of(module, _exponents(scale), codes.shape, (*_ones(codes), 1, 32))
    return _stored(module, group, MXFP8, codes.source, grid)


def _read_float4(module: Module, group: Group, words: Tensor, scale: Tensor) -> Stored:
    """4-bit floats with e8m0 scales (MXFP4), or with e4m3 scales and a global divisor (NVFP4)."""
    codes = as_float4(unpacked(words.source, 4, 2 * words.shape[-1], -1))
    is_nested = scale.dtype.name == "float8_e4m3fn"
    format = NVFP4 if is_nested else MXFP4
    _check_groups(group, format)
    blocks = (*_ones(words), 1, format.group_size or 1)
    if not is_nested:
        grid = scale_of(module, _exponents(scale), codes.shape, blocks)
        return _stored(module, group, MXFP4, codes, grid)
    inner = scale_of(module, scale, codes.shape, blocks)
    divisor = module.need("weight_global_scale").check(("float32",))
    grid = factors_of(divisor, codes.shape)
    outer = computed(grid, np.float32, lambda: _reciprocal(divisor, grid))
    return _stored(module, group, NVFP4, codes, nested_scale(inner, outer), note=_NESTED_NOTE)


def _reciprocal(divisor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    value = divisor.source.read().reshape(shape)
    if not np.all(np.isfinite(value) & (np.abs(value) > np.finfo(np.float32).tiny)):
        wanted = "finite and not zero, because scales are divided by it"
        raise divisor.invalid(wanted, value.reshape(-1).tolist())
    return np.float32(1) / value


def _ones(codes: Tensor) -> tuple[int, ...]:
    return (1,) * (len(codes.shape) - 2)


def _exponents(scale: Tensor) -> Tensor:
    return scale.holding(as_e8m0(scale))


def _check_groups(group: Group, format: Format) -> None:
    size = group.weights.group_size
    if size != format.group_size:
        raise group.fields.section("weights").invalid("group_size", f"{format.group_size}")


def _finish(
    module: Module,
    group: Group,
    format: Format,
    codes: Source,
    scale: Tensor,
    layout: Layout | None = None,
) -> Stored:
    """A weight with scales in float, and perhaps zero points and an order of groups."""
    args, shape = group.weights, codes.shape
    scale.check(_SCALES)
    blocks = args.blocks(shape)
    grid = scale_of(module, scale, shape, blocks)
    permutation = None
    index = module.take("weight_g_idx")
    if index is not None:
        permutation = permutation_of(index.check(("int32",), shape[-1:]), blocks[-1])
    elif args.reorders:
        raise module.invalid("has no tensor 'weight_g_idx', which actorder \"group\" needs")
    if permutation is not None:
        codes = permuted(codes, -1, permutation)
    zero_point = _zero_point(module, args, format, shape, blocks, scale, layout)
    if args.symmetric and zero_point is not None:
        codes = guarded(codes, _check_zero(zero_point, module.taken[-1]))
        zero_point = None
    order = as_source(permutation)
    return _stored(module, group, format, codes, grid, zero_point=zero_point, permutation=order)


def _zero_point(
    module: Module,
    args: Args,
    format: Format,
    shape: tuple[int, ...],
    blocks: tuple[int, ...],
    scale: Tensor,
    layout: Layout | None,
) -> Source | None:
    """Zero points: in words along the rows, or, in older files, in the shape of the scales."""
    tensor = module.take("weight_zero_point")
    if tensor is None:
        if not args.symmetric:
            raise module.invalid("has no tensor 'weight_zero_point', but symmetric is false")
        return None
    rows, *rest = scale.shape or (1,)
    words = words_for(rows, args.bits) if layout is unpack else -(-rows // (32 // args.bits))
    if layout is not None and tensor.dtype == np.int32 and tensor.shape == (words, *rest):
        words_of = tensor.source
        if rows == 1:
            words_of = guarded(words_of, _check_one_code(tensor, args.bits))
        codes = _unpack(words_of, args.bits, rows, 0, layout)
        codes = shifted(codes, 1 << (args.bits - 1), format.dtype)
        return scale_of(module, tensor.holding(codes), shape, blocks)
    whole = scale_of(module, tensor, shape, blocks)
    return converted(whole, np.int8, lambda x: _narrow(x, tensor))


def _unpack(words: Source, bits: int, count: int, axis: int, layout: Layout) -> Source:
    return unpacked(words, bits, count, axis, layout, None if layout is unpack else 32 // bits)


def _narrow(values: np.ndarray, tensor: Tensor) -> np.ndarray:
    wide = values.astype(np.float32)
    narrow = np.clip(wide, -128, 127).astype(np.int8)
    if not np.array_equal(narrow, wide):
        found = wide[narrow != wide][:4].tolist()
        raise tensor.invalid("integers from -128 to 127", f"{found}")
    return narrow


def _check_one_code(tensor: Tensor, bits: int):
    """Words with the code of one row have the shape of zero points that are not packed."""

    def check(index: Index) -> None:
        words = tensor.source.read(index)
        if np.any((words < 0) | (words >= 1 << bits)):
            found = np.unique(words)[:4].tolist()
            raise tensor.invalid(f"words with one code of {bits} bits each", f"{found}")

    return check


def _check_zero(zero_point: Source, tensor: Tensor):
    def check(index: Index) -> None:
        found = np.unique(zero_point.read().astype(np.int8))
        if np.any(found):
            raise tensor.invalid("zero everywhere, because symmetric is true", found.tolist())

    return check


def _inputs(module: Module, group: Group, columns: int) -> Inputs | None:
    """How activations are quantized, with the scale of the file if it is static."""
    args = group.inputs
    config = activations(args, columns)
    static: dict[str, Any] = {
        name: scalar(module.take(f"input_{name}")) for name in ("scale", "zero_point")
    }
    if args is None or config is None:
        return None
    if args.dynamic:
        return Inputs(config)
    if config.symmetric:
        static.pop("zero_point")
    for name, part in static.items():
        if part is None:
            raise module.invalid(
                f"has no tensor 'input_{name}', but its activations are not dynamic"
            )
    return with_scale(config, **static)


def _stored(
    module: Module,
    group: Group,
    format: Format,
    codes: Source,
    scale: Source | QTensor,
    *,
    zero_point: Source | None = None,
    permutation: Source | None = None,
    note: str = "",
) -> Stored:
    module.take("input_global_scale")
    if group.has_outputs:
        note = "; ".join(filter(None, [note, "output_activations are left in float"]))
    inputs = with_permutation(_inputs(module, group, codes.shape[-1]), permutation)
    parts = {"codes": codes, "scale": scale, "zero_point": zero_point, "inputs": inputs}
    kind = f"compressed-tensors {format} {group.weights.strategy}"
    return module.stored(kind, format, note=note, **parts)


# Readers by the dtype of the codes and whether the scales are exponents: whether the codes are
# integers, their bits, and the reader.
_PACKED = {
    ("int32", False): (True, (2, 3, 4, 5, 6, 7, 8), _read_packed),
    ("uint8", True): (False, (4,), _read_float4),
    ("uint8", False): (False, (4,), _read_float4),
}
_WHOLE = {
    ("int8", False): (True, (8, 7, 6, 5, 4, 3, 2), _read_integers),
    ("float8_e4m3fn", False): (False, (8,), _read_floats),
    ("float8_e4m3fn", True): (False, (8,), _read_mxfp8),
}
