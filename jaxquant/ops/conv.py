"""Convolution of quantized operands."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import QTensor, scale_values
from ..jaxprs import is_sharded, unless_partitioned
from . import dispatch
from .dispatch import Implementation
from .operands import (
    AxesOfBoth,
    Operand,
    OperandLike,
    as_array,
    result_dtype,
    stored_axes,
    why_unsupported_codes,
    why_unsupported_length,
    without_adapters,
)

# Options that say which elements each pixel of the result sees.
_WINDOWS = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """The arguments of `conv_general_dilated`, hashable, in terms of stored axes."""

    dimension_numbers: lax.ConvDimensionNumbers
    options: tuple[tuple[str, Any], ...]
    dtype: np.dtype

    operation: ClassVar[str] = "conv_general_dilated"

    @property
    def contract(self) -> AxesOfBoth:
        """Channels and spatial axes."""
        (_, *lhs_summed), (_, *rhs_summed), _ = self.dimension_numbers
        return tuple(lhs_summed), tuple(rhs_summed)

    @property
    def channels(self) -> AxesOfBoth:
        """A multiplier has one factor per input channel."""
        (lhs_channels, *_), (rhs_channels, *_) = self.contract
        return (lhs_channels,), (rhs_channels,)

    @property
    def batch(self) -> AxesOfBoth:
        """None: all images meet the same kernel."""
        return (), ()

    @property
    def group_sizes(self) -> None:
        """None: a convolution has no ragged rows."""

    @property
    def arrays(self) -> tuple[()]:
        """None: a convolution has no arrays but its operands."""
        return ()

    def with_arrays(self) -> "ConvSpec":
        """The spec itself: a convolution does not have other array arguments."""
        return self

    def unfold(self, x: jax.Array, weights: QTensor) -> jax.Array | None:
        """The window of each pixel of the result, in the order of the kernel's contracted axes.

        None if channels or images are in groups, whose kernels see different elements.
        """
        options = dict(self.options)
        if options.pop("feature_group_count") != 1 or options.pop("batch_group_count") != 1:
            return None
        lhs, kernel, out = self.dimension_numbers
        lengths = [weights.codes.shape[a] for a in kernel[1:]]
        windows = lax.conv_general_dilated_patches(
            x,
            lengths[1:],
            dimension_numbers=self.dimension_numbers,
            precision=lax.Precision.HIGHEST,
            **{name: options[name] for name in _WINDOWS},
        )
        windows = jnp.moveaxis(windows, out[1], -1)
        logical = np.argsort(weights.stored_axes(range(weights.ndim)))
        order = np.argsort([logical[a] for a in kernel[1:]])
        rows = windows.shape[:-1]
        windows = windows.reshape(*rows, *lengths)
        windows = windows.transpose(*range(len(rows)), *(len(rows) + a for a in order.tolist()))
        return jnp.moveaxis(windows.reshape(*rows, -1), -1, lhs[1])

    def length(self, lhs: Operand, rhs: Operand) -> int:
        """Products that are added for one pixel of a channel, padding included."""
        stored = rhs.codes.shape if isinstance(rhs, QTensor) else rhs.shape
        return math.prod(stored[a] for a in self.dimension_numbers.rhs_spec[1:])

    def rows(self, lhs: Operand, rhs: Operand) -> None:
        """None: a convolution is not a product of rows and a matrix."""

    def run(self, lhs: Any, rhs: Any, dtype: jax.typing.DTypeLike | None) -> jax.Array:
        """The convolution of plain arrays."""
        return lax.conv_general_dilated(
            lhs,
            rhs,
            dimension_numbers=self.dimension_numbers,
            preferred_element_type=dtype,
            **dict(self.options),
        )


def conv_general_dilated(
    lhs: OperandLike,
    rhs: OperandLike,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: jax.sharding.NamedSharding | jax.P | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` on arrays and QTensors, in any mixture.

        out = conv(dequantize(lhs), dequantize(rhs))

    Symmetric integer codes, with one scale per example and one per output channel,
    are convolved as integers: out = scale_l * scale_r * conv(c_l, c_r). If a QTensor has
    `inputs`, the float operand it is convolved with is quantized accordingly first, per example;
    a multiplier has one factor per input channel.

    Args:
        lhs: images, rhs: kernels; float arrays or QTensors.
        preferred_element_type: floating dtype of the result; None for the promoted dtype.
        implementation: "integer" (by int8 codes), "images" (the same, in the form that is fast on
            CPU) or "dequantize", to force one; None to select automatically.
        Others: as for `jax.lax.conv_general_dilated`.

    Returns:
        Array in the output layout of `dimension_numbers`.

    Raises:
        ValueError: `implementation` cannot run these operands, or a dtype is not floating-point.

    Gradients: as for `dot_general`.
    Error: integer sums are exact in int32, and rounded once.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.2.

    Example:
        >>> kernel = jq.quantize(jnp.ones((4, 3, 2, 2)), jq.ArrayConfig(), axis=(1, 2, 3))
        >>> jq.conv_general_dilated(jnp.ones((1, 3, 5, 5)), kernel, (1, 1), "VALID").shape
        (1, 4, 4, 4)
    """
    options: dict[str, Any] = {
        "window_strides": _hashable(window_strides),
        "padding": _hashable(padding),
        "lhs_dilation": _hashable(lhs_dilation),
        "rhs_dilation": _hashable(rhs_dilation),
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
        "out_sharding": out_sharding,
    }
    lhs, rhs = without_adapters((lhs, rhs), implementation)
    if not (isinstance(lhs, QTensor) or isinstance(rhs, QTensor)):
        return lax.conv_general_dilated(
            jnp.asarray(lhs),
            jnp.asarray(rhs),
            **options,
            dimension_numbers=dimension_numbers,
            preferred_element_type=preferred_element_type,
        )
    logical = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    stored = lax.ConvDimensionNumbers(
        stored_axes(lhs, logical.lhs_spec), stored_axes(rhs, logical.rhs_spec), logical.out_spec
    )
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    spec = ConvSpec(stored, tuple(options.items()), dtype)
    return _conv(lhs, rhs, spec, implementation)


def _hashable(x: Any) -> Any:
    if x is None or isinstance(x, str):
        return x
    return tuple(tuple(map(int, p)) if np.ndim(p) else int(p) for p in x)


@partial(jax.jit, static_argnames=("spec", "implementation"))
def _conv(lhs: Operand, rhs: Operand, spec: ConvSpec, implementation: str | None) -> jax.Array:
    return dispatch.run(_TABLE, lhs, rhs, spec, implementation)


def _dequantized(lhs: Operand, rhs: Operand, spec: ConvSpec) -> jax.Array:
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    # The transpose rule of lax's convolution requires equal dtypes.
    out = spec.run(as_array(lhs).astype(dtype), as_array(rhs).astype(dtype), None)
    return out.astype(spec.dtype)


def _integer(lhs: QTensor, rhs: QTensor, spec: ConvSpec) -> jax.Array:
    acc = spec.run(lhs.codes.astype(jnp.int8), rhs.codes.astype(jnp.int8), jnp.int32)
    return _scaled(acc, lhs, rhs, spec)


def _scaled(acc: jax.Array, lhs: QTensor, rhs: QTensor, spec: ConvSpec) -> jax.Array:
    """Sums of codes, in units of the result."""
    compute = jnp.float64 if spec.dtype == jnp.float64 else jnp.float32
    out = acc.astype(compute)
    for x, axis in zip((lhs, rhs), spec.dimension_numbers.out_spec, strict=False):
        shape = [-1 if a == axis else 1 for a in range(out.ndim)]
        out = out * scale_values(x.scale).astype(compute).reshape(shape)
    return out.astype(spec.dtype)


def _why_integer_unsupported(lhs: Any, rhs: Any, spec: ConvSpec) -> str | None:
    for x, axes in zip((lhs, rhs), spec.dimension_numbers, strict=False):
        why_not = why_unsupported_codes(x)
        if why_not is not None or x.zero_point is not None:
            return why_not or "padding does not have a zero point"
        if (
            x.scale.size not in (1, x.codes.shape[axes[0]])
            or x.scale.shape[axes[0]] != x.scale.size
        ):
            return f"scales {x.scale.shape} change within an example or an output channel"
    if dict(spec.options)["batch_group_count"] != 1:
        return "batch groups mix the scales of examples"
    length = math.prod(rhs.codes.shape[a] for a in spec.dimension_numbers.rhs_spec[1:])
    return why_unsupported_length(length, lhs, rhs)


def _by_images(lhs: QTensor, rhs: QTensor, spec: ConvSpec) -> jax.Array:
    """`_integer` in the only form for which XLA on CPU has a fast kernel.

    That is int8 (B, H, W, C) by (H, W, I, O), without dilated images: twice as fast as float32,
    where others take 4 to 60 times as long (`python -m benchmarks.convolutions`). So axes are
    moved, zeros between pixels are written out, a row of pixels is an image one pixel high, and
    kernels of more than two spatial axes are cut into slices, whose results are added.
    """
    options = dict(spec.options)
    image_axes, kernel_axes, (outputs, channels, *spatial) = spec.dimension_numbers
    batch, features, *pixels = image_axes
    images = _moved(lhs.codes, (batch, *pixels, features))
    kernel = _moved(rhs.codes, (*kernel_axes[2:], kernel_axes[1], kernel_axes[0]))
    ones = (1,) * len(pixels)
    strides, spacing = options["window_strides"], options["rhs_dilation"] or ones
    dilation, padding = options["lhs_dilation"] or ones, options["padding"]
    window = [(n - 1) * d + 1 for n, d in zip(kernel.shape, spacing, strict=False)]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:-1], window, strides, padding)
    is_larger = any(n > m for n, m in zip(window, images.shape[1:-1], strict=True))
    if is_larger or any(d != 1 for d in dilation):
        # Also pads here: XLA would merge separate padding with the dilation, and dilate again. And
        # it has no fast kernel for windows larger than the image: 1.6 s for 5x5 on 4x4x1152.
        images = lax.optimization_barrier(_padded(images, padding, dilation))
        padding = ((0, 0),) * len(ones)
    missing = max(2 - len(pixels), 0)
    after_batch = tuple(range(1, 1 + missing))
    images = jnp.expand_dims(images, after_batch)
    kernel = jnp.expand_dims(kernel, tuple(range(missing)))
    strides, spacing = (1,) * missing + strides, (1,) * missing + spacing
    padding = ((0, 0),) * missing + tuple(padding)
    groups = options["feature_group_count"]
    acc = _in_slices(images, kernel, strides, padding, spacing, groups).squeeze(after_batch)
    order = np.argsort((outputs, *spatial, channels)).tolist()
    return _scaled(_moved(acc, order), lhs, rhs, spec)


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


def _padded(
    images: jax.Array, padding: Sequence[tuple[int, int]], dilation: Sequence[int]
) -> jax.Array:
    """The images (B, spatial..., C) with zeros around, and between their pixels."""
    widths = [(*pair, d - 1) for pair, d in zip(padding, dilation, strict=True)]
    return lax.pad(images, np.int8(0), [(0, 0, 0), *widths, (0, 0, 0)])


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
    images = _padded(images, (padding[0], *[(0, 0)] * rest), (1,) * len(strides))
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


def _why_images_unsupported(lhs: Operand, rhs: Operand, spec: ConvSpec) -> str | None:
    if dict(spec.options)["out_sharding"] is not None:
        return "the sharding of a result is for one convolution"
    return _why_integer_unsupported(lhs, rhs, spec)


_TABLE = (
    Implementation(
        "images", _by_images, _why_images_unsupported, ("cpu",), is_integer=lambda *_: True
    ),
    # XLA's GPU backend lacks the convolution of int8 to int32 (jax#7637).
    Implementation(
        "integer", _integer, _why_integer_unsupported, ("tpu",), is_integer=lambda *_: True
    ),
    Implementation("dequantize", _dequantized, lambda lhs, rhs, spec: None),
)
