"""The arguments of `dot_general` other than its operands."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import numpy as np
from jax import lax

from ..core import QTensor
from ..jaxprs import OutSharding, before_transpose, reshard_like
from .operands import AxesOfBoth, Operand, repeat_groups, result_dtype, stored_axes
from .shares import Shares


@dataclasses.dataclass(frozen=True)
class DotOptions:
    """Arguments of `dot_general` that every operation built on it passes on."""

    precision: lax.PrecisionLike = None
    preferred_element_type: jax.typing.DTypeLike | None = None
    out_sharding: OutSharding = None
    implementation: str | None = None


@dataclasses.dataclass(frozen=True)
class DotSpec:
    """The arguments of `dot_general`, in terms of stored axes. Hashable unless it holds arrays.

    Attributes:
        contract, batch: (axes of lhs, axes of rhs), from 0 up.
        permutation: brings the product of the stored arrays to the logical order of axes.
        dtype: dtype of the result.
        precision: as for `jax.lax.dot_general`.
        out_sharding: that of the product of the stored arrays.
        stack, layer: of which rhs is a slice, for kernels that read it in place; None if that is
            not known.
        unquantized: lhs before its rows were quantized, for kernels that read it in a stack and do
            this themselves; None if they cannot.
    """

    contract: AxesOfBoth
    batch: AxesOfBoth
    permutation: tuple[int, ...]
    dtype: np.dtype
    precision: lax.PrecisionLike
    out_sharding: OutSharding
    stack: QTensor | None = None
    layer: jax.Array | None = None
    unquantized: jax.Array | None = None

    operation: ClassVar[str] = "dot_general"

    @classmethod
    def of_logical_axes(
        cls,
        lhs: Operand,
        rhs: Operand,
        dimension_numbers: lax.DotDimensionNumbers,
        options: DotOptions,
    ) -> "DotSpec":
        """The spec for operands whose axes are given in logical order.

        Raises:
            ValueError: the preferred dtype is not a floating-point one.
        """
        contract, batch = (
            (stored_axes(lhs, pair[0]), stored_axes(rhs, pair[1])) for pair in dimension_numbers
        )
        permutation = _permutation(lhs, rhs, dimension_numbers)
        return cls(
            contract,
            batch,
            permutation,
            result_dtype(lhs, rhs, options.preferred_element_type),
            options.precision,
            before_transpose(options.out_sharding, permutation),
        )

    @property
    def channels(self) -> AxesOfBoth:
        """A multiplier has one factor per element of the contracted axes."""
        return self.contract

    @property
    def group_sizes(self) -> None:
        """None: `dot_general` has no ragged rows."""

    @property
    def arrays(self) -> tuple[Any, ...]:
        """Those of the stack, and the rows for kernels that read it."""
        return self.stack, self.layer, self.unquantized

    def with_arrays(
        self,
        stack: QTensor | None,
        layer: jax.Array | None,
        unquantized: jax.Array | None = None,
    ) -> "DotSpec":
        """The spec with other such arrays."""
        return dataclasses.replace(self, stack=stack, layer=layer, unquantized=unquantized)

    def with_unquantized(self, rows: jax.Array | None) -> "DotSpec":
        """The spec with the rows as they were, if rhs is a slice of a stack."""
        return self if self.stack is None else dataclasses.replace(self, unquantized=rows)

    def unfold(self, x: jax.Array, weights: QTensor) -> jax.Array:
        """The operand itself: its rows have all elements of a sum."""
        return x

    def length(self, lhs: Operand, rhs: Operand) -> int:
        """Products that are added for one element of the result."""
        return math.prod(_stored_shape(lhs)[a] for a in self.contract[0])

    def rows(self, lhs: Operand, rhs: Operand) -> int | None:
        """Rows of activations, if one matrix on the right multiplies them all; else None."""
        lengths = [_stored_shape(lhs)[a] for a in self.free(lhs, 0)]
        return None if self.batch[0] else math.prod(lengths)

    def convolution(self, lhs: Operand, rhs: Operand) -> None:
        """None: it is a product."""

    def shares(self, lhs: Operand, rhs: Operand) -> Shares | None:
        """How devices share the product of arrays that are sharded along explicit axes."""
        return Shares.of_types(lhs, rhs, self)

    def free(self, x: Operand, side: int) -> list[int]:
        """Axes of an operand (side 0: lhs, 1: rhs) that are neither contracted nor batch."""
        return [a for a in range(x.ndim) if a not in self.contract[side] + self.batch[side]]


def _stored_shape(x: Operand) -> tuple[int, ...]:
    return x.codes.shape if isinstance(x, QTensor) else x.shape


def _permutation(
    lhs: Operand, rhs: Operand, dimension_numbers: lax.DotDimensionNumbers
) -> tuple[int, ...]:
    """Where the axes of the result lie in the product of the stored arrays."""
    contract, batch = dimension_numbers
    order = list(range(len(batch[0])))
    for x, *taken in zip((lhs, rhs), contract, batch, strict=True):
        taken = {a % x.ndim for axes in taken for a in axes}
        stored = stored_axes(x, [a for a in range(x.ndim) if a not in taken])
        order += [len(order) + sorted(stored).index(a) for a in stored]
    return tuple(order)


def to_logical_order(out: jax.Array, spec: DotSpec) -> jax.Array:
    """The product of the stored arrays with its axes in their logical order."""
    is_in_order = spec.permutation == tuple(range(out.ndim))
    return out if is_in_order else out.transpose(spec.permutation)


def in_result(values: jax.Array, side: int, operands: tuple[Any, Any], spec: DotSpec) -> jax.Array:
    """Shapes what one operand has per block, and 1 long if contracted, like the product."""
    x = operands[side]
    free, batch = spec.free(x, side), spec.batch[side]
    # Not `> 1`, which is not known of symbolic dimensions.
    grouped = [a for a in (*batch, *free) if values.shape[a] != 1]
    values = repeat_groups(values, x.codes.shape, grouped)
    values = values.transpose(*batch, *free, *spec.contract[side])
    kept = values.shape[: len(batch) + len(free)]
    ones = (1,) * len(spec.free(operands[1 - side], 1 - side))
    values = values.reshape(
        *kept[: len(batch)], *ones * side, *kept[len(batch) :], *ones * (1 - side)
    )
    return reshard_like(values, spec.out_sharding)
