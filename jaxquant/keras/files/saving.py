"""The hooks by which Keras saves and loads a quantizable layer."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from ...core import QTensor
from .. import compat
from . import stock_entries
from .checksums import read_entries, write_checksums
from .entries import is_quantized, load, other_variables, save
from .stock_entries import StockMatrix


class SavedMixin(compat.KerasLayer):
    """The saving hooks of a quantizable layer."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        inherited = getattr(super(), "get_config", None)
        if cls.get_config is SavedMixin.get_config and inherited is not None:
            cls.get_config = compat.with_default_mark(SavedMixin.get_config, inherited)

    def save_own_variables(self, store: Any) -> None:
        """Writes the variables in the order that the class documents."""
        if compat.has_quantized_variables(self):
            save(self, store)
        else:
            super().save_own_variables(store)
        write_checksums(store)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote; a float layer is quantized by it.

        Raises:
            ValueError: the file is damaged, or of another layer, or holds floating-point weights
                for a quantized layer, or weights that are quantized in another way. The layer is
                not changed.
        """
        entries = read_entries(self.name, store)
        if compat.has_quantized_variables(self) or is_quantized(entries):
            return load(self, entries)
        shapes = [entries[key].shape for key in sorted(entries, key=_number)]
        if stock_entries.is_float8(shapes, len(other_variables(self, ()))):
            raise ValueError(
                f"The file holds the scales of float8 training for layer {self.name!r}, which is "
                f"a float layer; got shapes {shapes}. Quantize it first, by "
                "Float8QuantizationConfig(training=True), then load the file."
            )
        with _restored_on_error(compat.own_variables(self)):
            super().load_own_variables(entries)

    def stock_matrix(self, name: str, shape: tuple[int, ...]) -> StockMatrix:
        """Hook: the matrix that stock Keras makes of a weight for int4: contracted axes first."""
        axes = self.declared_weights[name].axes(self)
        rows = math.prod(shape[a] for a in axes)
        return StockMatrix((rows, math.prod(shape) // max(rows, 1)), 0)

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


@contextlib.contextmanager
def _restored_on_error(variables: list[keras.Variable]) -> Iterator[None]:
    """Gives variables back their values if an error is raised."""
    values = [v.value for v in variables]
    try:
        yield
    except BaseException:
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        raise


def _number(key):
    """Entries in their order, and others after them."""
    return (0, int(key), key) if key.isdigit() else (1, 0, key)
