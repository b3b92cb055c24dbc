"""EfficientNet-Lite0 in Keras, with the weights of its port to PyTorch."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

SIZE = 224
# Kernel size, stride, channels and repetitions of each stage.
STAGES = [
    (3, 1, 16, 1),
    (3, 2, 24, 2),
    (5, 2, 40, 2),
    (3, 2, 80, 3),
    (5, 1, 112, 3),
    (5, 2, 192, 4),
    (3, 1, 320, 1),
]
EXPANSION = 6


def net(tensors: Mapping[str, np.ndarray]) -> Any:
    """The net, from RGB images with values of 0 to 255 to logits.

    Args:
        tensors: its weights by their names in PyTorch, such as "_blocks.0._bn1.weight".
    """
    layers = _Layers(tensors)
    start = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 128, -127 / 128)(start)
    x = layers.norm(layers.convolution(x, "_conv_stem", 32, 3, 2), "_bn0")
    number = 0
    for size, first_stride, filters, repeats in STAGES:
        for repeat in range(repeats):
            x = layers.block(x, number, size, first_stride if repeat == 0 else 1, filters)
            number += 1
    x = layers.norm(layers.convolution(x, "_conv_head", 1280), "_bn1")
    x = keras.layers.GlobalAveragePooling2D()(x)
    head = keras.layers.Dense(1000, name="_fc")
    model = keras.Model(start, head(x), name="efficientnet_lite0")
    head.set_weights([tensors["_fc.weight"].T, tensors["_fc.bias"]])
    return model


class _Layers:
    """Makes and calls layers whose names are those of the tensors, with - for each dot."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = tensors

    def tensor(self, name: str, part: str) -> np.ndarray:
        return self.tensors[f"{name.replace('-', '.')}.{part}"]

    def convolution(self, x, name, filters, size=1, stride=1):
        layer = keras.layers.Conv2D(filters, size, stride, "same", use_bias=False, name=name)
        x = layer(x)
        layer.set_weights([self.tensor(name, "weight").transpose(2, 3, 1, 0)])
        return x

    def depthwise(self, x, name, size, stride):
        layer = keras.layers.DepthwiseConv2D(size, stride, "same", use_bias=False, name=name)
        x = layer(x)
        layer.set_weights([self.tensor(name, "weight").transpose(2, 3, 0, 1)])
        return x

    def norm(self, x, name, is_active=True):
        layer = keras.layers.BatchNormalization(epsilon=1e-3, name=name)
        x = layer(x)
        parts = ("weight", "bias", "running_mean", "running_var")
        layer.set_weights([self.tensor(name, part) for part in parts])
        return keras.layers.ReLU(6)(x) if is_active else x

    def block(self, x, number, size, stride, filters):
        """Expands the channels, except in the first block, filters each, and projects them."""
        prefix, before = f"_blocks-{number}-", x
        if number:
            x = self.convolution(x, f"{prefix}_expand_conv", EXPANSION * x.shape[-1])
            x = self.norm(x, f"{prefix}_bn0")
        x = self.norm(self.depthwise(x, f"{prefix}_depthwise_conv", size, stride), f"{prefix}_bn1")
        x = self.convolution(x, f"{prefix}_project_conv", filters)
        x = self.norm(x, f"{prefix}_bn2", is_active=False)
        is_residual = stride == 1 and before.shape[-1] == filters
        return keras.layers.Add()([x, before]) if is_residual else x
