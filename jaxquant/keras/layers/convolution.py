"""Convolutions: plain, transposed, depthwise and separable."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
from jax import lax

from ...core import QTensor
from ...ops import conv_general_dilated
from .. import compat
from ..layer import CHANNEL_AXIS, KernelLayerMixin, QuantizedWeight

_register = keras.saving.register_keras_serializable(package="jaxquant")


def _spatial(layer: Any) -> tuple[int, ...]:
    return tuple(range(layer.rank))


def _spatial_and_inputs(layer: Any) -> tuple[int, ...]:
    """Axes of a kernel (spatial..., in, out) that a convolution contracts."""
    return tuple(range(layer.rank + 1))


def _has_one_pixel(layer: Any) -> bool:
    """Whether windows are one pixel, and all inputs meet all outputs."""
    return set(layer.kernel_size) == {1} and layer.groups == 1


def _has_windows(layer: Any) -> bool:
    """Whether windows are several pixels."""
    return set(layer.kernel_size) != {1}


def _is_stock(layer: Any) -> bool:
    """Whether `product` computes what the layer's class does."""
    # Keras' convolutions of all ranks inherit one function, which `product` replaces.
    return type(layer).convolution_op is keras.layers.Conv2D.convolution_op


def _layout(layer: Any, inputs: int, outputs: int) -> lax.ConvDimensionNumbers:
    """Dimension numbers, for a kernel with these axes of input and output channels."""
    axes = list(range(layer.rank + 2))
    channels = axes.pop(CHANNEL_AXIS[layer.data_format])
    images = (axes[0], channels, *axes[1:])
    return lax.ConvDimensionNumbers(images, (outputs, inputs, *range(layer.rank)), images)


def _padding(layer: Any) -> Any:
    """The padding for `lax`: "causal" adds zeros before the first step only."""
    pad = _PADDINGS.get(layer.padding)
    return layer.padding if pad is None else pad(layer)


def _causal(layer: Any) -> tuple[tuple[int, int], ...]:
    sizes = zip(layer.kernel_size, layer.dilation_rate, strict=True)
    return tuple((dilation * (size - 1), 0) for size, dilation in sizes)


# Paddings of Keras that `lax` does not have.
_PADDINGS = {"causal": _causal}


def _convolve(layer: Any, inputs: jax.Array, kernel: QTensor | jax.Array, groups: int) -> jax.Array:
    """Convolution with a kernel (spatial..., in / groups, out)."""
    outputs = conv_general_dilated(
        inputs.astype(kernel.dtype),
        kernel,
        layer.strides,
        _padding(layer),
        rhs_dilation=layer.dilation_rate,
        dimension_numbers=_layout(layer, layer.rank, layer.rank + 1),
        feature_group_count=groups,
    )
    if inputs.size and not outputs.size:
        raise ValueError(
            f"{layer.name} must get images at least as large as its kernel; got shape "
            f"{inputs.shape} for kernel_size={layer.kernel_size}, dilation_rate="
            f"{layer.dilation_rate} and padding {layer.padding!r}. Pass larger images, or pad them."
        )
    return outputs


def _with_parts(
    kernel: QTensor | jax.Array, function: Callable[[jax.Array], jax.Array]
) -> QTensor | jax.Array:
    """The kernel with `function` applied to its codes, scale, zero point and offset."""
    if not isinstance(kernel, QTensor):
        return function(kernel)
    parts = jax.tree.map(function, dataclasses.replace(kernel, inputs=None, values=None))
    return dataclasses.replace(parts, inputs=kernel.inputs, values=kernel.values)


def _flipped(kernel: QTensor | jax.Array, axes: Iterable[int]) -> QTensor | jax.Array:
    stored = kernel.stored_axes(axes) if isinstance(kernel, QTensor) else tuple(axes)
    return _with_parts(kernel, lambda x: jnp.flip(x, stored))


def _depthwise(layer: Any, inputs: jax.Array, kernel: QTensor | jax.Array) -> jax.Array:
    """Convolution of each channel with its own kernels (spatial..., channels, multiplier)."""
    channels, multiplier = kernel.shape[-2:]
    kernel = kernel.reorder(None) if isinstance(kernel, QTensor) else kernel

    def merge(x):
        # A scale that channels share is repeated, so that it can be split between channels.
        for axis, length in ((-2, channels), (-1, multiplier)):
            x = jnp.repeat(x, length // x.shape[axis], axis)
        return x.reshape(*x.shape[:-2], 1, channels * multiplier)

    return _convolve(layer, inputs, _with_parts(kernel, merge), groups=channels)


class _ConvolvingMixin(KernelLayerMixin):
    """A convolution, with the product of the adapter's matrices as a second kernel."""

    def adapted_product(self, inputs: jax.Array) -> jax.Array:
        outputs = self.product(inputs, self.operand("kernel"))
        if not self.lora_enabled:
            return outputs
        return outputs + self.product(inputs, self.lora_delta("kernel"))


class ConvolutionMixin(_ConvolvingMixin):
    """A Keras convolution: images with K channels -> images with `filters` channels."""

    kernel: QuantizedWeight = QuantizedWeight(
        axis=_spatial_and_inputs,
        is_matrix=_has_one_pixel,
        has_windows=lambda layer: _is_stock(layer) and _has_windows(layer),
        in_groups=lambda layer: layer.groups > 1,
    )

    def has_codes(self, name: str) -> bool:
        """See `QuantizableMixin`; False where a subclass has its own `convolution_op`."""
        return _is_stock(self) and super().has_codes(name)

    def product(self, inputs: jax.Array, kernel: QTensor | jax.Array) -> jax.Array:
        """The convolution, in groups of channels."""
        return _convolve(self, inputs, kernel, self.groups)


class ConvolutionTransposeMixin(_ConvolvingMixin):
    """A Keras transposed convolution, with a kernel (spatial..., out, in)."""

    kernel: QuantizedWeight = QuantizedWeight(
        axis=lambda layer: (*_spatial(layer), layer.rank + 1), has_windows=_has_windows
    )

    def product(self, inputs: jax.Array, kernel: QTensor | jax.Array) -> jax.Array:
        """The gradient of a convolution: dilated inputs and a flipped kernel."""
        return conv_general_dilated(
            inputs.astype(kernel.dtype),
            _flipped(kernel, range(self.rank)),
            (1,) * self.rank,
            compat.conv_transpose_padding(self),
            lhs_dilation=self.strides,
            rhs_dilation=self.dilation_rate,
            dimension_numbers=_layout(self, self.rank + 1, self.rank),
        )

    def get_config(self) -> dict[str, Any]:
        """The arguments, with `output_padding`, which Keras before 3.15 leaves out."""
        return {**super().get_config(), "output_padding": self.output_padding}


# A weight of each channel, which meets that channel alone.
_DEPTHWISE = partial(QuantizedWeight, _spatial, has_windows=_has_windows, in_groups=True)


class DepthwiseConvolutionMixin(_ConvolvingMixin):
    """A Keras depthwise convolution: K channels -> K * `depth_multiplier` channels."""

    kernel: QuantizedWeight = _DEPTHWISE()

    def product(self, inputs: jax.Array, kernel: QTensor | jax.Array) -> jax.Array:
        """The convolution of each channel on its own."""
        return _depthwise(self, inputs, kernel)


class SeparableConvolutionMixin(KernelLayerMixin):
    """A Keras separable convolution: a depthwise one, then a product of the channels."""

    depthwise_kernel: QuantizedWeight = _DEPTHWISE()
    pointwise_kernel: QuantizedWeight = QuantizedWeight(axis=_spatial_and_inputs, is_matrix=True)

    def call(self, inputs: jax.Array) -> Any:
        """The forward pass: Keras' own in float, on codes if a kernel is quantized."""
        names = "depthwise_kernel", "pointwise_kernel"
        if self.lora_enabled or not any(self.has_codes(name) for name in names):
            return super(KernelLayerMixin, self).call(inputs)
        depthwise, pointwise = (self.operand(name) for name in names)
        between = _depthwise(self, inputs, depthwise)
        # XLA skips the rounding to bfloat16 under jit only, which would change the codes.
        info = jnp.finfo(between.dtype)
        between = lax.reduce_precision(between, info.nexp, info.nmant)
        outputs = conv_general_dilated(
            between,
            pointwise,
            (1,) * self.rank,
            "valid",
            dimension_numbers=_layout(self, self.rank, self.rank + 1),
        )
        return self._finished(outputs)


@_register
class Conv1D(ConvolutionMixin, keras.layers.Conv1D):
    """`keras.layers.Conv1D`, quantizable."""


@_register
class Conv2D(ConvolutionMixin, keras.layers.Conv2D):
    """`keras.layers.Conv2D`, quantizable."""


@_register
class Conv3D(ConvolutionMixin, keras.layers.Conv3D):
    """`keras.layers.Conv3D`, quantizable."""


@_register
class Conv1DTranspose(ConvolutionTransposeMixin, keras.layers.Conv1DTranspose):
    """`keras.layers.Conv1DTranspose`, quantizable."""


@_register
class Conv2DTranspose(ConvolutionTransposeMixin, keras.layers.Conv2DTranspose):
    """`keras.layers.Conv2DTranspose`, quantizable."""


@_register
class Conv3DTranspose(ConvolutionTransposeMixin, keras.layers.Conv3DTranspose):
    """`keras.layers.Conv3DTranspose`, quantizable."""


@_register
class DepthwiseConv1D(DepthwiseConvolutionMixin, keras.layers.DepthwiseConv1D):
    """`keras.layers.DepthwiseConv1D`, quantizable."""


@_register
class DepthwiseConv2D(DepthwiseConvolutionMixin, keras.layers.DepthwiseConv2D):
    """`keras.layers.DepthwiseConv2D`, quantizable."""


@_register
class SeparableConv1D(SeparableConvolutionMixin, keras.layers.SeparableConv1D):
    """`keras.layers.SeparableConv1D`, quantizable."""


@_register
class SeparableConv2D(SeparableConvolutionMixin, keras.layers.SeparableConv2D):
    """`keras.layers.SeparableConv2D`, quantizable."""
