"""What is compared: configs of one number of bits, and methods."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jaxquant as jq
from jaxquant.methods import AWQ, GPTQ, HQQ, SINQ, AutoRound, Importance, Nearest, Rotation

_INT3 = jq.FILE_FORMATS["int3"]
_INT4 = jq.ArrayConfig(format=jq.INT4, group_size=32, scale_dtype="bfloat16")
# The widths are 576 and 1536. Scales have 16 bits.
CONFIGS: Mapping[str, jq.Scheme] = {
    "4.5": jq.Scheme(_INT4),
    "4.6": jq.Scheme(dataclasses.replace(_INT4, symmetric=False)),
    "3.2": jq.Scheme(
        jq.ArrayConfig(format=_INT3, group_size=96, symmetric=False, scale_dtype="bfloat16")
    ),
    "2.6": jq.Scheme(
        jq.ArrayConfig(format=jq.INT2, group_size=32, symmetric=False, scale_dtype="bfloat16")
    ),
    "W8A8": jq.W8A8,
    "W4A8": jq.Scheme(_INT4, jq.ArrayConfig(group_size=32)),
    "W4A4": jq.Scheme(_INT4, jq.ArrayConfig(format=jq.INT4, group_size=32)),
}
# What `allocate` chooses from, within the bits of the config. Those of 2 bits are worse than their
# scores say.
_EIGHT = jq.ArrayConfig(group_size=96, scale_dtype="bfloat16")
_NF4 = dataclasses.replace(_INT4, format=jq.NF4)
_MANY = {"3.2 bits": CONFIGS["3.2"].weights, "4.5 bits": _NF4, "8.2 bits": _EIGHT}
OPTIONS: Mapping[str, Mapping[str, jq.ArrayConfig]] = {
    "4.5": _MANY,
    "3.2": {"2.6 bits": CONFIGS["2.6"].weights, **_MANY},
}
# Formats of as many bits as that of the config.
_OF_4_BITS = (jq.NF4, jq.core.IQ4_NL)
CODEBOOKS: Mapping[str, tuple[jq.Format, ...]] = {
    "4.5": _OF_4_BITS,
    "3.2": (jq.core.IQ3_NL,),
    "2.6": (jq.core.IQ2_NL,),
    "W4A8": _OF_4_BITS,
    "W4A4": _OF_4_BITS,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender.

    Attributes:
        method: as for `tree.quantize`.
        format: in place of that of the config, one of `CODEBOOKS`.
        search: whether the config's range is the one with the least squared error.
        is_sequential: whether layers are quantized one after another, with the activations of
            those quantized before (`tuning.sequential`).
        iterations: of training the rounding of each layer, if is_sequential.
        is_allocated: whether layers may differ in bits (`allocate`), with as many as the config has
            on the whole.
        tunes: name of another row, whose scales are trained afterwards (`tuning.distill`).
        chooses_offsets: whether the method needs an asymmetric config.
    """

    method: Any = None
    format: jq.Format | None = None
    search: bool = False
    is_sequential: bool = False
    iterations: int = 0
    is_allocated: bool = False
    tunes: str | None = None
    chooses_offsets: bool = False

    def scheme(self, bits: str) -> jq.Scheme:
        """The scheme of these bits, with the format and range of the row."""
        scheme = CONFIGS[bits]
        weights = scheme.weights
        if self.format is not None:
            weights = dataclasses.replace(weights, format=self.format, symmetric=True)
        if self.search:
            weights = dataclasses.replace(weights, range=jq.MinMSE())
        return dataclasses.replace(scheme, weights=weights)

    def is_for(self, bits: str) -> bool:
        """Whether the row makes sense for a config."""
        if self.is_allocated:
            return bits in OPTIONS
        if self.chooses_offsets and CONFIGS[bits].weights.symmetric:
            return False
        return self.format is None or self.format in CODEBOOKS.get(bits, ())


_FEEDBACK = GPTQ(importance=True)
# Of 8,192 tokens, the correction of the input error is noisy with less damping.
_QEP = GPTQ(importance=True, repair=0.5, damping=0.1)
_QRONOS = GPTQ(importance=True, repair=1.0, damping=0.1)
ROWS: Mapping[str, Row] = {
    "nearest": Row(),
    "least squared error": Row(search=True),
    "SINQ": Row([SINQ(), Nearest()]),
    "HQQ": Row(HQQ(), chooses_offsets=True),
    "importance": Row(Importance()),
    "AWQ": Row([AWQ(), Nearest()]),
    "AWQ, importance": Row([AWQ(), Importance()]),
    "GPTQ": Row(GPTQ()),
    "GPTQ, importance": Row(_FEEDBACK),
    "importance, NF4": Row(Importance(), jq.NF4),
    "importance, IQ4_NL": Row(Importance(), jq.core.IQ4_NL),
    "GPTQ, importance, NF4": Row(_FEEDBACK, jq.NF4),
    "GPTQ, importance, IQ4_NL": Row(_FEEDBACK, jq.core.IQ4_NL),
    "importance, IQ3_NL": Row(Importance(), jq.core.IQ3_NL),
    "importance, IQ2_NL": Row(Importance(), jq.core.IQ2_NL),
    "GPTQ, importance, IQ3_NL": Row(_FEEDBACK, jq.core.IQ3_NL),
    "GPTQ, importance, IQ2_NL": Row(_FEEDBACK, jq.core.IQ2_NL),
    "rotation": Row([Rotation(block=64), Nearest()]),
    "rotation, GPTQ": Row([Rotation(block=64), _FEEDBACK]),
    "rotation, GPTQ, NF4": Row([Rotation(block=64), _FEEDBACK], jq.NF4),
    "AutoRound from GPTQ": Row(AutoRound(start=_FEEDBACK)),
    "QEP": Row(_QEP, is_sequential=True),
    "QEP, NF4": Row(_QEP, jq.NF4, is_sequential=True),
    "QEP, IQ3_NL": Row(_QEP, jq.core.IQ3_NL, is_sequential=True),
    "QEP, IQ2_NL": Row(_QEP, jq.core.IQ2_NL, is_sequential=True),
    "Qronos": Row(_QRONOS, is_sequential=True),
    "Qronos, NF4": Row(_QRONOS, jq.NF4, is_sequential=True),
    "rotation, QEP": Row([Rotation(block=64), _QEP], is_sequential=True),
    "rotation, QEP, NF4": Row([Rotation(block=64), _QEP], jq.NF4, is_sequential=True),
    "AutoRound of layers from QEP": Row(_QEP, is_sequential=True, iterations=200),
    "allocated, nearest": Row(is_allocated=True),
    "allocated, GPTQ, importance": Row(_FEEDBACK, is_allocated=True),
    "GPTQ, importance, tuned": Row(tunes="GPTQ, importance"),
    "QEP, tuned": Row(tunes="QEP"),
    "QEP, NF4, tuned": Row(None, jq.NF4, tunes="QEP, NF4"),
}
