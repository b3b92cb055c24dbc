"""Layers made of layers: they quantize once their sublayers are ours."""

import inspect
from typing import Any, ClassVar

from .. import compat
from ..layer import PolicyMixin


class ComposedMixin(PolicyMixin):
    """A Keras layer whose stock sublayers become ours as it sets them, before they are built.

    So the stock layer builds, calls, saves and loads them, and nothing of its own is left.

    Attributes:
        ours: our class for each stock class of sublayers.
    """

    ours: ClassVar[dict[type, type]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; a sublayer of a stock class is made again as ours."""
        # By the class itself: a subclass may compute in another way.
        ours = self.ours.get(type(value))
        super().__setattr__(name, value if ours is None else _made_again(value, ours))

    def quantize(self, mode: str | None = None, config: Any = None, type_check: bool = True):
        """The layer has no weights of its own.

        Raises:
            NotImplementedError: always. It says what to quantize instead.
        """
        names = ", ".join(layer.name for layer in compat.children(self))
        raise NotImplementedError(
            f"{type(self).__name__} holds no weights but those of the layers in it; got "
            f"quantize({mode!r}, {config!r}) for {self.name!r}. Quantize the model that it is in, "
            f"by model.quantize or jaxquant.keras.quantize, or each of {names}."
        )

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass: it is the sublayers that are quantized, whatever the policy."""
        return self.call(*args, **kwargs)


def _made_again(layer, ours):
    """A layer of class `ours` from the arguments of a stock layer that is not built.

    The arguments are objects, not their configs: functions and classes that Keras does not
    know have none, and an initializer without a seed would draw another one.
    """
    names = [*inspect.signature(type(layer).__init__).parameters, *_IN_KWARGS]
    found = {name: _ATTRIBUTES.get(name, name) for name in names}
    arguments = {k: getattr(layer, name) for k, name in found.items() if hasattr(layer, name)}
    if not hasattr(layer, "seed_generator"):
        return ours(**arguments)
    # Without a seed one would be drawn, and layers made later would start from other values.
    made = ours(**{**arguments, "seed": 0})
    made.seed = layer.seed
    made.seed_generator.state.assign(layer.seed_generator.state)
    return made


_IN_KWARGS = ("name", "dtype", "trainable", "autocast", "activity_regularizer", "implementation")
# Arguments that are attributes under another name.
_ATTRIBUTES = {"output_shape": "partial_output_shape", "dtype": "dtype_policy"}
