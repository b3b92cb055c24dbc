"""Layers made of other layers, which are quantized through their quantizable sublayers."""

import inspect
from typing import Any, ClassVar

from .. import compat
from ..layer import PolicyMixin


class ComposedMixin(PolicyMixin):
    """A Keras layer whose stock sublayers are replaced by quantizable ones when it sets them.

    The stock layer then builds, calls, saves and loads the quantizable ones.

    Attributes:
        ours: the quantizable class for each stock class of sublayers.
    """

    ours: ClassVar[dict[type, type]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; a sublayer of a stock class is replaced by a quantizable one."""
        # Subclasses are not replaced, because they may compute something else.
        ours = self.ours.get(type(value))
        super().__setattr__(name, value if ours is None else _made_again(value, ours))

    def quantize(
        self, mode: str | None = None, config: Any = None, type_check: bool = True
    ) -> None:
        """Raises an error, because the layer itself does not have weights.

        Raises:
            NotImplementedError: always, before anything changes. It says what to quantize.
        """
        names = ", ".join(layer.name for layer in compat.children(self))
        raise NotImplementedError(
            f"{type(self).__name__} has no weights except those of its sublayers; got "
            f"quantize({mode!r}, {config!r}) for {self.name!r}. Quantize the model that it is in, "
            f"by model.quantize or jaxquant.keras.quantize, or each of {names}."
        )

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """The same forward pass under every policy, because only the sublayers are quantized."""
        return self.call(*args, **kwargs)


def _made_again(layer, ours):
    """A layer of class `ours` with the arguments of a stock layer that is not built.

    The arguments are passed as objects, not as configs: unregistered functions and classes do not
    have configs, and an initializer without a seed would draw a new one.
    """
    names = [*inspect.signature(type(layer).__init__).parameters, *_IN_KWARGS]
    found = {name: _ATTRIBUTES.get(name, name) for name in names}
    arguments = {k: getattr(layer, name) for k, name in found.items() if hasattr(layer, name)}
    if not hasattr(layer, "seed_generator"):
        return ours(**arguments)
    # Drawing a seed would change the initial values of layers that are made later.
    made = ours(**{**arguments, "seed": 0})
    made.seed = layer.seed
    made.seed_generator.state.assign(layer.seed_generator.state)
    return made


_IN_KWARGS = ("name", "dtype", "trainable", "autocast", "activity_regularizer", "implementation")
# Attributes that have another name than the argument.
_ATTRIBUTES = {"output_shape": "partial_output_shape", "dtype": "dtype_policy"}
