"""Checks of the arguments that the functions of models have in common."""

from collections.abc import Iterable
from typing import Any

import keras

from .. import compat

Keep = Iterable[str | type]


def raise_problems(model: keras.Model, problems: list[str]) -> None:
    """Raises one ValueError for all of them, if there are any."""
    if problems:
        lines = "\n  ".join(problems)
        count = f"these {len(problems)} problems" if len(problems) > 1 else "this problem"
        raise ValueError(f"Model {model.name!r} was not changed; fix {count}:\n  {lines}")


def as_keep(keep: Keep) -> tuple[str | type, ...]:
    """The names and classes of layers to keep.

    Raises:
        ValueError: it is one name or class instead of several, or holds something else.
    """
    is_one = isinstance(keep, str | type) or not isinstance(keep, Iterable)
    entries: tuple[Any, ...] = (None,) if is_one else tuple(keep)
    if all(isinstance(x, str | type) for x in entries):
        return entries
    raise ValueError(
        "keep must be a list of names and classes of layers, such as ['head', keras.layers.LSTM]; "
        f"got {keep!r}."
    )


def check_has_weights(model: Any, count: int) -> None:
    """Checks that a model is built and has weights.

    Raises:
        ValueError: it is not, or has none.
    """
    if not model.built:
        raise ValueError(
            f"Model {model.name!r} must be built; got built=False and {count} weights. Call it on "
            "data, or give it an Input."
        )
    if not count:
        names = ", ".join(dict.fromkeys(type(x).__name__ for x in compat.sublayers(model)[1:]))
        raise ValueError(
            f"Model {model.name!r} must have weights; got none, of the layers "
            f"{names or 'that it does not have'}. Add layers such as Dense, or call the model on "
            "data if its layers create weights then."
        )


def check_is_layer(model: Any) -> None:
    """Checks that a model is one of Keras, or a layer.

    Raises:
        ValueError: it is something else, such as a function.
    """
    if not isinstance(model, keras.layers.Layer):
        raise ValueError(
            f"model must be a Keras model or layer; got a {type(model).__name__}. To quantize "
            "the parameters of a function, call jaxquant.tree.quantize."
        )
