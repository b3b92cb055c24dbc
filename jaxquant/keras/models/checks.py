"""Checks of the arguments that the functions of models have in common."""

from collections.abc import Iterable
from typing import Any

import keras

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
    entries: tuple[Any, ...] = (None,) if isinstance(keep, str | type) else tuple(keep)
    if all(isinstance(x, str | type) for x in entries):
        return entries
    raise ValueError(
        "keep must be a list of names and classes of layers, such as ['head', keras.layers.LSTM]; "
        f"got {keep!r}."
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
