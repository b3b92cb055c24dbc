"""Writes the variables of a quantized layer to a Keras file, and reads them.

Entries are numbered: codes of the declared weights, the layer's other variables, then scales and
zero points of each declared weight. Axes are in logical order, so that files load on every
platform. The entry `MARK` holds the quantization config, and those of `ADAPTER` hold LoRA. Layers
with the default int8 config are written in the format of stock Keras, which does not have these
entries and stores 127/max|x| without the axes that share a scale. (It is stored in float64, so that
the step is restored exactly.)
"""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from .. import compat
from ..configs import Int8QuantizationConfig, SchemeConfig
from . import stock_entries
from .storage_arrays import from_storage_arrays, in_logical_order, storage_types, to_storage_arrays

MARK = "quantization"
# The adapter of a quantized layer with LoRA, beside its codes.
ADAPTER = ("lora_a", "lora_b", "lora_alpha")


def is_quantized(store: Any) -> bool:
    """Whether a store holds codes, by its entry `MARK` or, from stock Keras, by the dtype."""
    keys = set(store.keys())
    return MARK in keys or ("0" in keys and np.asarray(store["0"]).dtype == np.int8)


def save(layer: Any, store: Any) -> None:
    """Writes the variables of a quantized layer."""
    is_plain = _is_plain(layer.quantization_config)
    parts = []
    for name in layer.stored_weights:
        q = layer.stored_weights[name].on_host()
        codes, *rest = to_storage_arrays(jax.tree.map(np.asarray, q).reorder(None))
        if is_plain:
            step = np.asarray(rest[0], np.float64)
            rest = [layer.scale_to_stock(name, 1 / step, in_logical_order(q))]
        parts += [(codes, rest)]
    entries = [codes for codes, _ in parts]
    entries += other_variables(layer, layer.stored_weights)
    entries += [value for _, rest in parts for value in rest]
    for i, value in enumerate(entries):
        store[str(i)] = keras.ops.convert_to_numpy(value)
    if not is_plain:
        store[MARK] = np.frombuffer(_as_text(layer.quantization_config).encode(), np.uint8)


def load(layer: Any, store: Any) -> None:
    """Reads the variables of a quantized layer. A float layer becomes quantized.

    Raises:
        ValueError: the entries do not fit this layer. The layer is unchanged.
    """
    entries = _numbered(layer, store)
    config = _config_in(layer, store)
    if config is not None and config.is_training:
        return _load_training(layer, entries, config)
    is_scaled = compat.has_quantized_variables(layer) and not layer.stored_weights
    if is_scaled and (config is not None or entries[0].dtype == np.int8):
        raise ValueError(
            f"The file holds codes for layer {layer.name!r}, which trains in float8; got "
            f"{config or 'int8'}. Load it into a float layer."
        )
    if is_scaled:
        return _load_training(layer, entries, layer.quantization_config)
    if config is None and _holds_int4(layer, entries):
        return _load_stock_int4(layer, entries)
    _load_codes(layer, entries, config or Int8QuantizationConfig(), config is None)


def _load_codes(
    layer: Any, entries: list[np.ndarray], config: SchemeConfig, is_plain: bool
) -> None:
    likes = layer.likes(config)
    others = other_variables(layer, likes)
    parts = {name: _part_shapes(layer, name, like, is_plain) for name, like in likes.items()}
    wanted = [shapes[0] for shapes in parts.values()]
    wanted += [tuple(v.shape) for v in others]
    wanted += [shape for shapes in parts.values() for shape in shapes[1:]]
    _check_shapes(layer, entries, wanted)
    codes, rest = entries[: len(likes)], entries[len(likes) + len(others) :]
    values = _values_of(layer, others, entries[len(likes) :])
    tensors = {}
    for name, first in zip(likes, codes, strict=True):
        count = len(parts[name]) - 1
        tensors[name] = _tensor(layer, name, likes[name], (first, *rest[:count]), is_plain)
        rest = rest[count:]
    layer.take_over(config, tensors)
    _assign(others, values)


def _load_training(layer: Any, entries: list[np.ndarray], config: Any) -> None:
    """Reads float weights, then the scales of float8 training."""
    if layer.stored_weights:
        raise ValueError(
            f"The file holds float weights and float8 scales of layer {layer.name!r} in training; "
            f"got a layer quantized by {layer.quantization_config}. Load it into a float layer."
        )
    is_new = not compat.has_quantized_variables(layer)
    wanted = [tuple(v.shape) for v in other_variables(layer, ())]
    wanted += layer.training_shapes() if is_new else []
    _check_shapes(layer, entries, wanted)
    others = other_variables(layer, ())
    floats = _values_of(layer, others, entries)
    scales = [np.asarray(x, np.float32) for x in entries[len(others) :]]
    if is_new:
        layer.start_training(config)
    _assign(other_variables(layer, ()), [*floats, *scales])


def _load_stock_int4(layer: Any, entries: list[np.ndarray]) -> None:
    ((name, shape),) = layer.declared_shapes.items()
    where = f"The stock file for {layer.name!r}"
    others = other_variables(layer, (name,))
    _check_shapes(layer, entries[1 : len(others) + 1], [tuple(v.shape) for v in others])
    rest = entries[len(others) + 1 :]
    held = stock_entries.read_int4(where, entries[0], rest, layer.stock_matrix(name, shape))
    values = _values_of(layer, others, entries[1:])
    like = layer.likes(held.config)[name]
    q = stock_entries.as_tensor(where, held, shape, in_logical_order(like))
    layer.take_over(held.config, {name: _checked(layer, *_ordered(q, like.order))})
    _assign(others, values)


def _values_of(layer, variables, entries):
    """The first entries, cast to the dtypes of the variables."""
    pairs = list(zip(variables, entries, strict=False))
    odd = [v.name for v, x in pairs if x.dtype.kind not in "biuf" and x.dtype != jnp.bfloat16]
    if odd:
        raise ValueError(
            f"The file must hold numbers for {odd} of layer {layer.name!r}; got dtypes "
            f"{[x.dtype for _, x in pairs]}. It is damaged."
        )
    return [keras.ops.convert_to_tensor(x, v.dtype) for v, x in pairs]


def _assign(variables, values):
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _holds_int4(layer: Any, entries: list[np.ndarray]) -> bool:
    """Whether the entries are those of int4 in stock Keras.

    Raises:
        ValueError: they are those of int4 in Keras before 3.14.
    """
    if len(layer.declared_shapes) != 1:
        return False
    ((name, shape),) = layer.declared_shapes.items()
    matrix, codes = layer.stock_matrix(name, shape), entries[0]
    if stock_entries.is_int4(codes, shape, matrix):
        return True
    if codes.shape != shape or (matrix.shape[0] == 1 and stock_entries.has_low_bits_only(codes)):
        raise ValueError(
            f"The file's codes for layer {layer.name!r} must have shape {shape} as int8, or "
            f"{matrix.packed} as the int4 of Keras 3.14 and later; got {codes.shape}. The int4 of "
            "Keras before 3.14 is packed along the other axis: save the model there in float."
        )
    return False


def _part_shapes(layer, name, like, is_plain):
    """Shapes of the entries of one weight."""
    shapes = [x.shape for x in storage_types(in_logical_order(like))]
    return (
        [shapes[0], layer.stock_scale_shape(name, in_logical_order(like))] if is_plain else shapes
    )


def _numbered(layer: Any, store: Any) -> list[np.ndarray]:
    """The numbered entries: at least one, without gaps."""
    keys = set(store.keys()) - {MARK, *ADAPTER}
    names = [str(i) for i in range(len(keys))]
    if not keys or set(names) != keys:
        raise ValueError(
            f"A file of layer {layer.name!r} must have entries numbered from 0; got "
            f"{sorted(keys)}. It is damaged, or from another layer."
        )
    return [np.asarray(store[name]) for name in names]


def _check_shapes(layer, entries, wanted):
    shapes = [x.shape for x in entries]
    if shapes != wanted:
        raise ValueError(
            f"The file holds other variables than layer {layer.name!r}; wanted shapes {wanted}, "
            f"got {shapes}. Load it into the layer that it was saved from."
        )


def _tensor(layer, name, like, entries, is_plain):
    """A QTensor like `like` from the entries of one weight, which are in logical order."""
    if is_plain:
        with np.errstate(divide="ignore"):
            step = layer.scale_from_stock(
                name, 1 / entries[1].astype(np.float64), in_logical_order(like)
            )
        entries = entries[0], step.astype(np.float32)
    wanted, found = [x.dtype for x in storage_types(like)], [x.dtype for x in entries]
    if found != wanted:
        raise ValueError(
            f"The file must hold {name!r} of layer {layer.name!r} in {wanted}; got {found}. It is "
            "damaged."
        )
    if not _fits_host(like):
        return _checked(layer, *_from_entries(entries, like))
    q = from_storage_arrays([np.asarray(x) for x in entries], in_logical_order(like))
    return _checked(layer, q.reorder(like.order), _is_finite(q))


def _fits_host(like):
    """Whether a weight is small, so that compiling for its shape takes most of the time."""
    is_plain = isinstance(like.scale, jax.ShapeDtypeStruct) and like.offset is None
    return is_plain and like.format.codebook is None and like.size <= 2**22


def _is_finite(q):
    """Whether all values of a weight of NumPy arrays are finite."""
    values = q.codes.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if q.zero_point is not None:
            values -= stock_entries.repeat_groups(q.zero_point.astype(np.float32), q.shape)
        values *= stock_entries.repeat_groups(q.scale.astype(np.float32), q.shape)
    return np.all(np.isfinite(values))


# Jitted, so that it compiles once instead of once per operation. `like` is hashed by identity:
# `abstract_tensor` returns one object for equal arguments.
@partial(jax.jit, static_argnames="like")
def _from_entries(entries, like):
    return _ordered(from_storage_arrays(entries, in_logical_order(like)), like.order)


@partial(jax.jit, static_argnames="order")
def _ordered(q, order):
    """The tensor in the given axis order, and whether all its values are finite."""
    return q.reorder(order), jnp.all(jnp.isfinite(q.dequantize()))


def _checked(layer, q, is_finite):
    """Returns the QTensor if its values are finite, and raises otherwise."""
    if not is_finite:
        raise ValueError(
            f"The file's codes and scales for layer {layer.name!r} must decode to finite numbers; "
            f"got NaN or Inf in {q!r}. It is damaged: quantize the model again."
        )
    return q


def other_variables(layer: Any, names: Any) -> list[keras.Variable]:
    """The layer's own variables, trainable ones first, without those of LoRA.

    Args:
        layer: float or quantized.
        names: declared weights that are left out.
    """
    held = [v for stored in layer.stored_weights.values() for v in stored.variables]
    held += [layer.float_weights[name] for name in names if name in layer.float_weights]
    # In a layer that is built quantized, variables of hooks come before the rest; otherwise after.
    by_hooks = layer.weight_state.hook_variables
    taken = {id(v) for v in (*held, *by_hooks)}
    others = [v for v in compat.own_variables(layer) if id(v) not in taken]
    return [v for v in (*others, *by_hooks) if not v.name.startswith("lora_")]


def _config_in(layer: Any, store: Any) -> SchemeConfig | None:
    """The config in a store, or None if it has none, like stores of stock Keras."""
    if MARK not in set(store.keys()):
        return None
    text = np.asarray(store[MARK]).tobytes()
    own = layer.quantization_config
    if own is not None and _as_text(own).encode() == text:
        return own  # It was made with the `custom_objects` of `load_model`.
    try:
        config = keras.saving.deserialize_keras_object(json.loads(text))
    except TypeError as error:
        raise ValueError(
            f"The quantization config of layer {layer.name!r} cannot be made; got the classes "
            f"{_classes_in(json.loads(text))}. Register them with keras.saving, or load the file "
            "within keras.saving.CustomObjectScope({...})."
        ) from error
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"The entry {MARK!r} of layer {layer.name!r} must describe a config; got "
            f"{text[:60]!r}. The file is damaged, or of a newer version."
        ) from error
    if not isinstance(config, SchemeConfig):
        raise ValueError(
            f"The entry {MARK!r} of layer {layer.name!r} must describe a config of "
            f"jaxquant.keras; got {config!r}. The file is damaged."
        )
    return config


def _classes_in(config: Any) -> list[str]:
    """The names of the classes that a serialized object is made of."""
    if not isinstance(config, dict):
        return []
    names = [str(config["class_name"])] if "class_name" in config else []
    return names + [name for inner in config.values() for name in _classes_in(inner)]


def _as_text(config: Any) -> str:
    return json.dumps(keras.saving.serialize_keras_object(config))


def _is_plain(config: Any) -> bool:
    """Whether a config is the default int8, which is not written to files."""
    default = Int8QuantizationConfig()
    return type(config) is Int8QuantizationConfig and config.get_config() == default.get_config()


def check_holds_floats(layer: Any, store: Any) -> None:
    """Checks that a store for a float layer does not hold the scales of float8 training.

    Raises:
        ValueError: it does.
    """
    shapes = [np.shape(store[key]) for key in sorted(store.keys(), key=_number)]
    if stock_entries.is_float8(shapes, len(other_variables(layer, ()))):
        raise ValueError(
            f"The file holds the scales of float8 training for layer {layer.name!r}, which is "
            f"a float layer; got shapes {shapes}. Quantize it first, with "
            "Float8QuantizationConfig(training=True), then load the file."
        )


@contextlib.contextmanager
def restored_on_error(variables: list[keras.Variable]) -> Iterator[None]:
    """Restores the values of variables if an error is raised."""
    values = [v.value for v in variables]
    try:
        yield
    except BaseException:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        raise


def _number(key: str) -> tuple[int, int, str]:
    """Sort key: numbered entries in order, then all others."""
    return (0, int(key), key) if key.isdigit() else (1, 0, key)
