"""Estimated speeds of convolutions on a CPU.

Time is a sum of what each call, element and operation takes. Rates were fitted to 579 random
convolutions on 2 cores with AVX512-VNNI; by them, 97 % of verdicts about the native kernels and
shifted images are right that are clear by 15 %, and 80 to 86 % of those about "images".
"""

import dataclasses
import math

from ..kernels import cpu
from ..ops import Choice, Convolution, Record


@dataclasses.dataclass(frozen=True)
class _Rates:
    """Seconds.

    Attributes:
        call: of a program of one convolution.
        image, result, operation: per element of the images and the result, and per multiplication
            or addition.
        patch: per element of all windows, where they have several pixels.
        is_native: whether operations are those of the native kernels.
    """

    call: float
    image: float
    result: float
    operation: float
    patch: float
    is_native: bool = False


# Channels that all meet, in groups, and each alone; by row and whether it multiplies integers.
_FLOATS = "float", False  # XLA's, of float32
_ALL = {
    _FLOATS: _Rates(55e-6, 0.32e-9, 0.15e-9, 10e-12, 0.041e-9),
    ("dequantize", False): _Rates(62e-6, 0.30e-9, 0.17e-9, 10e-12, 0.054e-9),
    ("images", True): _Rates(77e-6, 1.1e-9, 0.66e-9, 6.3e-12, 0.053e-9),
    ("native", True): _Rates(110e-6, 0.88e-9, 0.50e-9, 1.7e-12, 0.84e-9, is_native=True),
    ("native", False): _Rates(37e-6, 0.094e-9, 0.19e-9, 9.3e-12, 0, is_native=True),
}
_GROUPS = {
    _FLOATS: _Rates(54e-6, 0.59e-9, 0.49e-9, 23e-12, 0.80e-9),
    ("dequantize", False): _Rates(66e-6, 0.67e-9, 0.47e-9, 22e-12, 0.85e-9),
    ("images", True): _Rates(77e-6, 1.4e-9, 1.3e-9, 6.6e-12, 0.66e-9),
}
_ALONE = {
    _FLOATS: _Rates(83e-6, 0.22e-9, 0, 0, 1.7e-9),
    ("dequantize", False): _Rates(67e-6, 0.20e-9, 0, 0, 1.7e-9),
    ("images", True): _Rates(110e-6, 0.59e-9, 0, 0, 2.3e-9),
    ("shifted", True): _Rates(93e-6, 0.59e-9, 0, 0, 0.057e-9),
    ("shifted", False): _Rates(90e-6, 0.13e-9, 0.05e-9, 0, 0.097e-9),
}
# How much longer the native kernels take per operation than with AVX512-VNNI. AMX was not timed; it
# is assumed to be as fast.
_SLOWER = {"AMX": 1.0, "AVX512-VNNI": 1.0, "AVX2": 2.3, "NEON": 2.3}


def estimated_speed(record: Record, found: Convolution, choice: Choice) -> float | None:
    """Speed relative to the float32 convolution; None for rows whose rates are not known."""
    table = _GROUPS if found.groups > 1 else _ALL
    if found.groups == found.channels > 1:
        table = _ALONE
    rates = table.get((choice.implementation, choice.is_integer))
    if rates is None:
        return None
    if rates.is_native:
        slower = _SLOWER[cpu.instruction_sets()[0]]
        rates = dataclasses.replace(rates, operation=slower * rates.operation)
    return _seconds(table[_FLOATS], record, found) / _seconds(rates, record, found)


def _seconds(rates: _Rates, record: Record, found: Convolution) -> float:
    result = math.prod(record.shape)
    outputs = math.prod(record.rhs.shape) // max(record.length, 1)
    seen = result // max(outputs, 1) * found.channels * found.pixels if found.pixels > 1 else 0
    return (
        rates.call
        + rates.image * math.prod(record.lhs.shape)
        + rates.result * result
        + rates.operation * 2 * result * record.length
        + rates.patch * seen
    )
