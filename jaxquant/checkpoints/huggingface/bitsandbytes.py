"""bitsandbytes: 4-bit floats in blocks of the flat weight, and int8 with scales of rows."""

import json
import math

import jax.numpy as jnp
import numpy as np

from ...core import BNB_FP4, INT8, NF4, Format
from ...tree.internal import MALFORMED, summary
from ..bits import unpack, unpacked
from ..source import Index, Source
from ..stored import Stored
from .derived import converted
from .fields import MAX_SIZE, Fields
from .mapped import Tensor
from .module import Module, Pool, check_matrix

STATE = "weight.quant_state.bitsandbytes__"
# Values of 4-bit floats in the order of their bits, times 192; -0 is 0.
_FP4 = (0, 1, 128, 192, 64, 96, 32, 48)
_FP4_VALUES = tuple(sign * n / 192 for sign in (1, -1) for n in _FP4)
_TYPES: dict[str, tuple[Format, tuple[float, ...]]] = {
    "nf4": (NF4, NF4.codebook or ()),
    "fp4": (BNB_FP4, _FP4_VALUES),
}
_DTYPES = ("float32", "float16", "bfloat16")
_INT8_NOTE = (
    "bitsandbytes multiplies a code first with the row's largest magnitude and then with 1/127; "
    "the scale is their product, which may differ by an ulp in float32"
)


def read(pool: Pool, fields: Fields) -> list[Stored]:
    """The weights of quant_method "bitsandbytes"."""
    found = []
    for name in pool.folder.tensors:
        prefix, state, kind = name.partition(STATE)
        if state and name in pool.rest:
            found += [_read_float4(Module(pool, prefix), kind)]
    return found + [_read_int8(module) for module in pool.modules("SCB")]


def _read_float4(module: Module, kind: str) -> Stored:
    state = _state(module.need(STATE + kind))
    format, values = _TYPES[state.one_of("quant_type", _TYPES)]
    size = state.integer("blocksize", 1, MAX_SIZE)
    rows, columns = state.pair("shape")
    if columns % 2:
        raise state.invalid("shape", "two integers, the second of them even")
    data = module.need("weight").check(("uint8",), (rows * columns // 2, 1))
    _check_map(module.need("weight.quant_map"), values)
    absmax = _absmax(module, state, -(-rows * columns // size))
    codes = unpacked(_folded(data.source, rows, columns // 2), 4, columns, -1, _unpack_high_first)
    book = np.array([(format.codebook or ()).index(v) for v in values], np.uint8)
    codes = converted(codes, format.dtype, lambda x: book[x].view(format.dtype))
    scale = _scale(absmax, rows, columns, size)
    dtype = jnp.dtype(state.one_of("dtype", _DTYPES))
    return module.stored(f"bitsandbytes {kind}", format, dtype=dtype, codes=codes, scale=scale)


def _state(tensor: Tensor) -> Fields:
    """The JSON object in the bytes of a tensor."""
    text = tensor.check(("uint8",)).source.read().tobytes()
    try:
        values = dict(json.loads(text))
    except MALFORMED as error:
        raise ValueError(
            f"{tensor.path}: tensor {tensor.name!r} is not JSON, {summary(error)}."
        ) from error
    return Fields(tensor.path, values, tensor.name)


def _check_map(table: Tensor, values: tuple[float, ...]) -> None:
    table.check(("float32",), (len(values),))
    found = table.source.read()
    if not np.array_equal(found, np.array(values, np.float32)):
        wanted, got = (", ".join(f"{v:.4f}" for v in row) for row in (values, found))
        raise table.invalid(f"the values {wanted}", got)


def _unpack_high_first(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    return unpack((words >> 4) | (words << 4), bits, axis)


def _folded(source: Source, rows: int, columns: int) -> Source:
    """(rows * columns, 1) as (rows, columns)."""

    def reader(index: Index) -> np.ndarray:
        first, last = index[0].start, index[0].stop
        part = source.read((slice(first * columns, last * columns), slice(0, 1)))
        return part.reshape(last - first, columns)[:, index[1]].copy()

    return Source((rows, columns), source.dtype, reader)


def _absmax(module: Module, state: Fields, count: int) -> Source:
    """The largest magnitude of each block, float32."""
    absmax = module.need("weight.absmax").check(("float32", "uint8"), (count,))
    if absmax.dtype == np.float32:
        return absmax.source
    size = state.integer("nested_blocksize", 1, MAX_SIZE)
    offset = state.values.get("nested_offset")
    if not isinstance(offset, float | int) or not math.isfinite(offset):
        raise state.invalid("nested_offset", "a finite number")
    outer = module.need("weight.nested_absmax").check(("float32",), (-(-count // size),)).source
    table = module.need("weight.nested_quant_map").check(("float32",), (256,)).source

    def reader(index: Index) -> np.ndarray:
        start, stop = index[0].start, index[0].stop
        first = start // size
        factors = outer.read((slice(first, -(-stop // size)),))
        of_block = factors[np.arange(start, stop) // size - first]
        return table.read()[absmax.source.read(index)] * of_block + np.float32(offset)

    return Source((count,), np.dtype(np.float32), reader)


def _scale(absmax: Source, rows: int, columns: int, size: int) -> Source:
    """Scales (rows, columns / step) of blocks that run over the flat weight.

    The step is the greatest common divisor of the block and the columns.
    """
    step = math.gcd(size, columns)
    shape = (rows, columns // step)

    def reader(index: Index) -> np.ndarray:
        row, group = (np.arange(s.start, s.stop) for s in index)
        block = (row[:, None] * columns + group * step) // size
        if not block.size:
            return np.zeros(block.shape, np.float32)
        first = int(block[0, 0])
        return absmax.read((slice(first, int(block[-1, -1]) + 1),))[block - first]

    return Source(shape, np.dtype(np.float32), reader)


def _read_int8(module: Module) -> Stored:
    """int8 codes (N, K) and the largest magnitude of each row."""
    largest = module.need("SCB")
    codes = check_matrix(module.need("weight").check(("int8",)))
    order = module.take("weight_format")
    if order is not None and np.any(order.source.read()):
        wanted = '0, the format "row". Save the model again with a current version'
        raise order.invalid(wanted, order.source.read().tolist())
    rows = codes.shape[0]
    largest.check(_DTYPES, (rows,), (rows, 1))

    def reader(index: Index) -> np.ndarray:
        whole = largest.source.read().reshape(rows, 1).astype(np.float32)
        return (whole / np.float32(127))[index]

    scale = Source((rows, 1), np.dtype(np.float32), reader)
    return module.stored(
        "bitsandbytes int8", INT8, note=_INT8_NOTE, codes=codes.source, scale=scale
    )
