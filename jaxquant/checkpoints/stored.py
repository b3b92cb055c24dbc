"""What a checkpoint stores under one name."""

import dataclasses

from ..core import QTensor
from .source import Source


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: a Source, or a QTensor with a Source in place of each array.

    Attributes:
        name: of the tensor; for a weight that is stored as several tensors, the name that it has
            in the unquantized model.
        kind: how the file calls its type, such as "Q4_K" or "gptq 4 bits".
        value: the array or QTensor.
        nbytes: bytes that it takes in the file.
        note: why it is dequantized, or what differs from the file; empty if `value` is exact.
    """

    name: str
    kind: str
    value: Source | QTensor
    nbytes: int
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.value.shape

    @property
    def is_exact(self) -> bool:
        """Whether `value` represents exactly the numbers that the file's own decoder gives."""
        return not self.note
