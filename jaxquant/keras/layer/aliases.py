"""Attributes of a layer for a declared weight, besides the declared one.

Keras' own layers write `self._kernel = self.add_weight(name="kernel", ...)`. Once the weight is
quantized, reading such an attribute must not return the variable of its codes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras

from ...core import QTensor, scale_values
from .. import compat


def alias(layer: Any, variable: keras.Variable, name: str) -> None:
    """Makes each attribute that holds a variable an alias of the declared weight `name`."""
    for attribute, value in list(layer.__dict__.items()):
        if value is variable:
            del layer.__dict__[attribute]
            layer.weight_state.aliases[attribute] = name


def read_attribute(state: Any, name: str) -> Any:
    """The declared weight of which an attribute is an alias; its scale or zero point as Keras has
    it, by the names that Keras gives them; None for any other attribute.

    Scales of integer codes per channel are qmax / max|x|, in the shape that Keras gives them.
    Others are the step between codes, in the order of the weight's axes, like zero points.
    """
    layer = state.layer
    if name in state.aliases:
        return getattr(layer, state.aliases[name])
    weight, _, part = name.rpartition("_")
    if part not in _PARTS or weight not in state.stored_weights:
        return None
    return _PARTS[part](layer, weight, state.stored_weights[weight].tensor().reorder(None))


def _scale(layer: Any, weight: str, q: QTensor) -> jax.Array:
    step = scale_values(q.scale)
    shared = {a % q.ndim for a in layer.declared_weights[weight].axes(layer)}
    is_per_channel = all(step.shape[a] == 1 for a in shared) and q.zero_point is None
    if not is_per_channel or not q.format.rounds:
        return step
    if q.format.bits < 8:  # Keras packs matrices, of contracted axes and all others.
        return (1 / step).reshape(-1)
    return jnp.asarray(layer.scale_to_stock(weight, 1 / step, q))


# Parts of a quantized weight, by the ends of the names of their variables.
_PARTS = {"scale": _scale, "zero": lambda layer, weight, q: q.zero_point}


class AliasMixin(compat.KerasLayer):
    """Reads declared weights by other names, and the scales and zero points of quantized ones."""

    def __getattr__(self, name: str) -> Any:
        """Reads a declared weight by another name, or its scale or zero point."""
        state = self.__dict__.get("weight_state")
        found = None if state is None else read_attribute(state, name)
        if found is not None:
            return found
        # Raises the first error again, such as that of a property or a declaration.
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute, but not the scale or zero point of a quantized weight.

        Raises:
            AttributeError: it is one of these. A build hook may create its own variable for it.
        """
        weight, _, part = name.rpartition("_")
        is_own = part not in _PARTS or name in self.__dict__ or isinstance(value, keras.Variable)
        state = None if is_own else self.__dict__.get("weight_state")
        if state is not None and weight in state.stored_weights:
            raise AttributeError(
                f"{name} is a read-only view of the quantized weight of layer {self.name!r}; got a "
                f"{type(value).__name__} to set it to. Quantize a float layer to get other scales."
            )
        super().__setattr__(name, value)


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
