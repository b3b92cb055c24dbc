"""Parameters of any layout as stacks of matrices (N, K) = (outputs, contracted elements), and back.

Columns are in group order: those that share a scale are adjacent, and groups follow each other in
the order of the scales.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from ..core import ArrayConfig, Axes, QTensor, block_shape, normalize_axes


def stack_axes(ndim: int, contracted: tuple[int, ...]) -> int:
    """How many leading axes may be stacked layers: a matrix remains, and none is contracted."""
    return min(max(ndim - 2, 0), *contracted, ndim)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an array is a stack of matrices.

    Attributes:
        shape: of the array.
        contracted: its contracted axes, ascending.
        stacked: the number of leading axes that are stacked.
        blocks: elements that share a scale along each axis.
    """

    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    stacked: int
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], config: ArrayConfig, axis: Axes, stacked: int) -> "Layout":
        """The layout of an array whose scales are shared along the contracted axes.

        Raises:
            ValueError: as for `jaxquant.quantize`.
        """
        contracted = tuple(sorted(normalize_axes(axis, len(shape))))
        per_channel = dataclasses.replace(config, per_tensor=False)
        return cls(shape, contracted, stacked, block_shape(shape, per_channel, axis))

    @property
    def free(self) -> tuple[int, ...]:
        """Axes that are neither stacked nor contracted."""
        return tuple(a for a in range(self.stacked, len(self.shape)) if a not in self.contracted)

    @property
    def columns(self) -> int:
        """K."""
        return math.prod(self.shape[a] for a in self.contracted)

    @property
    def moves_columns(self) -> bool:
        """Whether the group order differs from the order of the contracted axes."""
        order = [a for a in self._group_order if self._split[a] > 1]
        return order != sorted(order)

    @property
    def group_size(self) -> int:
        """Adjacent columns that share a scale."""
        return math.prod(self.blocks[a] for a in self.contracted)

    def matrices(self, x: jax.Array) -> jax.Array:
        """The array as (S, N, K)."""
        rows = self.stacked + len(self.free)
        x = x.transpose(*range(self.stacked), *self.free, *self.contracted)
        x = x.reshape(*x.shape[:rows], *self._split)
        x = x.transpose(*range(rows), *(rows + a for a in self._group_order))
        return x.reshape(math.prod(self.shape[: self.stacked]), -1, self.columns)

    def in_group_order(self, mean: np.ndarray, axes: int) -> np.ndarray:
        """A statistic (..., K, K) or (..., K) whose last `axes` axes are brought to group order."""
        if not self.moves_columns:
            return mean
        order = np.arange(self.columns).reshape(self._split).transpose(self._group_order).ravel()
        for axis in range(mean.ndim - axes, mean.ndim):
            mean = mean.take(order, axis)
        return mean

    def columns_back(self, x: jax.Array) -> jax.Array:
        """(K,) in group order, or stacks of it, in the shape of the stack and contracted axes."""
        stack = self.shape[: self.stacked]
        x = x.reshape(*stack, *(self._split[a] for a in self._group_order))
        back = np.argsort(self._group_order)
        x = x.transpose(*range(self.stacked), *(self.stacked + a for a in back.tolist()))
        return x.reshape(*stack, *(self.shape[a] for a in self.contracted))

    def array(self, q: QTensor) -> QTensor:
        """A stack of quantized matrices (S, N, K) in the shape of the array."""
        inverse = np.argsort([*range(self.stacked), *self.free, *self.contracted]).tolist()
        stack = self.shape[: self.stacked]
        lengths = [self.shape[a] for a in self.free]

        def rows_of(x: jax.Array) -> list[int]:
            """Scales that rows share have one row."""
            return [*stack, *(lengths if x.shape[1] > 1 else [1] * len(lengths))]

        def of_groups(x: Any) -> Any:
            """One element per group, (S, N or 1, K/g or 1)."""
            if isinstance(x, QTensor):
                parts = of_groups(x.codes), of_groups(x.scale)
                return dataclasses.replace(x, codes=parts[0], scale=parts[1])
            counts = [self.shape[a] // self.blocks[a] for a in self.contracted]
            counts = counts if x.shape[2] > 1 else [1] * len(counts)
            return x.reshape(*rows_of(x), *counts).transpose(inverse)

        codes = self.columns_of_rows(q.codes).transpose(inverse)
        parts = {
            name: None if getattr(q, name) is None else of_groups(getattr(q, name))
            for name in ("scale", "zero_point", "offset")
        }
        return dataclasses.replace(q, codes=codes, **parts)

    def columns_of_rows(self, x: jax.Array) -> jax.Array:
        """(S, N, K) as (stack, free axes, contracted axes)."""
        rows = [*self.shape[: self.stacked], *(self.shape[a] for a in self.free)]
        x = x.reshape(*rows, *(self._split[a] for a in self._group_order))
        back = [len(rows) + a for a in np.argsort(self._group_order).tolist()]
        x = x.transpose(*range(len(rows)), *back)
        return x.reshape(*rows, *(self.shape[a] for a in self.contracted))

    @property
    def _split(self) -> list[int]:
        """Number of groups and their length, for each contracted axis."""
        pairs = [(self.shape[a] // self.blocks[a], self.blocks[a]) for a in self.contracted]
        return [n for pair in pairs for n in pair]

    @property
    def _group_order(self) -> list[int]:
        """All numbers of groups, then all lengths."""
        axes = range(2 * len(self.contracted))
        return [*axes[::2], *axes[1::2]]


def matrix_config(config: ArrayConfig, layout: Layout) -> tuple[ArrayConfig, Axes]:
    """The config and the axis of one matrix."""
    if config.per_tensor:
        return config, (0, 1)
    is_fixed = config.format.group_size is not None
    size = None if is_fixed or layout.group_size == layout.columns else layout.group_size
    return dataclasses.replace(config, group_size=size), 1
