"""Quantizes models in place by Keras' configs of GPTQ and AWQ."""

from typing import Any

import keras

from .. import compat
from ..configs import QuantizationConfig
from ..layer import MODES_WITH_DATA, QuantizableMixin
from .calibrated import quantize_by_methods, take_over, weights_with_methods
from .checks import raise_problems
from .stock_methods import calibration_of


def quantize_in_place(layer: Any, config: Any) -> None:
    """Quantizes all layers of a running `Model.quantize`, when it reaches the first of them.

    Keras quantizes layer by layer, and then calibrates Dense and EinsumDense. Here the whole model
    is calibrated first, as by `jaxquant.keras.quantize`, and layers change only if that succeeds.

    Args:
        layer: that of which `quantize` was called.
        config: a GPTQConfig or AWQConfig of Keras. If it or the model names sequential blocks,
            the layers in those are quantized; else all whose weights multiply activations.

    Raises:
        NotImplementedError: this layer stays in float, as others are quantized. Keras warns.
        ValueError: the call is not that of a model; the model has stock layers that would be
            quantized; a layer is not built or already quantized; no weight is selected; or as for
            `jaxquant.keras.quantize`. The model is unchanged.
    """
    frame, earlier = compat.running_quantize(), compat.nothing_to_calibrate(config)
    if frame is None:
        raise ValueError(
            f"{config.mode} quantizes a whole model, by what its layers are called with; got it "
            f"for the layer {layer.name!r} of jaxquant alone. Call model.quantize({config.mode!r}, "
            f"config=...) or jaxquant.keras.quantize(model, config) with this "
            f"{type(config).__name__}."
        )
    if earlier is None or earlier.frame is not frame:
        compat.NothingToCalibrate(config, _quantize(frame.f_locals["self"], config))
    if layer.declared_weights and not layer.stored_weights:
        raise NotImplementedError(
            f"{layer.path or layer.name} stays in float: {config.mode} quantizes layers that "
            "multiply activations with their weights, in the sequential blocks if there are any."
        )


MODES_WITH_DATA.update(gptq=quantize_in_place, awq=quantize_in_place)


def _quantize(model: Any, config: Any) -> list[Any]:
    """Quantizes the layers of a model, all of them or none, and returns them."""
    selected = compat.layers_being_quantized()
    layers = [x for x in selected if isinstance(x, QuantizableMixin) and x.declared_weights]
    stock = [x.path for x in set(selected) - set(layers) if isinstance(x, _CALIBRATED)]
    problems = [f"{path}: stock layer; quantize jaxquant.keras.convert(model)" for path in stock]
    raise_problems(model, sorted(problems))
    for layer in layers:
        compat.check_quantize_arguments(layer, config.mode)
    scheme, method, batches = calibration_of(config, model)
    blocks = _layers_in_blocks(model, config)
    chosen = [
        (layer, [name for name, v in layer.float_weights.items() if v is not None])
        for layer in layers
        if blocks is None or id(layer) in blocks
    ]
    rules = QuantizationConfig(scheme)
    weights, unfit = weights_with_methods(model, chosen, rules, method)
    raise_problems(model, [str(x) for x in unfit])
    raise_problems(model, [] if weights else ["no layer multiplies activations"])
    found = list({id(x.layer): x.layer for x in weights}.values())
    for layer in found:
        layer.check_quantization(rules)
    made = quantize_by_methods(model, weights, batches, None)
    for layer in found:
        take_over(layer, rules, made[id(layer)])
    return found


# The layers that Keras calibrates.
_CALIBRATED = (keras.layers.Dense, keras.layers.EinsumDense)


def _layers_in_blocks(model: Any, config: Any) -> set[int] | None:
    """The layers, by id, in the sequential blocks of a model; None if neither it nor the config
    names them."""
    structure = config.quantization_layer_structure
    if structure is None:
        structure = model.get_quantization_layer_structure(config.mode)
    if structure is None:
        return None
    return {id(x) for block in structure["sequential_blocks"] for x in compat.sublayers(block)}
