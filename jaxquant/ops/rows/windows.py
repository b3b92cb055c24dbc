"""Which pixels of the images each pixel of a convolution's result sees."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Windows:
    """The windows of a convolution; a value per spatial axis.

    Attributes:
        lengths: pixels of a window that are multiplied.
        strides: from a window to the next.
        spacing: from a pixel of a window to the next.
        dilation: from a pixel of the images to the next; there are zeros between them.
        padding: zeros before and after.
    """

    lengths: tuple[int, ...]
    strides: tuple[int, ...]
    spacing: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Pairs

    @classmethod
    def of(cls, spec: Any, images: Sequence[int], kernel: Sequence[int]) -> "Windows":
        """Those of a `ConvSpec` for stored arrays of these shapes."""
        image_axes, kernel_axes, _ = spec.dimension_numbers
        pixels, lengths = (
            [s[a] for a in axes[2:]] for s, axes in ((images, image_axes), (kernel, kernel_axes))
        )
        options = dict(spec.options)
        ones = (1,) * len(pixels)
        strides, spacing = options["window_strides"], options["rhs_dilation"] or ones
        padding = options["padding"]
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(pixels, _extents(lengths, spacing), strides, padding)
        pairs = tuple((int(a), int(b)) for a, b in padding)
        return cls(tuple(lengths), strides, spacing, options["lhs_dilation"] or ones, pairs)

    @property
    def extents(self) -> tuple[int, ...]:
        """Pixels from the first of a window to its last."""
        return _extents(self.lengths, self.spacing)

    @property
    def count(self) -> int:
        """Pixels of a window."""
        return int(np.prod(self.lengths, dtype=int))

    @property
    def why_slower(self) -> str | None:
        """Why XLA's convolution of floats is faster than one of images with zeros written out."""
        are_apart = any(d > 1 for d in self.dilation)
        return "XLA skips the zeros between dilated pixels of floats" if are_apart else None

    def padded(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """The images with zeros around, and between their pixels, along these axes."""
        widths = [(0, 0, 0)] * x.ndim
        for a, pair, d in zip(axes, self.padding, self.dilation, strict=True):
            widths[a] = (*pair, d - 1)
        return x if not any(map(any, widths)) else lax.pad(x, np.zeros((), x.dtype), widths)

    def shifted(self, x: jax.Array, axes: Sequence[int]) -> Iterator[jax.Array]:
        """For each pixel of a window, that pixel of all windows of padded images."""
        for place in itertools.product(*map(range, self.lengths)):
            start, stop, steps = [0] * x.ndim, list(x.shape), [1] * x.ndim
            each = zip(axes, place, self.spacing, self.strides, self.extents, strict=True)
            for a, i, spacing, stride, extent in each:
                windows = max((x.shape[a] - extent) // stride + 1, 0)
                start[a] = min(i * spacing, x.shape[a])
                stop[a] = start[a] + (windows - 1) * stride + 1 if windows else start[a]
                steps[a] = stride
            yield lax.slice(x, start, stop, steps)


def _extents(lengths: Sequence[int], spacing: Sequence[int]) -> tuple[int, ...]:
    return tuple((n - 1) * d + 1 for n, d in zip(lengths, spacing, strict=True))
