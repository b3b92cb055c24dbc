"""Every private Keras name that the package uses, and nothing else.

Keras has no public way to do these. Each is tested on the oldest and the newest Keras that
the package supports.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import keras
from keras.src.backend.common.variables import get_autocast_scope


def has_quantized_variables(layer: keras.layers.Layer) -> bool:
    """Whether Keras takes the layer's variables for those of its quantization mode."""
    return getattr(layer, "_is_quantized", False)


def mark_quantized(layer: keras.layers.Layer) -> None:
    """Tells Keras that the variables fit the mode: else the policy's setter quantizes again."""
    layer._is_quantized = True


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Lets a built layer gain and lose variables."""
    was_locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if was_locked:
            layer._tracker.lock()


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The layer's variables without those of its sublayers: trainable ones first."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def drop_variable(layer: keras.layers.Layer, variable: keras.Variable) -> None:
    """Forgets a variable. `del layer.name` would collect garbage too, 0.1 s for each."""
    layer._untrack_variable(variable)


def replace_sublayer(layer: keras.layers.Layer, name: str, sublayer: keras.layers.Layer) -> None:
    """Puts another layer in the place of a sublayer, which assignment alone would keep."""
    old = getattr(layer, name)
    with unlocked(layer):
        place = next(i for i, x in enumerate(layer._layers) if x is old)
        del layer._layers[place]
        setattr(layer, name, sublayer)


def autocast(x: jax.Array) -> jax.Array:
    """The array as a Keras variable would be read here: in the dtype of the running layer."""
    scope = get_autocast_scope()
    return x if scope is None else scope.maybe_cast(x)


def with_default_mark(function: Callable[..., Any], inherited: Any) -> Callable[..., Any]:
    """A copy of `get_config` that Keras takes for its default one where it replaces that.

    Keras makes up the config of layers that define none, and tells so by the mark.
    """

    @functools.wraps(function)
    def marked(self):
        return function(self)

    vars(marked)["_is_default"] = getattr(inherited, "_is_default", False)
    return marked
