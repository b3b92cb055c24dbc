"""The variables of a quantized layer in a Keras file, and back.

Entries are numbered: codes of the declared weights, the layer's other variables, then scales and
zero points of each declared weight; in logical order of axes, so that files fit every platform.
How they are quantized is written beside them, under `MARK`. Weights of the default int8 are
written as stock Keras writes them, which has no such entry: scales are 127/max|x| without the
axes they are shared along. (In float64, so that the step comes back bit by bit.)
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from ..core import QTensor
from . import compat
from .carriers import carrier, from_carrier, to_carrier
from .configs import Int8QuantizationConfig

MARK = "quantization"
# To a type checker, anything: the Keras layer among the bases gives the rest.
_KerasLayer: Any = object


def is_quantized(store: Any) -> bool:
    """Whether a store holds codes: ours by its mark, those of stock Keras by their dtype."""
    keys = set(store.keys())
    return MARK in keys or ("0" in keys and np.asarray(store["0"]).dtype == np.int8)


def save(layer: Any, store: Any) -> None:
    """Writes the variables of a quantized layer."""
    is_plain = _is_plain(layer.quantization_config)
    parts = []
    for name in layer.stored_weights:
        q = layer.tensor_to_save(name).reorder(None)
        codes, *rest = (to_carrier(x) for x in jax.tree.leaves(q))
        if is_plain:
            rest = [layer.scale_to_stock(name, 1 / np.asarray(q.scale, np.float64), q)]
        parts += [(codes, rest)]
    entries = [codes for codes, _ in parts]
    entries += other_variables(layer)
    entries += [value for _, rest in parts for value in rest]
    for i, value in enumerate(entries):
        store[str(i)] = keras.ops.convert_to_numpy(value)
    if not is_plain:
        text = json.dumps(keras.saving.serialize_keras_object(layer.quantization_config))
        store[MARK] = np.frombuffer(text.encode(), np.uint8)


def load(layer: Any, store: Any) -> None:
    """Reads the variables of a quantized layer, and quantizes a float layer by them.

    Raises:
        ValueError: the entries are not those of this layer. It is left as it was.
    """
    config, is_plain = _config_in(store)
    likes, others = layer.likes(config), other_variables(layer)
    parts = {name: _part_shapes(layer, name, like, is_plain) for name, like in likes.items()}
    wanted = [shapes[0] for shapes in parts.values()]
    wanted += [tuple(v.shape) for v in others]
    wanted += [shape for shapes in parts.values() for shape in shapes[1:]]
    entries = _read(layer, store, wanted)
    codes, rest = entries[: len(likes)], entries[len(likes) + len(others) :]
    tensors = {}
    for name, first in zip(likes, codes, strict=True):
        count = len(parts[name]) - 1
        tensors[name] = _tensor(layer, name, likes[name], (first, *rest[:count]), is_plain)
        rest = rest[count:]
    layer.take_over(config, tensors)
    for variable, value in zip(others, entries[len(likes) :], strict=False):
        variable.assign(value)


def _part_shapes(layer, name, like, is_plain):
    """Shapes of the entries of one weight."""
    logical = jax.eval_shape(lambda q: q.reorder(None), like)
    shapes = [carrier(x).shape for x in jax.tree.leaves(logical)]
    return [shapes[0], layer.stock_scale_shape(name, logical)] if is_plain else shapes


def _read(layer, store, wanted):
    """The numbered entries, checked against the shapes that are wanted."""
    keys = set(store.keys()) - {MARK}
    found = [np.asarray(store[str(i)]) for i in range(len(keys)) if str(i) in keys]
    shapes = [x.shape for x in found]
    if shapes != wanted:
        raise ValueError(
            f"The file holds other variables than layer {layer.name!r}; wanted shapes {wanted}, "
            f"got {shapes}. Load it into the layer that it was saved from."
        )
    return found


def _tensor(layer, name, like, entries, is_plain):
    """A QTensor like `like` from the entries of one weight, which are in logical order."""
    logical = jax.eval_shape(lambda q: q.reorder(None), like)
    leaves, treedef = jax.tree.flatten(logical)
    if is_plain:
        step = layer.scale_from_stock(name, 1 / entries[1].astype(np.float64), logical)
        entries = entries[0], step.astype(np.float32)
    pairs = zip(entries, leaves, strict=True)
    held = [from_carrier(jnp.asarray(entry), leaf) for entry, leaf in pairs]
    return jax.tree.unflatten(treedef, held).reorder(like.order)


def other_variables(layer: Any) -> list[keras.Variable]:
    """The layer's own variables but for its declared weights and LoRA, trainable ones first."""
    held = [v for stored in layer.stored_weights.values() for v in stored.variables]
    held += [v for v in layer.float_weights.values() if v is not None]
    taken = {id(v) for v in held}
    return [
        v
        for v in compat.own_variables(layer)
        if id(v) not in taken and not v.name.startswith("lora_")
    ]


def _config_in(store):
    """The config of a store, and whether it is written as stock Keras writes int8."""
    if MARK not in set(store.keys()):
        return Int8QuantizationConfig(), True
    text = bytes(np.asarray(store[MARK])).decode()
    return keras.saving.deserialize_keras_object(json.loads(text)), False


def _is_plain(config):
    """Whether a config is the default int8, which needs no words."""
    default = Int8QuantizationConfig()
    return type(config) is Int8QuantizationConfig and config.get_config() == default.get_config()


class SavedMixin(_KerasLayer):
    """The saving hooks of a quantizable layer."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        inherited = getattr(super(), "get_config", None)
        if cls.get_config is SavedMixin.get_config and inherited is not None:
            cls.get_config = compat.with_default_mark(SavedMixin.get_config, inherited)

    def save_own_variables(self, store: Any) -> None:
        """Writes the variables in the order that the class documents."""
        if not self.stored_weights:
            return super().save_own_variables(store)
        return save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote; a float layer is quantized by it.

        Raises:
            ValueError: the file is of another layer, of floats for a quantized layer, or
                quantized in another way. The layer is left as it was.
        """
        if not self.stored_weights and not is_quantized(store):
            return super().load_own_variables(store)
        return load(self, store)

    def stock_scale_shape(self, name: str, like: QTensor) -> tuple[int, ...]:
        """Hook: the shape of an int8 scale in stock Keras: without the axes it is shared along."""
        shared = {a % like.ndim for a in self.declared_weights[name].axes(self)}
        return tuple(n for a, n in enumerate(like.scale.shape) if a not in shared)

    def scale_to_stock(self, name: str, scale: np.ndarray, like: QTensor) -> np.ndarray:
        """Hook: a scale laid out as stock Keras has it for int8."""
        return scale.reshape(self.stock_scale_shape(name, like))

    def scale_from_stock(self, name: str, scale: np.ndarray, like: QTensor) -> np.ndarray:
        """Hook: undoes `scale_to_stock`."""
        return scale.reshape(like.scale.shape)

    def tensor_to_save(self, name: str) -> QTensor:
        """Hook: the quantized weight for a file, such as with LoRA merged."""
        return self.quantized_weight(name)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments, and its quantization config if it has one."""
        config = super().get_config()
        quantization = self.quantization_config
        if quantization is None:
            return config
        return {**config, "quantization_config": keras.saving.serialize_keras_object(quantization)}

    @classmethod
    def from_config(cls, config: dict[str, Any]):
        """Makes the layer that `get_config` describes, with its quantization config."""
        config = dict(config)
        quantization = config.pop("quantization_config", None)
        layer = super().from_config(config)
        layer.quantization_config = keras.saving.deserialize_keras_object(quantization)
        return layer
