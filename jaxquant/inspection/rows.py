"""One tensor of a file, as pages show it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..checkpoints import CheckpointRow
from ..core import LowRank, QTensor, describe
from ..tree import ReportRow


@dataclasses.dataclass(frozen=True)
class InspectedTensor:
    """One tensor of a file.

    Attributes:
        name: of the tensor.
        shape: its shape.
        format: number format of its codes, or its dtype.
        granularity: which elements share a scale, such as "g128 asymmetric"; "" without scales.
        inputs: how activations that it is multiplied with are quantized; "" if they are not.
        bits: bits in memory per element, scales and zero points included.
        nbytes: bytes in memory.
        bytes_elsewhere: bytes before quantization for files of `jaxquant.save`, or in the file.
        sqnr: signal to quantization noise in dB; None if it is not known.
        note: why it is not quantized, what may be wrong, and its adapters; "" for nothing.
        codes: how often codes fall into equal bins over the format's range; empty if not known.
        scales: how many scales have which exponent, floor(log2|scale|); empty if not known.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    granularity: str
    inputs: str
    bits: float
    nbytes: int
    bytes_elsewhere: int
    sqnr: float | None
    note: str
    codes: tuple[int, ...] = ()
    scales: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def of_tree(row: ReportRow, leaf: Any) -> InspectedTensor:
    """The row of a leaf of a tree, from its row in a report."""
    notes, base = [row.warning or row.reason], leaf
    if isinstance(leaf, LowRank):
        notes, base = [*notes, f"adapters of rank {leaf.rank}"], leaf.base
    is_quantized = isinstance(base, QTensor)
    dtype = str(getattr(leaf, "dtype", type(leaf).__name__))
    return InspectedTensor(
        row.path,
        row.shape,
        *_words(describe(base) if is_quantized else dtype),
        row.bits_per_weight,
        row.bytes_after,
        row.bytes_before,
        row.sqnr,
        "; ".join(filter(None, notes)),
        row.codes,
        scale_exponents(base) if is_quantized else {},
    )


def of_checkpoint(row: CheckpointRow) -> InspectedTensor:
    """The row of a tensor of a checkpoint, whose codes have not been read."""
    note = f"stored as {row.kind}" + (f"; {row.note}" if row.note else "")
    return InspectedTensor(
        row.name,
        row.shape,
        *_words(row.becomes),
        row.bits_per_weight,
        row.bytes_loaded,
        row.bytes_stored,
        None,
        note,
    )


def _words(description: str) -> tuple[str, str, str]:
    """Format, granularity and inputs of a text of `tree.describe`."""
    weights, _, inputs = description.partition(", ")
    format, _, granularity = weights.partition(" ")
    return format, granularity, inputs


def scale_exponents(q: QTensor) -> dict[int, int]:
    """How many scales have which exponent, floor(log2|scale|)."""
    scale = q.scale.dequantize() if isinstance(q.scale, QTensor) else q.scale
    values = np.abs(np.asarray(scale, np.float32))
    values = values[np.isfinite(values) & (values > 0)]
    # frexp gives a mantissa below 1.
    found, counts = np.unique_counts(np.frexp(values)[1] - 1)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
