"""Attributes under which a layer keeps a declared weight, besides the declared one.

Keras' own layers write `self._kernel = self.add_weight(name="kernel", ...)`. Once the weight is
quantized, reading such an attribute must not return the variable of its codes.
"""

from collections.abc import Mapping
from typing import Any

import keras

from .. import compat


def alias(layer: Any, variable: keras.Variable, name: str) -> None:
    """Makes each attribute that holds a variable an alias of the declared weight `name`."""
    for attribute, value in list(layer.__dict__.items()):
        if value is variable:
            del layer.__dict__[attribute]
            layer.weight_state.aliases[attribute] = name


def check_reachable(layer: Any, name: str, variable: keras.Variable) -> None:
    """Checks that the layer keeps a declared weight only in its own attributes.

    Raises:
        ValueError: it is in a container or in a sublayer, where its codes would be read as
            weights.
    """
    kept = [
        attribute
        for attribute, value in compat.attributes(layer).items()
        if value is not variable and _holds(value, variable)
    ]
    for child in compat.sublayers(layer)[1:]:
        values = compat.attributes(child).items()
        kept += [f"{child.name}.{attribute}" for attribute, v in values if _holds(v, variable)]
    if kept:
        raise ValueError(
            f"{type(layer).__name__} declares {name!r} as a QuantizedWeight, so it must keep the "
            f"variable as an attribute of the layer; got it in {' and '.join(kept)}. Write "
            f"self.{name} = self.add_weight(name={name!r}, ...), and read self.{name}."
        )


def _holds(value, variable):
    """Whether a value is the variable, or a container with it."""
    if isinstance(value, Mapping):
        return any(_holds(v, variable) for v in value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds(v, variable) for v in value)
    return value is variable
