"""Copies the state of layers: variables, and values that Keras keeps outside of them."""

import tempfile
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import keras

from .. import compat
from ..layer import QuantizableMixin


def matched(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Pairs variables, or layers, in a layer with those in its copy.

    By name if the first have all names of the second, else in their order: Keras counts what has
    no name, also across models, so that a few equal names may be those of others.
    """
    places, names = {x.name: x for x in old}, {x.name for x in new}
    if names <= places.keys() and len(names) == len(new):
        return [(places[x.name], x) for x in new]
    return list(zip(old, new, strict=False))


def matched_layers(old: Any, new: Any) -> list[tuple[Any, Any]]:
    """Pairs a layer and all layers in it with those of a copy, outer ones first."""
    pairs: dict[int, tuple[Any, Any]] = {}
    _match_inside(old, new, pairs)
    return list(pairs.values())


def _match_inside(old: Any, new: Any, pairs: dict[int, tuple[Any, Any]]) -> None:
    if id(old) not in pairs:
        pairs[id(old)] = (old, new)
        for inner, copy in matched(compat.children(old), compat.children(new)):
            _match_inside(inner, copy, pairs)


def copy_variables(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Copies a layer's own variables.

    The copies are new arrays: training donates those of one model, which would invalidate the
    other's.
    """
    share_variables(old, new)
    for variable in [*compat.own_variables(new), *compat.seeds(new)]:
        variable.assign(jnp.copy(variable.value))


def share_variables(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """As `copy_variables`, but both layers then hold the same arrays."""
    sources, targets = compat.own_variables(old), compat.own_variables(new)
    pairs = matched(sources, targets)
    if len(sources) != len(targets) or any(x.shape != y.shape for x, y in pairs):
        made, wanted = ([tuple(v.shape) for v in found] for found in (targets, sources))
        raise ValueError(
            f"{old.path or old.name} makes weights of shapes {made} from its config; got one with "
            f"{wanted}. Write the get_config of the class that creates it."
        )
    # The paths of seeds contain a number that Keras counts up.
    pairs += zip(compat.seeds(old), compat.seeds(new), strict=True)
    for source, target in pairs:
        target.assign(source.value)
        if target.trainable != source.trainable:
            target.trainable = source.trainable


def quantize_like(old: QuantizableMixin, new: QuantizableMixin) -> None:
    """Gives a float layer the quantized weights, or the training in float8, of its original."""
    config = old.quantization_config
    if old.stored_weights and not new.stored_weights:
        tensors = {name: old.quantized_weight(name) for name in old.stored_weights}
        new.take_over(config, tensors)
    elif old.trains_in_float8 and not new.trains_in_float8:
        new.start_training(config)


def copy_other_state(old: keras.layers.Layer, new: keras.layers.Layer) -> None:
    """Copies the state of a stock layer that is not in its variables.

    Examples are the vocabulary of a lookup layer and the constants that `Normalization` computes
    from its variables. Keras restores them in the hooks that load a file. The states of a
    stateful RNN are variables that Keras neither tracks nor saves.
    """
    if type(old) is type(new) and not isinstance(old, QuantizableMixin):
        _copy_by_saving(old, new)
    for source, target in zip(_rnn_states(old), _rnn_states(new), strict=True):
        target.assign(jnp.copy(source.value))


def _copy_by_saving(old: Any, new: Any) -> None:
    if type(new).load_own_variables is not keras.layers.Layer.load_own_variables:
        store: dict[str, Any] = {}
        old.save_own_variables(store)
        # Copies, as if read from a file.
        new.load_own_variables({k: keras.ops.convert_to_numpy(x) for k, x in store.items()})
    if hasattr(old, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)


def _rnn_states(layer: keras.layers.Layer) -> list[Any]:
    return keras.tree.flatten(getattr(layer, "states", None) or ())
