"""Measured and estimated speeds of quantized products relative to float products.

    python -m benchmarks --suite cpu --json cpu.json
    python -m benchmarks.measured cpu.json

print the lines of a machine's table. Tables for TPUs are not measured. They are estimates by the
TPU compiler, from `--suite tpu-compile`, and are labeled as estimates.
"""

import dataclasses
import math
from collections.abc import Collection

from ..kernels import cpu


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Speeds of one computation relative to the float product: below 1, float is faster.

    Attributes:
        weights, inputs: as `describe_inputs` describes them; "float" for float activations.
        implementation: name of the computation that ran.
        shape: (K, N) of the weights.
        by_rows: speed by rows of activations.
    """

    weights: str
    inputs: str
    implementation: str
    shape: tuple[int, int]
    by_rows: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Speeds measured on one machine.

    Attributes:
        machine: its name among the `MACHINES`.
        dtype: of the activations before they are quantized.
        reference: the float product whose speed is 1.
        how: the command, and the machine that ran it.
        speeds: the results.
        is_estimate: whether these are estimates by the compiler.
        instructions: those of the native kernels that were measured; None if none were.
    """

    machine: str
    dtype: str
    reference: str
    how: str
    speeds: tuple[Speeds, ...]
    is_estimate: bool = False
    instructions: str | None = None


def _read(text):
    return tuple(_line(line) for line in text.strip().splitlines())


def _line(text):
    weights, inputs, implementation, shape, speeds = (cell.strip() for cell in text.split("|"))
    k, n = map(int, shape.split("x"))
    pairs = [pair.split(":") for pair in speeds.split()]
    by_rows = {int(rows): float(speed) for rows, speed in pairs}
    return Speeds(weights, inputs, implementation, (k, n), by_rows)


# weights | inputs | implementation | KxN of the weights | rows:speed ...
_ON_CPU = """
int4 g128 | float | native | 384x1536  | 1:1.97 2:2.68 8:1.56 32:1.25 128:1.06 512:1.01 2048:1.02
int4 g128 | float | native | 4096x4096 | 1:3.68 2:5.06 8:2.07 32:1.39 128:1.11 512:1.05 2048:1.00
int4 g128 | int8  | native | 384x1536  | 1:2.39 2:3.13 8:2.36 32:2.43 128:2.42 512:2.46 2048:2.58
int4 g128 | int8  | native | 4096x4096 | 1:7.14 2:8.89 8:4.15 32:3.45 128:3.33 512:3.34 2048:3.17
int8      | float | native | 1000x1003 | 1:2.28 2:3.50 8:2.50 32:1.35 128:1.08 512:1.01 2048:0.98
int8      | float | native | 384x1536  | 1:2.10 2:3.09 8:2.18 32:1.12 128:1.02 512:0.99 2048:0.98
int8      | float | native | 4096x4096 | 1:4.36 2:6.81 8:3.32 32:1.23 128:1.11 512:1.06 2048:0.97
int8      | int8  | native | 1000x1003 | 1:2.27 2:3.35 8:3.06 32:2.67 128:2.65 512:2.94 2048:3.11
int8      | int8  | native | 384x1536  | 1:1.71 2:2.67 8:2.38 32:2.29 128:2.54 512:2.55 2048:2.86
int8      | int8  | native | 4096x4096 | 1:4.12 2:6.79 8:5.55 32:4.24 128:3.67 512:3.85 2048:3.70
nf4 g64   | float | native | 384x1536  | 1:2.09 2:2.69 8:1.54 32:1.23 128:1.09 512:1.01 2048:1.01
nf4 g64   | float | native | 4096x4096 | 1:3.72 2:4.82 8:1.88 32:1.28 128:1.11 512:1.05 2048:1.03
"""
_ON_CPU_WITH_AMX = """
int4 g128 | float | native | 2048x8192 | 1:3.81 2:6.64 8:3.66 32:3.22 128:1.44 512:1.37 2048:0.85
int4 g128 | float | native | 4096x4096 | 1:4.35 2:7.19 8:3.28 32:2.59 128:1.39 512:1.24 2048:1.09
int4 g128 | int8 | native | 2048x8192 | 1:5.10 2:11.18 8:6.23 32:9.46 128:5.73 512:4.86 2048:4.40
int4 g128 | int8 | native | 4096x4096 | 1:6.06 2:9.55 8:5.36 32:9.36 128:5.90 512:5.47 2048:3.63
int8 | float | native | 1000x1003 | 1:1.81 2:2.42 8:2.01 32:1.82 128:1.16 512:1.10 2048:1.01
int8 | float | native | 2048x8192 | 1:3.40 2:4.98 8:4.08 32:2.50 128:1.48 512:1.28 2048:1.04
int8 | float | native | 4096x4096 | 1:3.10 2:5.36 8:4.38 32:2.64 128:1.33 512:1.15 2048:1.16
int8 | int8 | native | 1000x1003 | 1:2.06 2:2.81 8:2.88 32:4.27 128:3.36 512:4.29 2048:4.97
int8 | int8 | native | 2048x8192 | 1:5.00 2:7.31 8:8.77 32:11.94 128:6.14 512:7.86 2048:5.08
int8 | int8 | native | 4096x4096 | 1:4.27 2:7.54 8:7.54 32:17.24 128:9.32 512:7.05 2048:5.50
nf4 g64 | float | native | 2048x8192 | 1:4.95 2:5.02 8:3.47 32:2.79 128:1.41 512:1.29 2048:1.10
nf4 g64 | float | native | 4096x4096 | 1:4.41 2:6.47 8:3.48 32:2.65 128:1.39 512:1.23 2048:0.92
"""
_FOR_V5E = """
fp8_e4m3 | fp8_e4m3 | scaled | 384x1536 | 8:0.50 128:0.55 2048:0.92
fp8_e4m3 | fp8_e4m3 | scaled | 1000x1003 | 8:0.68 128:0.62 2048:0.69
fp8_e4m3 | fp8_e4m3 | scaled | 2048x8192 | 8:1.46 128:1.22 2048:1.01
fp8_e4m3 | fp8_e4m3 | scaled | 3584x3584 | 8:1.33 16:1.29 128:1.05 1024:1.03 2048:0.98
fp8_e4m3 | fp8_e4m3 | scaled | 4096x4096 | 8:1.45 128:1.13 2048:1.00
fp8_e4m3 | fp8_e4m3 | scaled | 4096x14336 | 8:1.62 128:1.34
fp8_e4m3 | fp8_e4m3 | scaled | 5120x13824 | 8:1.88 16:1.84 128:1.28 1024:0.89 2048:0.94
fp8_e4m3 | fp8_e4m3 | scaled | 14336x4096 | 8:1.60 128:1.17
int4 g128 | float | fused | 384x1536 | 1024:0.90 2048:0.94
int4 g128 | float | fused | 2048x8192 | 2048:1.09
int4 g128 | float | fused | 3584x3584 | 1024:0.71 2048:0.80
int4 g128 | float | fused | 4096x4096 | 1024:1.17 2048:1.07
int4 g128 | float | fused | 4096x14336 | 2048:1.10
int4 g128 | float | fused | 5120x13824 | 1024:0.52 2048:0.68
int4 g128 | int8 | scaled | 384x1536 | 2048:0.86
int4 g128 | int8 | scaled | 2048x8192 | 2048:1.07
int4 g128 | int8 | scaled | 4096x4096 | 2048:1.03
int8 | float | dequantize | 384x1536 | 128:0.91 2048:0.99
int8 | float | dequantize | 1000x1003 | 128:1.16 2048:1.04
int8 | float | dequantize | 2048x8192 | 128:1.47 2048:1.08
int8 | float | dequantize | 3584x3584 | 128:1.53 1024:1.15 2048:1.05
int8 | float | dequantize | 4096x4096 | 128:1.61 2048:1.07
int8 | float | dequantize | 4096x14336 | 128:1.71 2048:1.10
int8 | float | dequantize | 5120x13824 | 128:1.71 1024:1.00 2048:1.01
int8 | float | dequantize | 14336x4096 | 128:1.92
int8 | float | scaled | 384x1536 | 8:1.17
int8 | float | scaled | 1000x1003 | 8:1.29
int8 | float | scaled | 2048x8192 | 8:1.65
int8 | float | scaled | 3584x3584 | 8:1.55 16:1.53
int8 | float | scaled | 4096x4096 | 8:1.63
int8 | float | scaled | 4096x14336 | 8:1.69
int8 | float | scaled | 5120x13824 | 8:1.95 16:1.94
int8 | float | scaled | 14336x4096 | 8:1.69
int8 | int8 | integer | 384x1536 | 8:0.59 128:0.64 2048:0.98
int8 | int8 | integer | 1000x1003 | 8:0.82 128:0.68 2048:0.69
int8 | int8 | integer | 2048x8192 | 8:1.60 128:1.50 2048:1.83
int8 | int8 | integer | 3584x3584 | 8:1.47 16:1.43 128:1.30 1024:1.72 2048:1.72
int8 | int8 | integer | 4096x4096 | 8:1.60 128:1.42 2048:1.78
int8 | int8 | integer | 4096x14336 | 8:1.75 128:1.77 2048:1.93
int8 | int8 | integer | 5120x13824 | 8:2.04 16:2.03 128:1.70 1024:1.60 2048:1.77
int8 | int8 | integer | 14336x4096 | 8:1.74 128:1.51
nvfp4 g16 | float | fused | 384x1536 | 8:0.52 16:0.52 128:0.62 1024:0.85 2048:0.91
nvfp4 g16 | float | fused | 3584x3584 | 8:0.37 16:0.37 128:0.44 1024:0.71 2048:0.79
nvfp4 g16 | float | fused | 4096x4096 | 8:1.82 16:1.80 128:1.89 1024:1.15 2048:1.06
nvfp4 g16 | float | fused | 5120x13824 | 8:0.24 16:0.24 128:0.26 1024:0.51 2048:0.68
"""

_FOR_V6E = """
fp8_e4m3 | fp8_e4m3 | scaled | 384x1536 | 8:0.41 128:0.43 2048:0.88
fp8_e4m3 | fp8_e4m3 | scaled | 1000x1003 | 8:0.53 128:0.52 2048:0.60
fp8_e4m3 | fp8_e4m3 | scaled | 2048x8192 | 8:1.23 128:1.07 2048:1.02
fp8_e4m3 | fp8_e4m3 | scaled | 3584x3584 | 8:1.08 16:1.07 128:0.89 1024:0.98 2048:0.90
fp8_e4m3 | fp8_e4m3 | scaled | 4096x4096 | 8:1.20 128:0.98 2048:0.94
fp8_e4m3 | fp8_e4m3 | scaled | 4096x14336 | 8:1.36 128:1.23
fp8_e4m3 | fp8_e4m3 | scaled | 5120x13824 | 8:1.34 16:1.34 128:1.21 1024:0.83 2048:0.83
fp8_e4m3 | fp8_e4m3 | scaled | 14336x4096 | 8:1.32 128:1.03
int8 | float | dequantize | 384x1536 | 8:0.80
int8 | float | dequantize | 1000x1003 | 8:1.17
int8 | float | dequantize | 2048x8192 | 8:1.74
int8 | float | dequantize | 3584x3584 | 8:1.53 16:1.53
int8 | float | dequantize | 4096x4096 | 8:1.75
int8 | float | dequantize | 4096x14336 | 8:1.88
int8 | float | dequantize | 5120x13824 | 8:1.83 16:1.82
int8 | float | dequantize | 14336x4096 | 8:1.86
int8 | float | scaled | 384x1536 | 128:0.83 2048:0.95
int8 | float | scaled | 1000x1003 | 128:1.14 2048:1.04
int8 | float | scaled | 2048x8192 | 128:1.41 2048:1.10
int8 | float | scaled | 3584x3584 | 128:1.31 1024:1.06 2048:1.06
int8 | float | scaled | 4096x4096 | 128:1.41 2048:1.10
int8 | float | scaled | 4096x14336 | 128:1.43 2048:0.80
int8 | float | scaled | 5120x13824 | 128:1.41 1024:0.83 2048:0.80
int8 | float | scaled | 14336x4096 | 128:1.35
int8 | int8 | integer | 384x1536 | 8:0.44 128:0.46 2048:0.89
int8 | int8 | integer | 1000x1003 | 8:0.57 128:0.57 2048:0.60
int8 | int8 | integer | 2048x8192 | 8:1.33 128:1.15 2048:1.19
int8 | int8 | integer | 3584x3584 | 8:1.14 16:1.13 128:0.95 1024:1.13 2048:1.09
int8 | int8 | integer | 4096x4096 | 8:1.33 128:1.06 2048:1.14
int8 | int8 | integer | 4096x14336 | 8:1.44 128:1.37 2048:1.09
int8 | int8 | integer | 5120x13824 | 8:1.40 16:1.39 128:1.33 1024:1.03 2048:1.08
int8 | int8 | integer | 14336x4096 | 8:1.40 128:1.10
nvfp4 g16 | float | fused | 384x1536 | 8:0.52 16:0.53 128:0.57 1024:0.78 2048:0.85
nvfp4 g16 | float | fused | 3584x3584 | 8:0.36 16:0.36 128:0.38 1024:0.56 2048:0.65
nvfp4 g16 | float | fused | 4096x4096 | 8:1.70 16:1.67 128:1.43 1024:1.12 2048:0.90
nvfp4 g16 | float | fused | 5120x13824 | 8:0.21 16:0.21 128:0.22 1024:0.33 2048:0.45
"""

MEASUREMENTS = (
    Measurement(
        machine="cpu",
        dtype="float32",
        reference="XLA's float32 product",
        how="`python -m benchmarks --suite cpu`, 2 cores with AVX512-VNNI, weights out of cache",
        speeds=_read(_ON_CPU),
        instructions="AVX512-VNNI",
    ),
    Measurement(
        machine="cpu",
        dtype="float32",
        reference="XLA's float32 product",
        how="`python -m benchmarks --suite cpu`, 2 cores with AMX, weights out of cache",
        speeds=_read(_ON_CPU_WITH_AMX),
        instructions="AMX",
    ),
    *(
        Measurement(
            machine=chip,
            dtype="bfloat16",
            reference="XLA's bfloat16 product",
            how="the compiler's estimates in `python -m benchmarks --suite tpu-compile`, with "
            "bytes for kernels that quantize; nothing ran",
            speeds=_read(text),
            is_estimate=True,
        )
        for chip, text in (("v5e", _FOR_V5E), ("v6e", _FOR_V6E))
    ),
)


def measurement_for(machine: str, dtype: str) -> Measurement | None:
    """The measurement on a machine for activations of a dtype, or None.

    Those of native kernels count only where the same instructions run.
    """
    best = next(iter(cpu.instruction_sets()), None)
    found = (m for m in MEASUREMENTS if (m.machine, m.dtype) == (machine, dtype))
    return next((m for m in found if m.instructions in (None, best)), None)


def speeds_near(
    lines: Collection[Speeds], shape: tuple[int, int], rows: int
) -> tuple[tuple[int, tuple[int, int], float], ...]:
    """The speeds measured closest to a product: (rows, (K, N), speed).

    Those with its shape and number of rows, otherwise those of the nearest sizes below and above.
    Empty if either is missing, because speeds are not extrapolated.
    """
    near = [(line, _around(line.by_rows, rows)) for line in lines]
    near = [(line, found) for line, found in near if found]
    sizes = _around([math.prod(line.shape) for line, _ in near], math.prod(shape))
    exact = [pair for pair in near if pair[0].shape == shape]
    chosen = exact or [pair for pair in near if math.prod(pair[0].shape) in sizes]
    return tuple((m, line.shape, line.by_rows[m]) for line, found in chosen for m in found)


def _around(values, wanted):
    """The nearest values below and above, or equal; empty if one side has none."""
    below = max((v for v in values if v <= wanted), default=None)
    above = min((v for v in values if v >= wanted), default=None)
    return () if below is None or above is None else tuple(sorted({below, above}))
