"""Checks the other layers of a model before the first of them is quantized in place."""

from typing import Any

from .. import compat
from ..configs import SchemeConfig


def check_other_layers(layer: Any, config: SchemeConfig) -> None:
    """Checks what `Model.quantize` does next, when it comes to the first quantizable layer.

    It quantizes layer by layer, and an error would leave those before it quantized.

    Raises:
        ValueError: another layer cannot be quantized: as its `quantize` would raise it.
    """
    layers = compat.layers_being_quantized()
    if next((x for x in layers if hasattr(x, "check_quantization")), None) is not layer:
        return
    for other in layers[layers.index(layer) + 1 :]:
        is_ours = hasattr(other, "check_quantization")
        if not (is_ours and other.trains_in_float8 and not config.is_training):
            compat.check_quantize_arguments(other, config.mode)
        if is_ours:
            other.check_quantization(config)
