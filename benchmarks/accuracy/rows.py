"""What is compared: configs of one number of bits, and methods."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jaxquant as jq
from jaxquant.methods import AWQ, GPTQ, HQQ, SINQ, AutoRound, Importance, Nearest, Rotation

_INT3 = jq.FILE_FORMATS["int3"]
# The widths are 576 and 1536. Scales have 16 bits; codes of 3 bits count as 3, as packed files
# store them (in memory they take 4).
CONFIGS: Mapping[str, jq.ArrayConfig] = {
    "4.5": jq.ArrayConfig(format=jq.INT4, group_size=32, scale_dtype="bfloat16"),
    "3.2": jq.ArrayConfig(format=_INT3, group_size=96, symmetric=False, scale_dtype="bfloat16"),
    "2.6": jq.ArrayConfig(format=jq.INT2, group_size=32, symmetric=False, scale_dtype="bfloat16"),
}
_CODE_BITS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}


def bits_of(config: jq.ArrayConfig) -> float:
    """Bits per weight with scales and zero points, in a packed file."""
    code = _CODE_BITS[config.format.name]
    size = config.group_size
    assert isinstance(size, int), "rows have groups along one axis"
    return code + (16 + code * (not config.symmetric)) / size


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        method: as for `tree.quantize`.
        search: whether the config's range is the one with the least squared error.
        is_sequential: whether layers are quantized one after another, with the activations of
            those quantized before (`tuning.sequential`).
    """

    method: Any = None
    search: bool = False
    is_sequential: bool = False


_FEEDBACK = GPTQ(importance=True)
ROWS: Mapping[str, Row] = {
    "nearest": Row(),
    "least squared error": Row(search=True),
    "SINQ": Row([SINQ(), Nearest()]),
    "HQQ": Row(HQQ()),
    "importance": Row(Importance()),
    "AWQ": Row([AWQ(), Nearest()]),
    "AWQ, importance": Row([AWQ(), Importance()]),
    "GPTQ": Row(GPTQ()),
    "GPTQ, importance": Row(_FEEDBACK),
    "rotation, GPTQ": Row([Rotation(block=64), _FEEDBACK]),
    "AutoRound from GPTQ": Row(AutoRound(start=_FEEDBACK)),
    "QEP": Row(GPTQ(importance=True, repair=0.5), is_sequential=True),
    "Qronos": Row(GPTQ(importance=True, repair=1.0), is_sequential=True),
}
