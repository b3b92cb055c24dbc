"""Which variables of a model its products, convolutions and lookups use."""

from typing import Any

import jax
import keras

from ...lift import uses
from .. import compat
from ..layer import StoredWeight
from .functional import nested, pure_call


def multiplied(model: keras.Model) -> set[int] | None:
    """The ids of those variables; None for a model that cannot be traced without inputs."""
    given = _inputs(model)
    if given is None or not model.built:
        return None
    apply, places = pure_call(model)
    stored = {key: x.tensor() for key, x in places.items() if isinstance(x, StoredWeight)}
    plain: dict[str, Any] = {"/".join(k): (k, x) for k, x in places.items() if k not in stored}

    def run(params: dict[str, jax.Array], inputs: Any) -> Any:
        values = {plain[path][0]: x for path, x in params.items()}
        return apply(nested({**stored, **values}), inputs)

    params = {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, (_, v) in plain.items()}
    inputs = keras.tree.map_structure(_example, given)
    try:
        found = uses(run, params, inputs).contracted
    except (TypeError, ValueError):
        return None
    return {id(v) for path, (_, v) in plain.items() if path in found}


def _inputs(model: Any) -> Any:
    """The symbolic inputs of a functional or Sequential model, else None."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0] if model.built else None
    return model.input if compat.is_functional(model) else None


def _example(tensor: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a small input."""
    batch, *rest = tensor.shape
    shape = (batch or _BATCH, *(n or _LENGTH for n in rest))
    return jax.ShapeDtypeStruct(shape, tensor.dtype)


_BATCH, _LENGTH = 2, 8
