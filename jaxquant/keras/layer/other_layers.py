"""Checks the other layers of a model before the first of them is quantized in place."""

from typing import Any

from .. import compat
from ..configs import SchemeConfig
from .policy import check_compute_dtype


def check_other_layers(layer: Any, config: SchemeConfig) -> None:
    """Checks the layers that `Model.quantize` quantizes next, at the first quantizable layer.

    Keras quantizes one layer at a time, and an error would leave earlier layers quantized.

    Raises:
        ValueError: another layer cannot be quantized: as its `quantize` would raise it.
    """
    layers = compat.layers_being_quantized()
    if next((x for x in layers if hasattr(x, "check_quantization")), None) is not layer:
        return
    for other in layers[layers.index(layer) + 1 :]:
        is_ours = hasattr(other, "check_quantization")
        if not (is_ours and other.trains_in_float8 and not config.is_training):
            check_compute_dtype(other, config.mode)
            compat.check_quantize_arguments(other, config.mode)
        if is_ours:
            other.check_quantization(config)
