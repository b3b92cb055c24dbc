"""What a product is asked for, apart from its operands."""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from jax import lax

from ..core import QTensor
from .dispatch import Operand
from .operands import AxesOfBoth
from .sharding import OutSharding


@dataclasses.dataclass(frozen=True)
class DotSpec:
    """What `dot_general` is asked for, hashable, in terms of the arrays as they are stored.

    Attributes:
        contract, batch: (axes of lhs, axes of rhs), from 0 up.
        permutation: brings the product of the stored arrays to the logical order of axes.
        dtype: dtype of the result.
        precision: as for `jax.lax.dot_general`.
        out_sharding: that of the product of the stored arrays.
    """

    contract: AxesOfBoth
    batch: AxesOfBoth
    permutation: tuple[int, ...]
    dtype: np.dtype
    precision: lax.PrecisionLike
    out_sharding: OutSharding

    operation: ClassVar[str] = "dot_general"

    def length(self, lhs: Operand, rhs: Operand) -> int:
        """Products that are added for one element of the result."""
        return math.prod(_stored_shape(lhs)[a] for a in self.contract[0])

    def rows(self, lhs: Operand, rhs: Operand) -> int | None:
        """Rows of inputs, where one matrix on the right multiplies them all; else None."""
        lengths = [_stored_shape(lhs)[a] for a in self.free(lhs, 0)]
        return None if self.batch[0] else math.prod(lengths)

    def free(self, x: Operand, side: int) -> list[int]:
        """Axes of an operand (side 0: lhs, 1: rhs) that are neither contracted nor batch."""
        return [a for a in range(x.ndim) if a not in self.contract[side] + self.batch[side]]


def _stored_shape(x):
    return x.codes.shape if isinstance(x, QTensor) else x.shape
