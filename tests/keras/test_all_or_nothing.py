"""What a failing `quantize` leaves unchanged, and weights that a layer never created."""

from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from jaxquant.keras import Float8QuantizationConfig, QuantizableMixin, QuantizedWeight, layers

from .test_aliases import INPUTS, InAList, Renamed


def snapshot(layer):
    """Variables, policies and attributes of a layer and its sublayers."""
    found = layer._flatten_layers()
    return [
        (
            [(id(v), np.asarray(v).tobytes()) for v in x.weights],
            x.dtype_policy.name,
            set(vars(x)),
            list(getattr(x, "stored_weights", ())),
        )
        for x in found
    ]


def put_nan(variable):
    values = np.array(variable)
    values.flat[-1] = np.nan
    variable.assign(values)


class Two(QuantizableMixin, keras.layers.Layer):
    first = QuantizedWeight(axis=0)
    second = QuantizedWeight(axis=0)

    def build(self, input_shape):
        self.first = self.add_weight(name="first", shape=(input_shape[-1], 6))
        self.second = self.add_weight(name="second", shape=(6, 3))

    def call(self, inputs):
        return ops.matmul(ops.matmul(inputs, self.first), self.second)


# Layers with a second weight, their input shape, and its name.
SECOND = {
    "author": (Two, (None, 24), "second"),
    "separable": (lambda: layers.SeparableConv1D(4, 3), (None, 9, 5), "pointwise_kernel"),
    "cell": (lambda: layers.LSTMCell(4), (None, 24), "recurrent_kernel"),
    "table": (
        lambda: layers.ReversibleEmbedding(9, 6, tie_weights=False),
        (None, 5),
        "reverse_embeddings",
    ),
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", SECOND)
def test_nan_in_the_second_weight_leaves_the_first_in_float(name):
    make, shape, second = SECOND[name]
    layer: Any = make()
    layer.build(shape)
    put_nan(getattr(layer, second))
    before = snapshot(layer)
    with pytest.raises(ValueError, match=rf"{second} holds NaN or Inf; got shape .*\. Fix it"):
        layer.quantize("int8")
    assert snapshot(layer) == before


# Layers made of layers, their input shapes, and what `quantize` names.
COMPOSED = {
    "attention": (lambda: layers.MultiHeadAttention(2, 4), [(2, 3, 8)] * 2, "query"),
    "recurrent": (lambda: layers.LSTM(4), [(2, 3, 8)], "lstm_cell"),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_layer_raises_before_any_sublayer_changes(name):
    make, shapes, sublayer = COMPOSED[name]
    layer: Any = make()
    layer(*[np.ones(shape, np.float32) for shape in shapes])
    before = snapshot(layer)
    with pytest.raises(NotImplementedError, match=rf"or each of .*{sublayer}"):
        layer.quantize("int8")
    assert snapshot(layer) == before


def test_nan_in_the_second_layer_of_a_model_leaves_the_first_in_float():
    model: Any = keras.Sequential([keras.Input((24,)), layers.Dense(6), layers.Dense(3, name="b")])
    put_nan(model.layers[1].kernel)
    before = snapshot(model)
    with pytest.raises(ValueError, match="b/kernel holds NaN or Inf"):
        model.quantize("int8")
    assert snapshot(model) == before


def put_nan_in_the_last(model):
    put_nan(model.layers[-1].kernel)


def enable_lora_in_the_last(model):
    model.layers[-1].enable_lora(2)


def quantize_the_last(model):
    model.layers[-1].quantize("int8")


def add_a_stock_layer_that_is_quantized(model):
    model.add(keras.layers.Dense(2))
    model.layers[-1].quantize("int8")


def add_a_layer_that_keeps_its_weight_in_a_list(model):
    model.add(keras.layers.Dense(24))
    model.add(InAList())


def add_a_layer_without_declared_weights(model):
    model.add(Misnamed())


TRAINING = Float8QuantizationConfig(training=True)
# What is done to a model before it is quantized, the argument of `quantize`, and the error.
FAILING = {
    "training, NaN": (put_nan_in_the_last, {"config": TRAINING}, "holds NaN or Inf"),
    "training, LoRA": (enable_lora_in_the_last, {"config": TRAINING}, "without LoRA; got rank 2"),
    "quantized": (quantize_the_last, {"mode": "int8"}, "is already quantized with dtype_policy"),
    "training, quantized": (quantize_the_last, {"config": TRAINING}, "is already quantized with"),
    "stock, quantized": (
        add_a_stock_layer_that_is_quantized,
        {"mode": "int8"},
        "is already quantized with",
    ),
    "list": (
        add_a_layer_that_keeps_its_weight_in_a_list,
        {"mode": "int8"},
        "got it in weights_by_place",
    ),
    "misnamed": (add_a_layer_without_declared_weights, {"mode": "int8"}, "creates none of them"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_failed_quantize_of_a_model_changes_no_layer(name):
    change, arguments, message = FAILING[name]
    model: Any = keras.Sequential([keras.Input((24,)), layers.Dense(6), layers.Dense(3)])
    change(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.quantize(**arguments)
    assert snapshot(model) == before


def test_a_model_trained_in_float8_can_be_quantized():
    model: Any = keras.Sequential([keras.Input((24,)), layers.Dense(6), layers.Dense(3)])
    model.quantize(config=TRAINING)
    model.quantize("int8")
    assert all(list(layer.stored_weights) == ["kernel"] for layer in model.layers)


def test_a_quantized_file_for_a_layer_that_keeps_its_weight_in_a_list_raises():
    source, layer = Renamed(), InAList()
    for x in (source, layer):
        x.build((None, 24))
    source.quantize("int8")
    store: dict[str, Any] = {}
    source.save_own_variables(store)
    before, wanted = snapshot(layer), np.asarray(layer(INPUTS))
    with pytest.raises(ValueError, match="got it in weights_by_place"):
        layer.load_own_variables(store)
    assert snapshot(layer) == before
    np.testing.assert_array_equal(layer(INPUTS), wanted)


class Misnamed(QuantizableMixin, keras.layers.Layer):
    kernel = QuantizedWeight(axis=0)

    def build(self, input_shape):
        self.weight = self.add_weight(name="weight", shape=(input_shape[-1],))

    def call(self, inputs):
        return inputs * self.weight


class LeftOut(Misnamed):
    def build(self, input_shape):
        super().build(input_shape)
        self.kernel = None


def test_a_layer_that_creates_no_declared_weight_raises():
    layer: Any = Misnamed()
    layer.build((None, 24))
    before = snapshot(layer)
    text = (
        r"Misnamed declares \['kernel'\] and creates none of them; got the variables \['weight'\]\."
    )
    with pytest.raises(ValueError, match=text):
        layer.quantize("int8")
    assert snapshot(layer) == before


def test_a_layer_may_omit_a_declared_weight():
    layer: Any = LeftOut()
    layer.build((None, 24))
    layer.quantize("int8")
    assert layer.quantization_mode is None


class MadeInInit(Renamed):
    """Creates its weight before it is built, under another attribute."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._kernel = self.add_weight(name="kernel", shape=(24, 7))

    def build(self, input_shape):
        pass


def test_a_weight_created_in_init_is_quantized():
    layer: Any = MadeInInit()
    wanted = np.asarray(layer(INPUTS))
    layer.quantize("int8")
    assert list(layer.stored_weights) == ["kernel"]
    np.testing.assert_allclose(layer(INPUTS), wanted, atol=0.05 * np.abs(wanted).max())
