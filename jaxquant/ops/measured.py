"""How fast quantized products were beside float ones: a line per scheme, row of a table and shape.

    python -m benchmarks --suite cpu --json cpu.json
    python -m benchmarks.measured cpu.json

print the lines of a machine's table.
"""

import dataclasses
import math
from collections.abc import Collection


@dataclasses.dataclass(frozen=True)
class Speeds:
    """Speeds of one computation, in units of the float product's: under 1, float is faster.

    Attributes:
        weights, inputs: in the words of `describe_inputs`; "float" for inputs that stay so.
        implementation: name of the row that ran.
        shape: (K, N) of the weights.
        by_rows: speed by rows of inputs.
    """

    weights: str
    inputs: str
    implementation: str
    shape: tuple[int, int]
    by_rows: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured on a machine.

    Attributes:
        machine: its name among the `MACHINES`.
        dtype: of the inputs before they are quantized.
        reference: the float product whose speed is 1.
        how: what was run, and where.
        speeds: what was found.
    """

    machine: str
    dtype: str
    reference: str
    how: str
    speeds: tuple[Speeds, ...]


def _read(text):
    return tuple(_line(line) for line in text.strip().splitlines())


def _line(text):
    weights, inputs, implementation, shape, speeds = (cell.strip() for cell in text.split("|"))
    k, n = map(int, shape.split("x"))
    pairs = [pair.split(":") for pair in speeds.split()]
    by_rows = {int(rows): float(speed) for rows, speed in pairs}
    return Speeds(weights, inputs, implementation, (k, n), by_rows)


MEASUREMENTS = (
    Measurement(
        machine="cpu",
        dtype="float32",
        reference="XLA's float32 product",
        how="`python -m benchmarks --suite cpu`, 2 cores with AVX512-VNNI, weights out of cache",
        # weights | inputs | implementation | KxN of the weights | rows:speed ...
        speeds=_read("""
            int8      | int8  | native  | 4096x4096 | 1:1.95 8:2.07 32:1.89
            int8      | int8  | integer | 4096x4096 | 128:1.55
            int8      | float | native  | 4096x4096 | 1:2.39 8:1.26
            int8      | float | blocks  | 4096x4096 | 32:0.80 128:1.09
            int4 g128 | float | native  | 4096x4096 | 1:2.32 8:1.82 32:0.96
            int4 g128 | float | blocks  | 4096x4096 | 128:0.86
            int4 g128 | int8  | native  | 4096x4096 | 1:2.61 8:3.31 32:1.85 128:1.15
            nf4 g64   | float | native  | 4096x4096 | 1:2.72 8:1.84 32:1.08
            nf4 g64   | float | blocks  | 4096x4096 | 128:0.80
        """),
    ),
)


def measurement_for(machine: str, dtype: str) -> Measurement | None:
    """What was measured on a machine with inputs of a dtype, or None."""
    found = (m for m in MEASUREMENTS if (m.machine, m.dtype) == (machine, dtype))
    return next(found, None)


def speeds_near(
    lines: Collection[Speeds], shape: tuple[int, int], rows: int
) -> tuple[tuple[int, tuple[int, int], float], ...]:
    """What was measured next to a product: (rows, (K, N), speed).

    That of the very shape and number of rows; else those of the next sizes below and above.
    Empty where one side has none: nothing is extrapolated.
    """
    near = [(line, _around(line.by_rows, rows)) for line in lines]
    near = [(line, found) for line, found in near if found]
    sizes = _around([math.prod(line.shape) for line, _ in near], math.prod(shape))
    exact = [pair for pair in near if pair[0].shape == shape]
    chosen = exact or [pair for pair in near if math.prod(pair[0].shape) in sizes]
    return tuple((m, line.shape, line.by_rows[m]) for line, found in chosen for m in found)


def _around(values, wanted):
    """The next values below and above, or equal; none where one side has none."""
    below = max((v for v in values if v <= wanted), default=None)
    above = min((v for v in values if v >= wanted), default=None)
    return () if below is None or above is None else tuple(sorted({below, above}))
