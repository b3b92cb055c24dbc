"""Slow products with three quantized products, from the definitions: NumPy, one block at a time."""

import itertools
from typing import Any

import numpy as np

INT8_LARGEST = 127.0


def tiles(shape, blocks):
    """Slices of the blocks of an array; the last one along an axis may be shorter.

    Args:
        shape: of the array.
        blocks: length along each axis that is divided, by axis; other axes are whole.
    """
    starts = [range(0, n, blocks.get(a, max(n, 1))) for a, n in enumerate(shape)]
    lengths = [blocks.get(a, max(n, 1)) for a, n in enumerate(shape)]
    for corner in itertools.product(*starts):
        yield tuple(slice(i, i + n) for i, n in zip(corner, lengths, strict=True))


def shared_along(ndim, axes, size=None, along=None):
    """Blocks for scales shared along some axes, of `size` elements along one of them."""
    blocks = {a: 1 for a in range(ndim) if a not in axes or size is not None}
    if size is not None:
        blocks[axes[-1] if along is None else along] = size
    return blocks


def int8(x, blocks):
    """The values of int8 codes, round(x / s) s with s = max|x| / 127 in each block."""
    x = np.asarray(x, np.float64)
    out = np.zeros_like(x)
    for tile in tiles(x.shape, blocks):
        largest = np.max(np.abs(x[tile]), initial=0)
        scale = largest / INT8_LARGEST if largest else 1.0
        out[tile] = np.round(x[tile] / scale) * scale
    return out


def dot(labels, quantized, *arrays: Any):
    """out, lhs gradient and rhs gradient of a product of labelled axes.

    Args:
        labels: of lhs, rhs and out.
        quantized: (array, its labels, labels that are summed over) -> values of its codes.
        arrays: lhs, rhs and the gradient of out.
    """
    found = []
    named = dict(zip(labels, arrays, strict=True))
    for left, right, result in (
        (labels[0], labels[1], labels[2]),
        (labels[2], labels[1], labels[0]),
        (labels[2], labels[0], labels[1]),
    ):
        summed = [a for a in left if a in right and a not in result]
        pair = [quantized(named[x], x, summed) for x in (left, right)]
        found.append(np.einsum(f"{left},{right}->{result}", *pair))
    return found


class Convolution:
    """NHWC by HWIO, with strides, zeros around images, dilated kernels and groups of channels."""

    def __init__(self, strides, padding, dilation, groups):
        self.strides, self.padding, self.dilation, self.groups = strides, padding, dilation, groups

    def _places(self, kernel, out):
        """(row and column of the result, of the kernel, and of the padded image)."""
        for i, j in itertools.product(range(out[1]), range(out[2])):
            for a, b in itertools.product(range(kernel[0]), range(kernel[1])):
                row = i * self.strides[0] + a * self.dilation[0]
                yield i, j, a, b, row, j * self.strides[1] + b * self.dilation[1]

    def _channels(self, kernel):
        """(channels of the image, of the result) of each group."""
        each_in, each_out = kernel[2], kernel[3] // self.groups
        for g in range(self.groups):
            yield (
                slice(g * each_in, g * each_in + each_in),
                slice(g * each_out, g * each_out + each_out),
            )

    def _padded(self, x):
        return np.pad(x, [(0, 0), *self.padding, (0, 0)])

    def out(self, x, w, shape):
        """The result."""
        out, x = np.zeros(shape), self._padded(x)
        for i, j, a, b, row, column in self._places(w.shape, shape):
            for c, o in self._channels(w.shape):
                out[:, i, j, o] += x[:, row, column, c] @ w[a, b, :, o]
        return out

    def of_images(self, gradient, w, shape):
        """The gradient of images of this shape."""
        found = self._padded(np.zeros(shape))
        for i, j, a, b, row, column in self._places(w.shape, gradient.shape):
            for c, o in self._channels(w.shape):
                found[:, row, column, c] += gradient[:, i, j, o] @ w[a, b, :, o].T
        (top, _), (left, _) = self.padding
        return found[:, top : top + shape[1], left : left + shape[2]]

    def of_kernel(self, gradient, x, shape):
        """The gradient of a kernel of this shape."""
        found, x = np.zeros(shape), self._padded(x)
        for i, j, a, b, row, column in self._places(shape, gradient.shape):
            for c, o in self._channels(shape):
                found[a, b, :, o] += x[:, row, column, c].T @ gradient[:, i, j, o]
        return found
