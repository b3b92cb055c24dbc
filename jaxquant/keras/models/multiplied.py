"""How the products, convolutions and lookups of a model or layer use its variables."""

from typing import Any

import jax
import keras

from ...lift import Use, uses
from .. import compat
from ..layer import StoredWeight
from .functional import nested, pure_call
from .lifted import LiftedUse

# The arguments of a call, with shapes and dtypes in place of arrays.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def multiplied(layer: Any) -> dict[int, LiftedUse | None]:
    """How the variables are used, by id: None if not in products; without those of calls that
    cannot be traced.

    A functional or Sequential model has symbolic inputs, and so have its layers, which are traced
    one by one if the model cannot be. Another model, or a layer, is called on one input of the
    shape that it was built for. Axes without a size get one that the call accepts.
    """
    return _of_calls(layer, _own_calls(layer))


def _of_calls(layer: Any, calls: list[Call]) -> dict[int, LiftedUse | None]:
    if not (layer.built and layer.variables):
        return {}
    for length in _lengths(calls):
        found = _traced(layer, calls, length)
        if found is not None:
            return found
    layers = layer.layers if _has_graph(layer) else []
    parts = [_of_calls(inner, compat.symbolic_calls(inner)) for inner in layers]
    return {key: use for part in parts for key, use in part.items()}


def _traced(layer: Any, calls: list[Call], length: int) -> dict[int, LiftedUse | None] | None:
    """How the variables are used in some calls of a layer; None if one cannot be traced."""
    apply, places = pure_call(layer, "__call__")
    stored = {key: x.tensor() for key, x in places.items() if isinstance(x, StoredWeight)}
    plain: dict[str, Any] = {"/".join(k): (k, x) for k, x in places.items() if k not in stored}
    leaves, structure = jax.tree.flatten(calls, is_leaf=_is_symbolic)
    inputs_at = [i for i, x in enumerate(leaves) if _is_symbolic(x)]

    def run(params: dict[str, jax.Array], inputs: list[jax.Array]) -> Any:
        values = nested({**stored, **{plain[path][0]: x for path, x in params.items()}})
        given = dict(zip(inputs_at, inputs, strict=True))
        filled = jax.tree.unflatten(structure, [given.get(i, x) for i, x in enumerate(leaves)])
        return [apply(values, *args, **kwargs) for args, kwargs in filled]

    params = {path: jax.ShapeDtypeStruct(v.shape, v.dtype) for path, (_, v) in plain.items()}
    try:
        found = uses(run, params, [_example(leaves[i], length) for i in inputs_at])
    except Exception:  # The call is the user's, and may not take such an input.
        return None
    axes = found.contracted
    return {
        id(v): _lifted_use(v, axes[path], found.by_path[path]) if path in axes else None
        for path, (_, v) in plain.items()
    }


def _lifted_use(variable: Any, axes: tuple[int, ...], uses: tuple[Use, ...]) -> LiftedUse:
    return LiftedUse(
        variable.name,
        axes,
        inputs=any(use.activations is not None for use in uses),
        has_windows=any(variable.shape[a] > 1 for use in uses for a in use.window),
        in_groups=any(use.groups > 1 for use in uses),
    )


def _own_calls(layer: Any) -> list[Call]:
    """One call of a model or layer on its own."""
    if isinstance(layer, keras.Sequential):
        return [((layer.inputs[0],), {"training": False})]
    if compat.is_functional(layer):
        return [((layer.input,), {"training": False})]
    shape = (layer.get_build_config() or {}).get("input_shape")
    is_one = isinstance(shape, list | tuple) and all(isinstance(n, int | None) for n in shape)
    if not (is_one and shape):
        return []
    return [((keras.KerasTensor(tuple(shape), layer.compute_dtype),), {})]


def _has_graph(layer: Any) -> bool:
    return isinstance(layer, keras.Sequential) or compat.is_functional(layer)


def _is_symbolic(x: Any) -> bool:
    return isinstance(x, keras.KerasTensor)


def _lengths(calls: list[Call]) -> tuple[int, ...]:
    """Sizes to try for axes that have none. Without a call there are no axes."""
    tensors = [x for x in jax.tree.leaves(calls, is_leaf=_is_symbolic) if _is_symbolic(x)]
    is_open = any(None in x.shape[1:] for x in tensors)
    return (_LENGTHS if is_open else _LENGTHS[:1]) if calls else ()


def _example(tensor: Any, length: int) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a small input."""
    batch, *rest = tensor.shape
    shape = (batch or _BATCH, *(n or length for n in rest))
    return jax.ShapeDtypeStruct(shape, tensor.dtype)


_BATCH = 2
# Tables of positions bound sizes, or broadcast along 1 only; convolutions bound them from below,
# and patches of images must divide them. Keras warns of attention to one position.
_LENGTHS = (8, 2, 32, 64, 224, 256, 1)
