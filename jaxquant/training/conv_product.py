"""Convolutions for training, quantized forward and in both gradients."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from .. import ops
from ..jaxprs import vary_alike
from .delayed import DelayedScaling
from .product import AxesOfBoth, check_product, run_product, transpose_product
from .product_config import ProductConfig


@dataclasses.dataclass(frozen=True)
class _Spec:
    """Static arguments of `conv_general_dilated`, hashable.

    Attributes:
        numbers: where the axes of images, kernels and results are.
        options: other arguments of `lax.conv_general_dilated`.
        dtype: preferred_element_type.
    """

    numbers: lax.ConvDimensionNumbers
    options: tuple[tuple[str, Any], ...]
    dtype: jax.typing.DTypeLike | None

    @property
    def contract(self) -> AxesOfBoth:
        """Channels and spatial axes."""
        return tuple(self.numbers.lhs_spec[1:]), tuple(self.numbers.rhs_spec[1:])

    @property
    def rotates(self) -> bool:
        """Whether all images are convolved with the same kernel."""
        options = dict(self.options)
        return options["feature_group_count"] == options["batch_group_count"] == 1

    def contract_in_gradient(self, side: int) -> AxesOfBoth:
        """Channels of the result and spatial axes; for the kernel, images and spatial axes."""
        (image, _, *pixels), (out, _, *window), (batch, channels, *spatial) = self.numbers
        if side:
            return (batch, *spatial), (image, *pixels)
        return (channels, *spatial), (out, *window)

    def along(self, contract: AxesOfBoth, shape: tuple[int, ...], size: int) -> tuple[int, int]:
        """Groups run along channels, and in the gradient of the kernel along images."""
        return contract[0][0], contract[1][0]

    def blocks(self, side: int, shape: tuple[int, ...], sizes: tuple[int, ...]) -> dict[int, int]:
        """2-D blocks, by axis: input channels, and output channels or images."""
        free, channels = (self.numbers.rhs_spec if side else self.numbers.lhs_spec)[:2]
        return {channels: sizes[0], free: sizes[1]}

    def run(self, lhs: Any, rhs: Any, arrays: None) -> jax.Array:
        """The convolution itself."""
        return ops.conv_general_dilated(
            lhs,
            rhs,
            **dict(self.options),
            dimension_numbers=self.numbers,
            preferred_element_type=self.dtype,
        )

    def run_gradient(self, side: int, gradient: Any, other: Any, like: Any, arrays: None) -> Any:
        """The gradient of a side, which is a convolution too."""

        def convolve(lhs, rhs):
            options = dict(self.options)
            return lax.conv_general_dilated(lhs, rhs, **options, dimension_numbers=self.numbers)

        return transpose_product(convolve, side, gradient, other, like)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    config: ProductConfig,
    key: jax.Array | None = None,
    scaling: DelayedScaling | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` of float arrays, quantized forward and in both gradients.

        out          = conv(Q(lhs), Q(rhs))              scales per image, per output channel
        lhs gradient = conv^T(Q(gradient), Q(rhs))       scales per image, per input channel
        rhs gradient = conv^T(Q(lhs), Q(gradient))       scales per input and per output channel

    Q(x) is `jaxquant.quantize(x, ...)`, with scales shared along the channels and spatial axes that
    the convolution sums over. Groups run along channels, and in the gradient of rhs along images.
    All three are computed by `jaxquant.conv_general_dilated`, the gradients as JAX derives them.

    Args:
        lhs: floating-point images, rhs: floating-point kernels, of one dtype.
        preferred_element_type: floating dtype of the result; None for that of the operands.
        config: which of the three convolutions and their operands are quantized, and how.
        key, scaling: as for `dot_general`.
        Others: as for `jax.lax.conv_general_dilated`.

    Returns:
        Array in the output layout of `dimension_numbers`.

    Raises:
        ValueError: an operand is not a floating-point array, the key is missing, the config does
            not support `scaling`, or the shapes do not match (from `jax.lax`).

    Gradients: rounding and clipping count as the identity, first-order derivatives only.
    Error: without quantized operands, that of `jax.lax.conv_general_dilated`. NaN or Inf in an
        operand makes every result that shares its scale NaN.
    Source: Wortsman et al. 2023 (SwitchBack), arXiv:2304.13013, with convolutions in place of
        products of matrices.

    Example:
        >>> images, kernels = jnp.ones((1, 3, 5, 5)), jnp.ones((4, 3, 2, 2))
        >>> config = jq.training.SWITCHBACK
        >>> conv = jq.training.conv_general_dilated
        >>> conv(images, kernels, (1, 1), "VALID", config=config).shape
        (1, 4, 4, 4)
    """
    check_product(lhs, rhs, config, key, scaling)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    options = (
        ("window_strides", _hashable(window_strides)),
        ("padding", _hashable(padding)),
        ("lhs_dilation", _hashable(lhs_dilation)),
        ("rhs_dilation", _hashable(rhs_dilation)),
        ("feature_group_count", feature_group_count),
        ("batch_group_count", batch_group_count),
        ("precision", precision),
    )
    lhs, rhs = vary_alike([lhs, rhs])
    spec = _Spec(numbers, options, preferred_element_type)
    return run_product(spec, config, lhs, rhs, key, scaling)


def _hashable(x: Any) -> Any:
    """Nested sequences and arrays as tuples."""
    if isinstance(x, np.ndarray):
        return _hashable(x.tolist())
    is_sequence = isinstance(x, Sequence) and not isinstance(x, str)
    return tuple(map(_hashable, x)) if is_sequence else x
