"""The row that convolves int8 codes in the only form for which XLA on CPU has a fast kernel."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import QTensor
from ...jaxprs import is_sharded, unless_partitioned
from ..dispatch import Implementation
from ..operands import Operand
from . import conv_integer
from .windows import Windows

# XLA's kernel is fast where so many channels divide those of the images.
_CHANNELS = 4


def run(lhs: QTensor, rhs: QTensor, spec: Any) -> jax.Array:
    """The convolution as one of int8 (B, H, W, C) by (H, W, I, O), without dilated images.

    That is twice as fast as float32, where others take 4 to 60 times as long (`python -m
    benchmarks.convolutions`). So axes are moved, zeros between pixels are written out, channels are
    added to fill words, a row of pixels is an image one pixel high, and kernels of more than two
    spatial axes are cut into slices, whose results are added.
    """
    groups = dict(spec.options)["feature_group_count"]
    windows = Windows.of(spec, lhs.codes.shape, rhs.codes.shape)
    image_axes, kernel_axes, (outputs, channels, *spatial) = spec.dimension_numbers
    batch, features, *pixels = image_axes
    images = _moved(lhs.codes, (batch, *pixels, features))
    kernel = _moved(rhs.codes, (*kernel_axes[2:], kernel_axes[1], kernel_axes[0]))
    if groups == 1 and images.shape[-1] > 1:
        missing = -images.shape[-1] % _CHANNELS
        images, kernel = _extended(images, -1, missing), _extended(kernel, -2, missing)
    padding = windows.padding
    pairs = zip(windows.extents, images.shape[1:-1], strict=True)
    if any(n > m for n, m in pairs) or any(d != 1 for d in windows.dilation):
        # Also pads here: XLA would merge separate padding with the dilation, and dilate again. And
        # it has no fast kernel for windows larger than the image: 1.6 s for 5x5 on 4x4x1152.
        padded = windows.padded(images, range(1, images.ndim - 1))
        images, padding = lax.optimization_barrier(padded), ((0, 0),) * len(padding)
    missing = max(2 - len(pixels), 0)
    after_batch = tuple(range(1, 1 + missing))
    images = jnp.expand_dims(images, after_batch)
    kernel = jnp.expand_dims(kernel, tuple(range(missing)))
    strides, spacing = ((1,) * missing + x for x in (windows.strides, windows.spacing))
    padding = ((0, 0),) * missing + padding
    acc = _in_slices(images, kernel, strides, padding, spacing, groups).squeeze(after_batch)
    order = np.argsort((outputs, *spatial, channels)).tolist()
    return conv_integer.scaled(_moved(acc, order), lhs, rhs, spec)


def _extended(x: jax.Array, axis: int, count: int) -> jax.Array:
    """The array with zeros at the end of an axis."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count)
    return jnp.pad(x, widths) if count else x


def _moved(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The array, as integers that XLA convolves, with its axes in another order."""
    x = x if x.dtype == jnp.int32 else x.astype(jnp.int8)
    if tuple(axes) == tuple(range(x.ndim)):
        return x
    x = x.transpose(axes)
    if is_sharded(x):
        return x
    # Flattened behind a barrier: XLA would merge the transpose into a slow convolution. To flatten
    # an array that is sharded along a later axis or several, XLA would gather it.
    return unless_partitioned(_behind_a_barrier, lambda x: x, x)


def _behind_a_barrier(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)


def _in_slices(
    images: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    spacing: Sequence[int],
    groups: int,
) -> jax.Array:
    """(B, spatial..., C) by (spatial..., I, O) to int32, over two spatial axes or more."""
    if len(strides) == 2:
        return lax.conv_general_dilated(
            images,
            kernel,
            strides,
            padding,
            rhs_dilation=spacing,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            preferred_element_type=jnp.int32,
        )
    rest = len(strides) - 1
    images = jnp.pad(images, [(0, 0), padding[0], *[(0, 0)] * (rest + 1)])
    extent = (len(kernel) - 1) * spacing[0] + 1
    length = max((images.shape[1] - extent) // strides[0] + 1, 0)
    sums = []
    for first, part in enumerate(kernel):
        start = first * spacing[0]
        seen = images[:, start : start + length * strides[0] : strides[0]][:, :length]
        flat = seen.reshape(len(images) * length, *seen.shape[2:])
        sums += [_in_slices(flat, part, strides[1:], padding[1:], spacing[1:], groups)]
    total = reduce(jnp.add, sums)
    return total.reshape(len(images), length, *total.shape[1:])


def _why_unsupported(lhs: Operand, rhs: Operand, spec: Any) -> str | None:
    if spec.out_sharding is not None:
        return "the sharding of a result is for one convolution"
    return conv_integer.why_unsupported(lhs, rhs, spec)


def _why_slower(lhs: QTensor, rhs: QTensor, spec: Any, _: str | None) -> str | None:
    return Windows.of(spec, lhs.codes.shape, rhs.codes.shape).why_slower


ROW = Implementation(
    "images", run, _why_unsupported, ("cpu",), _why_slower, is_integer=lambda *_: True
)
