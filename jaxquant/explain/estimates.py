"""Estimated speeds of products on a CPU that were not measured, from the rates of the machine.

Time is the larger of what memory and what arithmetic take; XLA's computations also write weights as
floats. Rates were fitted to `python -m benchmarks --suite cpu` and hold within a factor of two on a
quiet machine.
"""

import dataclasses
import math

from ..kernels import cpu
from ..ops import Choice, Record
from . import convolutions
from .machines import Machine


@dataclasses.dataclass(frozen=True)
class _Rates:
    """Rates of the native kernels for one instruction set.

    Attributes:
        integer, floats, halves: of products of codes, float32 and bfloat16, relative to XLA's of
            floats.
        read: weights by float activations per second, relative to floats read from memory.
        least_rows: what it multiplies at least; the next instruction set multiplies fewer.
    """

    integer: float
    floats: float
    halves: float
    read: float
    least_rows: int = 0


# The best first.
_BY_INSTRUCTIONS = {
    "AMX": _Rates(6.5, 1.05, 3.9, 3.7, least_rows=16),
    "AVX512-VNNI": _Rates(3.4, 1.05, 1.05, 3.7),
    "AVX2": _Rates(1.5, 0.9, 0.9, 1.5),
    "NEON": _Rates(1.5, 0.9, 0.9, 1.5),
}
# XLA's products of 8-bit codes relative to float32.
_XLA_INTEGER = 1.4
# Weights that XLA dequantizes per second: in blocks that stay in the cache, as a whole that stays
# there, and as a whole that does not; and up to how many stay there.
_IN_BLOCKS, _IN_CACHE, _IN_MEMORY, _CACHED = 6e9, 2.5e9, 0.7e9, 2**21
# Weights of experts per second that XLA prepares for a ragged product, which then multiplies all
# rows by all experts. Estimates hold within a factor of five there (`--suite experts`).
_RAGGED = 0.58e9
# 4-bit codes per second that are copied so that rows begin with a byte, by one thread.
_ALIGNED = 2e10
# Seconds that a program of one product takes besides, by XLA and by a native kernel.
_CALL, _NATIVE_CALL = 70e-6, 60e-6
# Activations that are quantized per second.
_QUANTIZED = 1.9e9
# Results per second that native kernels write besides, by float rows shorter than `_SHORT`, if the
# results do not stay in the cache: each tile of columns writes to all of their pages.
_WRITTEN, _SHORT = 4e9, 128
# Seconds that XLA's computation of dequantized weights takes besides.
_DEQUANTIZING = 4e-6


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a product takes, in seconds.

    Attributes:
        rows: of activations, by all experts.
        count: number of weights, of all experts.
        stored: memory moves the operands as they are stored, and the result.
        aligned: rows of 4-bit codes are copied first, where they do not begin with a byte.
        quantized: activations are quantized.
        written: a native kernel writes the results of short float rows.
        read: memory moves the weights as floats.
        prepared: XLA prepares experts for a ragged product.
        arithmetic: that of the float product.
        as_floats: all of the float product.
        experts: matrices of which each row meets one. XLA multiplies all rows by all of them.
        share: the part of the weights that the native kernels read.
        is_half: whether activations are bfloat16.
    """

    rows: int
    count: int
    stored: float
    aligned: float
    quantized: float
    written: float
    read: float
    prepared: float
    arithmetic: float
    as_floats: float
    experts: int
    share: float
    is_half: bool


def estimated_speed(record: Record, choice: Choice, machine: Machine) -> float | None:
    """Speed relative to the float32 product, or None if there is no model of it.

    Args:
        record: a product, without copies.
        choice: what computes it.
        machine: whose rates count.
    """
    rows = record.lhs.shape[0] if record.experts else record.rows
    if machine.name not in _MODELS or not record.rhs.is_quantized:
        return None
    if record.convolution is not None:
        return convolutions.estimated_speed(record, record.convolution, choice)
    if rows is None:
        return None
    work = _work(record, rows, machine)
    model = _MODELS[machine.name].get(choice.implementation, _whole)
    return work.as_floats / model(work, choice)


def _work(record: Record, rows: int, machine: Machine) -> _Work:
    """That of a product by one matrix, or of all rows by all experts."""
    count = math.prod(record.rhs.shape)
    moved = 4 * (math.prod(record.lhs.shape) + math.prod(record.shape))
    read = 4 * count / machine.bytes_per_second
    arithmetic = 2 * rows * count / machine.float_per_second
    prepared = count / _RAGGED if record.experts else 0
    results = math.prod(record.shape)
    is_strided = record.length < _SHORT and results > _CACHED
    experts = record.experts or 1
    return _Work(
        rows=rows,
        count=count,
        stored=(record.rhs.bytes + moved) / machine.bytes_per_second,
        aligned=count / _ALIGNED if record.length % 2 and record.rhs.bytes < count else 0,
        quantized=math.prod(record.lhs.shape) / _QUANTIZED,
        written=results / _WRITTEN if is_strided else 0,
        read=read,
        prepared=prepared,
        arithmetic=arithmetic,
        as_floats=_CALL + prepared + max(read + moved / machine.bytes_per_second, arithmetic),
        experts=experts,
        share=min(experts, rows) / experts,
        is_half=record.lhs.dtype == "bfloat16",
    )


def _native(work: _Work, choice: Choice) -> float:
    names = list(_BY_INSTRUCTIONS)
    usable = [_BY_INSTRUCTIONS[x] for x in names[names.index(cpu.instruction_sets()[0]) :]]
    rates = next(x for x in usable if work.rows >= x.least_rows * work.experts)
    stored, arithmetic = work.share * work.stored, work.arithmetic / work.experts
    call = _NATIVE_CALL + work.aligned
    if choice.is_integer:
        return call + work.quantized + max(stored, arithmetic / rates.integer)
    rate = rates.halves if work.is_half else rates.floats
    multiplied = max(stored, work.share * work.read / rates.read, arithmetic / rate)
    return call + work.written + multiplied


def _integer(work: _Work, _: Choice) -> float:
    multiplied = max(work.stored, work.arithmetic / _XLA_INTEGER)
    return _CALL + work.prepared + work.quantized + multiplied


def _blocks(work: _Work, _: Choice) -> float:
    return work.as_floats + work.count / _IN_BLOCKS


def _whole(work: _Work, _: Choice) -> float:
    rate = _IN_CACHE if work.count <= _CACHED else _IN_MEMORY
    return work.as_floats + _DEQUANTIZING + work.count / rate


# By machine and computation; all others of a machine dequantize the weights as a whole.
_MODELS = {"cpu": {"native": _native, "integer": _integer, "blocks": _blocks}}
