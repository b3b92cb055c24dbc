"""Checks the other layers of a model before the first of them is quantized in place."""

from typing import Any

from .. import compat
from ..configs import SchemeConfig


def check_other_layers(layer: Any, config: SchemeConfig) -> None:
    """Checks what `Model.quantize` does next, when it comes to the first quantizable layer.

    It quantizes layer by layer, and an error would leave those before it quantized.

    Raises:
        ValueError: a weight of another layer cannot be quantized.
    """
    layers = [x for x in compat.layers_being_quantized() if hasattr(x, "quantized_values")]
    if not layers or layers[0] is not layer:
        return
    for other in layers[1:]:
        floats = other.float_weights
        for name in other.likes(config):
            if floats.get(name) is not None:
                other.quantized_values(name, floats[name].value, config)
