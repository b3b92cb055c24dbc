"""Stock layers with state that is not a weight, in models that are converted and quantized."""

import pathlib
from typing import Any

import keras
import numpy as np
import pytest

from jaxquant.keras import convert, quantize, to_stock

stock = keras.layers


def adapted(layer) -> Any:
    data = np.random.default_rng(7).normal(2, 3, (50, 6)).astype(np.float32)
    if isinstance(layer, stock.Discretization):  # Its `adapt` needs TensorFlow.
        layer.reset_state()
        layer.update_state(data)
        layer.finalize_state()
    else:
        layer.adapt(data)
    return layer


@keras.saving.register_keras_serializable()
class Vocabulary(stock.Layer):
    """Keeps a table in a separate file, like Keras' lookup layers."""

    table = np.zeros(11, np.float32)

    def call(self, inputs):
        return keras.ops.take(self.table, keras.ops.cast(inputs, "int32"))

    def save_assets(self, folder):
        np.save(pathlib.Path(folder) / "table.npy", self.table)

    def load_assets(self, folder):
        self.table = np.load(pathlib.Path(folder) / "table.npy")


@keras.saving.register_keras_serializable()
class Derived(stock.Layer):
    """Computes with a constant that is derived from a variable after each load."""

    factor = 1.0

    def build(self, input_shape):
        self.scale = self.add_weight(name="scale", shape=(), trainable=False)

    def derive(self):
        self.factor = float(2 * self.scale.value)

    def call(self, inputs):
        return inputs * self.factor

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.derive()


def vocabulary():
    layer = Vocabulary()
    layer.table = np.arange(11, dtype=np.float32) ** 2
    return layer


def derived():
    layer: Any = Derived()
    layer.build((None, 6))
    layer.scale.assign(3.0)
    layer.derive()
    return layer


VECTOR, STEPS = (6,), (2, 6)
STATEFUL: dict[str, Any] = {"stateful": True}
SCALARS: Any = {"axis": None}
# Layer, input shape of one example.
CASES: dict[str, Any] = {
    "Normalization": (lambda: adapted(stock.Normalization()), VECTOR),
    "Normalization of scalars": (lambda: adapted(stock.Normalization(**SCALARS)), VECTOR),
    "Normalization inverted": (lambda: adapted(stock.Normalization(invert=True)), VECTOR),
    "Normalization in a wrapper": (
        lambda: stock.TimeDistributed(adapted(stock.Normalization())),
        STEPS,
    ),
    "Normalization in a pipeline": (
        lambda: stock.Pipeline([adapted(stock.Normalization()), stock.Dropout(0.3)]),
        VECTOR,
    ),
    "Normalization with constants": (
        lambda: stock.Normalization(mean=[1.0] * 6, variance=np.arange(1.0, 7)),
        VECTOR,
    ),
    "Discretization": (lambda: adapted(stock.Discretization(num_bins=4)), VECTOR),
    "Vocabulary": (vocabulary, VECTOR),
    "Derived": (derived, VECTOR),
    "BatchNormalization": (lambda: stock.BatchNormalization(), VECTOR),
    "SpectralNormalization": (lambda: stock.SpectralNormalization(stock.Dense(5)), VECTOR),
    "Dropout": (lambda: stock.Dropout(0.5), VECTOR),
    "LSTM": (lambda: stock.LSTM(3, unroll=True, **STATEFUL), STEPS),
    "RNN of cells": (
        lambda: stock.RNN(
            [stock.LSTMCell(3), stock.GRUCell(3, recurrent_dropout=0.3)], unroll=True, **STATEFUL
        ),
        STEPS,
    ),
    "Bidirectional": (
        lambda: stock.Bidirectional(stock.SimpleRNN(3, unroll=True, **STATEFUL)),
        STEPS,
    ),
    "Rescaling": (lambda: stock.Rescaling([1.0, 2, 3, 4, 5, 6], offset=0.5), VECTOR),
    "CategoryEncoding": (lambda: stock.CategoryEncoding(11, "multi_hot"), VECTOR),
}
# These hold the state of their last batch.
IS_STATEFUL = {"LSTM", "RNN of cells", "Bidirectional"}
# These look integers up.
COUNTS = dict.fromkeys(("CategoryEncoding", "Vocabulary")).keys()
# These compute with constants that are derived from their variables.
DERIVES = (Derived, stock.Normalization, stock.TimeDistributed, stock.Pipeline)

# Cases that one model can have: they share inputs, and whether a batch has a fixed size.
MODELS = {
    "vectors": [c for c, (_, shape) in CASES.items() if shape is VECTOR and c not in COUNTS],
    "counts": list(COUNTS),
    "sequences": ["Normalization in a wrapper", *sorted(IS_STATEFUL)],
}


def model_of(*cases) -> Any:
    """A model with each of the layers, and an output for each."""
    batch_size = 2 if IS_STATEFUL & {*cases} else None
    start = keras.Input(CASES[cases[0]][1], batch_size=batch_size)
    outputs = {}
    for i, case in enumerate(cases):
        x = stock.Flatten()(CASES[case][0]()(start))
        outputs[case] = stock.Dense(2, name=f"head{i}")(stock.Rescaling(1.0)(x))
    return keras.Model(start, outputs)


def calls(model, inputs, training):
    """Outputs of two calls: the second depends on the state that the first leaves."""
    found = [model(inputs, training=training) for _ in range(2)]
    return {case: np.asarray([x[case] for x in found]) for case in found[0]}


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize("cases", MODELS.values(), ids=MODELS)
def test_copies_of_a_model_have_the_state_of_its_layers(cases, tmp_path):
    keras.utils.set_random_seed(0)
    model, shape = model_of(*cases), CASES[cases[0]][1]
    inputs = np.random.default_rng(0).uniform(0, 1, (2, *shape)).astype(np.float32)
    inputs *= 10 if COUNTS & {*cases} else 1
    for layer in model.layers:
        for variable in layer.weights:
            if not isinstance(layer, DERIVES):
                variable.assign(np.asarray(variable) + 0.1)
    calls(model, inputs, training=True)  # Changes seeds, statistics and states.

    keep = [Derived] if "Derived" in cases else []
    ours, (quantized, _) = convert(model, keep=keep), quantize(model, "int8", keep=keep)
    copies = {"convert": ours, "to_stock": to_stock(ours), "quantize": quantized}
    for training in (False, True):
        wanted = calls(model, inputs, training)
        for name, copy in copies.items():
            found = calls(copy, inputs, training)
            for case in cases:
                step = 0.03 * np.abs(wanted[case]).max() if name == "quantize" else 0
                np.testing.assert_allclose(
                    found[case], wanted[case], rtol=0, atol=step, err_msg=f"{case}, {name}"
                )

    path = tmp_path / "model.keras"
    quantized.save(path)
    loaded: Any = keras.saving.load_model(path)
    found, wanted = (calls(x, inputs, False) for x in (loaded, quantized))
    for case in cases:
        if case not in IS_STATEFUL:  # Keras does not save their states.
            np.testing.assert_array_equal(found[case], wanted[case], case)


def test_copies_do_not_share_state_with_the_model():
    model = model_of("LSTM")
    inputs = np.ones((2, *STEPS), np.float32)
    first = convert(model)(inputs)["LSTM"]
    model(inputs)
    found = convert(convert(model))(inputs)["LSTM"]
    np.testing.assert_array_equal(found, model(inputs)["LSTM"])
    model.layers[1].reset_state()
    np.testing.assert_array_equal(model(inputs)["LSTM"], first)


@pytest.mark.slow
def test_a_kernel_shared_by_a_wrapper_stays_in_float(tmp_path):
    start = keras.Input((6,))
    wrapper = stock.SpectralNormalization(stock.Dense(5, name="inner"), name="norm")
    model = keras.Model(start, stock.Dense(2, name="head")(wrapper(start)))
    quantized, report = quantize(model, "int8")
    reasons = {row.path: row.reason for row in report.rows}
    assert reasons["norm/inner/kernel"] == "SpectralNormalization shares it with its layer"
    assert quantized.get_layer("norm").layer.quantization_mode is None
    assert quantized.get_layer("head").quantization_mode == "int8"
    wanted = quantized(np.ones((2, 6)))
    quantized.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(np.ones((2, 6))), wanted)


WORDS = np.array([["a", "b"], ["b", "c"], ["c", "c"]])
COUNTED = np.array([[12, 3], [4, 12], [4, 4]])
# Layers that need TensorFlow, which a model of the JAX backend holds and does not run.
LOOKUPS: dict[str, Any] = {
    "StringLookup": (lambda: stock.StringLookup(output_mode="tf_idf"), WORDS, "string"),
    "IntegerLookup": (lambda: stock.IntegerLookup(output_mode="tf_idf"), COUNTED, "int64"),
    "TextVectorization": (
        lambda: stock.TextVectorization(output_mode="tf_idf"),
        np.array([["a b c"], ["c d"], ["b b a"]]),
        "string",
    ),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_copies_have_the_vocabulary(name):
    pytest.importorskip("tensorflow", reason="pip install tensorflow-cpu")
    make, data, dtype = LOOKUPS[name]
    layer = make()
    layer.adapt(data)
    start = keras.Input(data.shape[1:], dtype=dtype)
    model: Any = keras.Sequential([start, layer, stock.Dense(2)])
    ours, (quantized, _) = convert(model), quantize(model, "int8")
    for copy in (ours, to_stock(ours), quantized):
        assert copy.layers[0] is not layer
        assert copy.layers[0].get_vocabulary() == layer.get_vocabulary()
        np.testing.assert_array_equal(copy.layers[0](data), layer(data))
