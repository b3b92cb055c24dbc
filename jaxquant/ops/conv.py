"""Convolution of quantized operands."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import QTensor
from ..jaxprs import OutSharding
from . import dispatch
from .dispatch import Implementation
from .operands import (
    AxesOfBoth,
    Operand,
    OperandLike,
    as_array,
    as_stored,
    result_dtype,
    stored_axes,
    without_adapters,
)
from .record import Convolution
from .rows import conv_images, conv_integer, conv_native, conv_shifted

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
    def out_sharding(self) -> OutSharding:
        """As for `jax.lax.conv_general_dilated`."""
        return dict(self.options)["out_sharding"]

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

    def with_unquantized(self, rows: jax.Array | None) -> "ConvSpec":
        """The spec itself: no kernel quantizes rows."""
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

    def shares(self, lhs: Operand, rhs: Operand) -> None:
        """None: XLA partitions what kernels do not divide themselves."""

    def convolution(self, lhs: Operand, rhs: Operand) -> Convolution:
        """Its groups, channels and pixels of a window."""
        images, kernel = as_stored(lhs), as_stored(rhs)
        (_, channels, *_), (_, _, *spatial), _ = self.dimension_numbers
        return Convolution(
            groups=dict(self.options)["feature_group_count"],
            channels=images.shape[channels],
            pixels=math.prod(kernel.shape[a] for a in spatial),
        )

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
        implementation: "native" (patches by the native kernels for CPUs), "shifted" (a sum of
            shifted images, for channels alone), "images" (int8 codes in the form that XLA for CPUs
            convolves fast), "integer" (int8 codes) or "dequantize", to force one; None to select
            automatically.
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


_BY_XLA = (
    conv_shifted.ROW,
    conv_images.ROW,
    conv_integer.ROW,
    Implementation("dequantize", _dequantized, lambda lhs, rhs, spec: None),
)
_TABLE = (conv_native.row(_BY_XLA), *_BY_XLA)
