"""Which axes of a parameter the axes of an array in a program are. Shapes only, no values."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from .reshaped import paired_axes


class Piece(NamedTuple):
    """Part of an axis of an array: an axis of the parameter, or part of one.

    Attributes:
        axis: of the parameter.
        length: number of elements.
    """

    axis: int
    length: int


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter with its axes moved, divided, joined, sliced or left out.

    Attributes:
        path: of the parameter.
        axes: the pieces of each axis, slow to fast; none if the parameter was broadcast along it.
        stacked: axes of the parameter that a loop slices.
    """

    path: str
    axes: tuple[tuple[Piece, ...], ...]
    stacked: frozenset[int] = frozenset()

    @property
    def is_broadcast(self) -> bool:
        """Whether an axis longer than 1 is not part of the parameter."""
        return any(not pieces for pieces in self.axes)

    def named(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The axes of the parameter that these axes are, in order."""
        found = {piece.axis for a in axes for piece in self.axes[a]}
        return tuple(sorted(found - {-1}))  # New axes of length 1 are not of the parameter.

    def transpose(self, permutation: Sequence[int]) -> "View":
        """With axes in another order."""
        return dataclasses.replace(self, axes=tuple(self.axes[a] for a in permutation))

    def resize(self, before: Sequence[int], after: Sequence[int]) -> "View":
        """With some axes shorter, as by a slice."""
        axes = tuple(
            pieces if n == m else (Piece(pieces[0].axis, m),) if pieces else ()
            for pieces, n, m in zip(self.axes, before, after, strict=True)
        )
        return dataclasses.replace(self, axes=axes)

    def without(self, axis: int) -> "View":
        """One slice along an axis, as a loop over layers gets it."""
        stacked = self.stacked | set(self.named([axis]))
        axes = (*self.axes[:axis], *self.axes[axis + 1 :])
        return dataclasses.replace(self, axes=axes, stacked=stacked)

    def broadcast(self, shape: Sequence[int], targets: Sequence[int]) -> "View":
        """With axes in new places, and new axes between them."""
        axes: list[tuple[Piece, ...]] = [() for _ in shape]
        for source, target in enumerate(targets):
            pieces = self.axes[source]
            axes[target] = pieces if math.prod(p.length for p in pieces) == shape[target] else ()
        ones = (Piece(-1, 1),)
        filled = (a or (ones if n == 1 else ()) for a, n in zip(axes, shape, strict=True))
        return dataclasses.replace(self, axes=tuple(filled))

    def reshape(self, before: Sequence[int], after: Sequence[int]) -> "View | None":
        """With axes divided or joined; None if an axis of the parameter would be torn."""
        axes: dict[int, tuple[Piece, ...] | None] = {}
        for these, those in paired_axes(before, after):
            pieces = [p for a in these for p in self.axes[a] if p.length > 1]
            axes |= {a: _take(pieces, after[a]) for a in reversed(those)}
            if pieces:
                return None
        found = [axes[a] for a in range(len(after))]
        if None in found:
            return None
        return dataclasses.replace(self, axes=tuple(pieces or () for pieces in found))


def view_of(path: str, shape: Sequence[int]) -> View:
    """The whole parameter."""
    return View(path, tuple((Piece(a, n),) for a, n in enumerate(shape)))


def _take(pieces: list[Piece], length: int) -> tuple[Piece, ...] | None:
    """Removes the last pieces that hold `length` elements together, dividing one if need be."""
    taken: list[Piece] = []
    while length > 1 and pieces:
        axis, n = pieces.pop()
        common = math.gcd(n, length)
        if common != min(n, length):
            return None
        taken.insert(0, Piece(axis, common))
        length //= common
        if n > common:
            pieces.append(Piece(axis, n // common))
    if length > 1:
        return None
    return tuple(taken) or (Piece(-1, 1),)
