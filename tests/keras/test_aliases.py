"""Layers that keep a declared weight under another attribute than the declared one."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from jaxquant.keras import QuantizableMixin, QuantizedWeight

from .test_layers import relative_error

_register = keras.saving.register_keras_serializable(package="test_aliases")
BOUNDS = {"int8": 0.02, "int4": 0.2, "float8": 0.07}
INPUTS = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)


@_register
class Renamed(QuantizableMixin, keras.layers.Layer):
    """Keeps its kernel as Keras' own layers do."""

    kernel = QuantizedWeight(axis=0)

    def build(self, input_shape):
        self._kernel = self.add_weight(name="kernel", shape=(input_shape[-1], 7))

    def call(self, inputs):
        return ops.matmul(inputs, self._kernel)


@_register
class InAList(Renamed):
    """Keeps its kernel in a list."""

    def build(self, input_shape):
        self.weights_by_place = [self.add_weight(name="kernel", shape=(input_shape[-1], 7))]

    def call(self, inputs):
        return ops.matmul(inputs, self.weights_by_place[0])


@_register
class InASublayer(Renamed):
    """Shares its kernel with an inner layer."""

    def build(self, input_shape):
        self.inner = keras.layers.Dense(7)
        self.inner.borrowed = self.add_weight(name="kernel", shape=(input_shape[-1], 7))

    def call(self, inputs):
        return ops.matmul(inputs, self.inner.borrowed)


def model_of(layer_class) -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((24,)), layer_class()])


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("mode", BOUNDS)
def test_a_weight_under_another_attribute_is_read_dequantized(mode, tmp_path):
    model = model_of(Renamed)
    wanted = np.asarray(model(INPUTS))
    model.quantize(mode)
    (layer,) = model.layers
    np.testing.assert_array_equal(layer._kernel, layer.kernel)
    found = np.asarray(model(INPUTS))
    assert relative_error(found, wanted) < BOUNDS[mode]
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.layers[0]._kernel, loaded.layers[0].kernel)
    np.testing.assert_array_equal(np.asarray(loaded(INPUTS)), found)


def test_a_weight_under_another_attribute_is_read_dequantized_under_a_policy():
    layer: Any = Renamed(dtype="int8_from_float32")
    layer.build((None, 24))
    assert layer._kernel.dtype == "float32"
    assert layer._kernel.shape == (24, 7)


@pytest.mark.parametrize(
    ("layer_class", "place"),
    [(InAList, "weights_by_place"), (InASublayer, r"dense\w*\.borrowed")],
)
def test_a_weight_in_a_container_raises_and_changes_nothing(layer_class, place):
    model = model_of(layer_class)
    wanted = np.asarray(model(INPUTS))
    with pytest.raises(ValueError, match=rf"got it in {place}\. Write self\.kernel = "):
        model.layers[0].quantize("int8")
    assert model.layers[0].quantization_mode is None
    np.testing.assert_array_equal(np.asarray(model(INPUTS)), wanted)
    layer = layer_class(dtype="int8_from_float32")
    with pytest.raises(ValueError, match=rf"got it in {place}\. "):
        layer.build((None, 24))


def test_missing_attributes_are_reported_as_before():
    layer: Any = Renamed()
    with pytest.raises(AttributeError, match="'Renamed' object has no attribute 'other'"):
        _ = layer.other
    with pytest.raises(AttributeError, match=r"has no 'kernel' yet; .* Build it"):
        _ = layer.kernel
