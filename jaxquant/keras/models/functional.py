"""Turns a Keras model into a pure function of its weights."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from ...core import QTensor
from .. import compat
from ..layer import StoredWeight, replaced
from .checks import check_has_weights, check_is_layer

Params = dict[str, Any]
# Stored weights and the other variables, by the parts of their paths.
Places = dict[tuple[str, ...], StoredWeight | keras.Variable]


def functional(model: keras.Model, method: str | None = None) -> tuple[Callable[..., Any], Params]:
    """Splits a model into a pure function and its weights.

        apply, params = functional(model)
        outputs = jax.jit(apply)(params, inputs)

    A stock model needs no conversion: `jaxquant.lift(apply)` computes with quantized params.

        rules = jaxquant.uses(apply, params, inputs).rules(jaxquant.W8A8)
        quantized = jaxquant.tree.quantize(params, rules)
        outputs = jax.jit(jaxquant.lift(apply))(quantized, inputs)

    Args:
        model: built, of any class: functional, subclassed, or of a library such as KerasHub. Its
            layers may be stock or quantizable, in float or quantized. Do not quantize it or
            change its layers afterwards.
        method: name of a method to call in place of the model, such as "call_with_cache". It must
            return what it computes, not keep it in the model.

    Returns:
        apply: (params, *inputs) -> the outputs of `model(inputs)` in inference. It reads all
            weights from params, under jit, grad and vmap and in any thread, and does not change
            the model: seeds and moving statistics stay the same. Pass several inputs one by one,
            or in the structure that the model expects. With a method, (params, *args, **kwargs)
            -> `model.method(*args, **kwargs)`.
        params: nested dicts by the parts of a weight's path, such as ["encoder"]["dense"]
            ["kernel"]: a QTensor for each quantized weight, in the dtype of its format and in
            the order of axes that is fast on this machine, and an array for everything else.
            They are copies: `apply` refers to the model, but not to its values.

    Raises:
        ValueError: the model is not one of Keras, is not built, or has no such method. `apply`
            raises it for params of another structure, and if the model was quantized, or gained or
            lost weights, in the meantime.

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), jk.layers.Dense(2)])
        >>> apply, params = jk.functional(model)
        >>> jax.jit(apply)(params, jnp.ones((3, 4))).shape
        (3, 2)
    """
    apply, places = pure_call(model, method)
    # Copies: Keras donates the model's arrays, in `predict` too.
    return apply, nested({k: jax.tree.map(jnp.copy, _value(x)) for k, x in places.items()})


def pure_call(model: keras.Model, method: str | None = None) -> tuple[Callable[..., Any], Places]:
    """The function of `functional`, and where the weights of its params are kept."""
    check_is_layer(model)
    places = _places(model)
    check_has_weights(model, len(places))
    known, call = _identity(model), _call_of(model, method)

    def apply(params: Params, *args: Any, **kwargs: Any) -> Any:
        if _identity(model) != known:
            raise ValueError(
                f"The variables of model {model.name!r} are not those it had when `functional` "
                f"was called; got {len(_identity(model))} for {len(known)}. Call it again."
            )
        values = _checked(params, places)
        stored = [(x, values[k]) for k, x in places.items() if isinstance(x, StoredWeight)]
        plain = [(x, values[k]) for k, x in places.items() if not isinstance(x, StoredWeight)]
        with replaced(stored), keras.StatelessScope(state_mapping=plain):
            return call(*args, **kwargs)

    return apply, places


def nested(values: Mapping[tuple[str, ...], Any]) -> Params:
    """Nested dicts of values by the parts of their paths."""
    params: Params = {}
    for (*folders, name), value in values.items():
        inner = params
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return params


def _value(place: StoredWeight | keras.Variable) -> Any:
    return place.tensor() if isinstance(place, StoredWeight) else place.value


def _call_of(model: keras.Model, method: str | None) -> Callable[..., Any]:
    """What `apply` calls: a method, or the model with one argument, a structure."""
    if method is None:
        return lambda *xs: model(xs[0] if len(xs) == 1 else list(xs), training=False)
    call = getattr(model, method, None) if isinstance(method, str) else None
    if not callable(call):
        raise ValueError(
            f"method must be the name of a method of {type(model).__name__}, such as 'call'; got "
            f"{method!r}."
        )
    return call


def _places(model: keras.Model) -> Places:
    places: Places = {}
    taken = set()
    for layer in compat.sublayers(model):
        stored = list(getattr(layer, "stored_weights", {}).values())
        held = {id(v) for weight in stored for v in weight.variables}
        found = [(x.codes.path, x) for x in stored]
        found += [(v.path, v) for v in compat.own_variables(layer) if id(v) not in held]
        # Keras numbers seeds in their paths, so that these differ between processes.
        found += [(f"{layer.path or layer.name}/{v.name}", v) for v in compat.seeds(layer)]
        for path, place in found:
            key = _free(tuple(path.split("/")), taken)
            taken |= {key[:n] for n in range(1, len(key) + 1)}
            places[key] = place
    return places


def _free(key: tuple[str, ...], taken: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The key, numbered if it is taken: layers of nested models may have the same path."""
    number, free = 0, key
    while free in taken:
        number += 1
        free = (*key[:-1], f"{key[-1]}_{number}")
    return free


def _identity(model: keras.Model) -> list[int]:
    return [id(v) for layer in compat.sublayers(model) for v in compat.own_variables(layer)]


def _checked(params: Params, places: Places) -> dict[tuple[str, ...], Any]:
    """The leaves of params by path, once their kinds and shapes are checked."""
    found = dict(_leaves(params))
    odd = ["/".join(key) for key in found.keys() ^ places.keys()]
    if odd:
        raise ValueError(
            f"params must have the structure that `functional` gave; got {len(found)} leaves for "
            f"{len(places)}, which differ at {', '.join(sorted(odd)[:5])}."
        )
    for key, place in places.items():
        leaf, is_stored = found[key], isinstance(place, StoredWeight)
        shape = place.like.shape if is_stored else tuple(place.shape)
        if isinstance(leaf, QTensor) != is_stored or np.shape(leaf) != shape:
            wanted = f"a QTensor like {place.like!r}" if is_stored else f"an array of shape {shape}"
            raise ValueError(f"params at {'/'.join(key)} must be {wanted}; got {_described(leaf)}.")
    return found


def _described(leaf: Any) -> str:
    """A leaf in an error: elements of arrays would hide the text."""
    if isinstance(leaf, QTensor):
        return f"{leaf!r}. Call jaxquant.lift(apply) with it"
    return f"a {type(leaf).__name__} of shape {np.shape(leaf)}"


def _leaves(params: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(params, Mapping):
        return [(path, params)]
    return [leaf for key, inner in params.items() for leaf in _leaves(inner, (*path, key))]
