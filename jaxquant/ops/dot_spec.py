"""What a product is asked for, apart from its operands."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import numpy as np
from jax import lax

from ..core import QTensor
from ..jaxprs import OutSharding, reshard_like
from .dispatch import Operand
from .operands import AxesOfBoth, repeat_groups


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


def to_logical_order(out: jax.Array, spec: DotSpec) -> jax.Array:
    """The product of the stored arrays with its axes in their logical order."""
    is_in_order = spec.permutation == tuple(range(out.ndim))
    return out if is_in_order else out.transpose(spec.permutation)


def in_result(values: jax.Array, side: int, operands: tuple[Any, Any], spec: DotSpec) -> jax.Array:
    """Shapes what one operand has per block, and 1 long if contracted, like the product."""
    x = operands[side]
    free, batch = spec.free(x, side), spec.batch[side]
    grouped = [a for a in (*batch, *free) if values.shape[a] > 1]
    values = repeat_groups(values, x.codes.shape, grouped)
    values = values.transpose(*batch, *free, *spec.contract[side])
    kept = values.shape[: len(batch) + len(free)]
    ones = (1,) * len(spec.free(operands[1 - side], 1 - side))
    values = values.reshape(
        *kept[: len(batch)], *ones * side, *kept[len(batch) :], *ones * (1 - side)
    )
    return reshard_like(values, spec.out_sharding)
