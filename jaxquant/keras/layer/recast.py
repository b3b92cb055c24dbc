"""Makes layers that another layer has created quantizable, in their place."""

from typing import Any

from .. import compat
from .weight_state import LayerState
from .wrappers import quantize_with_config


def recast(layer: Any, cls: type) -> None:
    """Makes a built stock layer an instance of a quantizable subclass, with the same variables.

    Whatever refers to the layer, such as an attribute, a list or a graph, then has a quantizable
    one. `build` has run, so that only `quantize` is wrapped as for other quantizable layers.

    Args:
        layer: built, of a class that `cls` inherits from.
        cls: a quantizable class without a constructor of its own.
    """
    assert layer.built, "recast before it was built"
    layer.__class__ = cls
    attributes = vars(layer)
    attributes["weight_state"] = state = LayerState(layer)
    for variable in compat.own_variables(layer):
        if variable.name in layer.declared_weights:
            state.float_weights[variable.name] = variable
            # The declaration reads it from the state.
            attributes.pop(variable.name, None)
    attributes["quantize"] = quantize_with_config(layer)
