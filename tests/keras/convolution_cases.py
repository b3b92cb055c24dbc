"""Rows of the table-driven test: one for each convolution.

Between them: odd numbers of channels, strides, dilation, groups, every padding, both data
formats, few channels, and more than a block holds.
"""

from typing import Any

from jaxquant.keras import layers

from .layer_cases import LayerCase


def case(input_shape: tuple[int, ...], layer: Any, *args: Any, **options: Any) -> LayerCase:
    """A row with a layer of these arguments, and a bias unless they say otherwise."""
    options = {"bias_initializer": "normal", **options}
    products = 1 + ("Separable" in layer.__name__)
    make = lambda **kw: layer(*args, **options, **kw)  # noqa: E731 (a row of a table)
    return LayerCase(layer.__name__, make, input_shape, products=products)


CONVOLUTION = [
    case((15, 9), layers.Conv1D, 7, 5, padding="causal", dilation_rate=2, activation="relu"),
    case((9, 7, 70), layers.Conv2D, 6, 3, strides=2, padding="same", groups=2, activation="tanh"),
    case((5, 4, 6, 64), layers.Conv3D, 5, (1, 2, 3), use_bias=False),
    case((9, 7), layers.Conv1DTranspose, 5, 3, strides=2, padding="same", activation="tanh"),
    case(
        (40, 4, 5),
        layers.Conv2DTranspose,
        *(3, (3, 2)),
        strides=(2, 3),
        output_padding=1,
        data_format="channels_first",
    ),
    case((3, 4, 5, 64), layers.Conv3DTranspose, 3, (3, 2, 1), dilation_rate=2),
    case((15, 7), layers.DepthwiseConv1D, 5, depth_multiplier=2),
    case(
        (33, 9, 7),
        layers.DepthwiseConv2D,
        (3, 2),
        strides=2,
        padding="same",
        depth_multiplier=2,
        data_format="channels_first",
    ),
    case(
        (7, 15),
        layers.SeparableConv1D,
        *(4, 5),
        padding="same",
        depth_multiplier=2,
        data_format="channels_first",
    ),
    # A small image: inputs are rounded twice, with a scale per image.
    case((4, 4, 33), layers.SeparableConv2D, 5, (3, 2), depth_multiplier=2),
]
