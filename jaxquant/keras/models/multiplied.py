"""How the products, convolutions and lookups of a model or layer use its variables."""

import functools
from typing import Any

import jax
import keras

from ...lift import Use, uses
from .. import compat
from ..layer import StoredWeight
from .functional import nested, pure_call
from .lifted import LiftedUse


def multiplied(layer: Any) -> dict[int, LiftedUse] | None:
    """How the variables are used, by id; None if the call cannot be traced.

    A functional or Sequential model has symbolic inputs. Another model, or a layer, is called on
    one input of the shape that it was built for. Axes without a size get one that the call accepts.
    """
    if not layer.built:
        return None
    return next((x for i in _inputs(layer) if (x := _multiplied(layer, i)) is not None), None)


def _multiplied(layer: Any, inputs: Any) -> dict[int, LiftedUse] | None:
    apply, places = pure_call(layer)
    stored = {key: x.tensor() for key, x in places.items() if isinstance(x, StoredWeight)}
    plain: dict[str, Any] = {"/".join(k): (k, x) for k, x in places.items() if k not in stored}

    def run(params: dict[str, jax.Array], inputs: Any) -> Any:
        values = {plain[path][0]: x for path, x in params.items()}
        return apply(nested({**stored, **values}), inputs)

    params = {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, (_, v) in plain.items()}
    try:
        found = uses(run, params, inputs)
    except Exception:  # The call is the user's, and may not take such an input.
        return None
    axes = found.contracted
    return {
        id(v): _lifted_use(v, axes[path], found.by_path[path])
        for path, (_, v) in plain.items()
        if path in axes
    }


def _lifted_use(variable: Any, axes: tuple[int, ...], uses: tuple[Use, ...]) -> LiftedUse:
    return LiftedUse(
        variable.name,
        axes,
        inputs=any(use.activations is not None for use in uses),
        has_windows=any(variable.shape[a] > 1 for use in uses for a in use.window),
        in_groups=any(use.groups > 1 for use in uses),
    )


def _inputs(layer: Any) -> list[Any]:
    """Inputs to try, as shapes and dtypes."""
    given = _symbolic(layer)
    if given is None:
        return []
    is_open = any(None in x.shape[1:] for x in keras.tree.flatten(given))
    examples = [functools.partial(_example, length=n) for n in (_LENGTHS if is_open else (1,))]
    return [keras.tree.map_structure(example, given) for example in examples]


def _symbolic(layer: Any) -> Any:
    """Symbolic inputs of a model, or one of the shape that a layer was built for, if it has one."""
    if isinstance(layer, keras.Sequential):
        return layer.inputs[0]
    if compat.is_functional(layer):
        return layer.input
    shape = (layer.get_build_config() or {}).get("input_shape")
    is_one = isinstance(shape, list | tuple) and all(isinstance(n, int | None) for n in shape)
    return keras.KerasTensor(tuple(shape), layer.compute_dtype) if is_one and shape else None


def _example(tensor: Any, length: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a small input."""
    batch, *rest = tensor.shape
    shape = (batch or _BATCH, *(n or length for n in rest))
    return jax.ShapeDtypeStruct(shape, tensor.dtype)


_BATCH = 2
# Sizes to try for axes without one. Tables of positions bound it, or broadcast along 1 only;
# convolutions bound it from below, and patches of images must divide it.
_LENGTHS = (8, 1, 64, 224)
