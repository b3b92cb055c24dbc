"""Loads the weights of a whole model, or none of them."""

import os
from typing import Any

import keras

from .. import compat
from .checks import check_is_layer


def load_weights(model: keras.Model, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Loads weights as `model.load_weights` does, and changes nothing if that raises an error.

    Keras loads layer by layer and goes on after an error, so `model.load_weights` of a damaged
    file leaves some layers with new weights. A layer of `jaxquant.keras` is never half loaded,
    but only this function restores the layers, stock ones included, that were loaded before or
    after the one that failed. Old weights stay in memory until it returns.

    Args:
        model: built, of any class.
        path: a `.weights.h5` or `.keras` file.
        kwargs: other arguments of `keras.Model.load_weights`.

    Raises:
        ValueError: the model is not one of Keras; or as `keras.Model.load_weights`: a layer cannot
            be loaded from the file. Other errors that it raises, such as OSError, restore the
            model as well.

    Example:
        >>> import tempfile
        >>> model = keras.Sequential([keras.Input((4,)), jk.layers.Dense(2)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_weights(f"{folder}/model.weights.h5")
        ...     jk.load_weights(model, f"{folder}/model.weights.h5")
    """
    check_is_layer(model)
    layers = compat.sublayers(model)
    states = [(x, _copies(x), compat.own_variables(x)) for x in layers]
    variables = [v for x in layers for v in (*compat.own_variables(x), *compat.seeds(x))]
    variables += model.metrics_variables
    variables += getattr(getattr(model, "optimizer", None), "variables", [])
    values = [(v, v.value) for v in variables]
    try:
        model.load_weights(path, **kwargs)
    except BaseException:
        for layer, copies, tracked in states:
            for attributes, values_before in copies:
                attributes.clear()
                attributes.update(values_before)
            compat.track_only(layer, tracked)
        for variable, value in values:
            variable.assign(value)
        raise


def _copies(layer: keras.layers.Layer) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The attributes of a layer and of the state of its weights, each with a copy of them."""
    holders = [layer, *filter(None, [vars(layer).get("weight_state")])]
    return [(vars(x), {k: _copied(v) for k, v in vars(x).items()}) for x in holders]


def _copied(value: Any) -> Any:
    return dict(value) if type(value) is dict else value
