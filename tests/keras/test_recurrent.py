"""Recurrent layers and their wrappers: what the table of all layers does not cover."""

from typing import Any, cast

import jax
import keras
import numpy as np
import pytest

from jaxquant import W8A8
from jaxquant.keras import QuantizationConfig, layers

from .recurrent_cases import products
from .test_layers import assert_same

STEPS, FEATURES, UNITS = 4, 12, 6
KINDS = {
    "SimpleRNN": {},
    "LSTM": {},
    "LSTM split": {"implementation": 1},
    "GRU": {},
    "GRU before": {"reset_after": False},
}


def make(kind, package=layers, **arguments):
    name = kind.split()[0]
    options = {"bias_initializer": "normal", "name": "layer", **KINDS[kind], **arguments}
    return getattr(package, name)(UNITS, **options)


def sequences(batch=3, steps=STEPS):
    return np.random.default_rng(0).normal(size=(batch, steps, FEATURES)).astype(np.float32)


def built(layer):
    layer.build((3, STEPS, FEATURES))
    return layer


def quantized(kind, **arguments):
    """A quantized layer, and a stock layer with its dequantized weights."""
    layer = built(make(kind, **arguments))
    layer.cell.quantize(config=QuantizationConfig(W8A8.weights))
    cell, stock = layer.cell, built(make(kind, keras.layers, **arguments))
    stock.cell.set_weights([cell.kernel, cell.recurrent_kernel, cell.bias])
    return layer, stock


def assert_close(found, wanted):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=2e-6)


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SimpleRNN", "LSTM", "GRU before"])
def test_float_layer_equals_the_stock_layer(kind):
    keras.utils.set_random_seed(1)
    stock = make(kind, keras.layers, return_sequences=True, dropout=0.5, recurrent_dropout=0.3)
    later = keras.layers.Dense(2)
    keras.utils.set_random_seed(1)
    ours = make(kind, return_sequences=True, dropout=0.5, recurrent_dropout=0.3)
    ours_later = keras.layers.Dense(2)
    x = sequences()
    # The same initial values and masks: rebuilding the cell does not draw random numbers.
    np.testing.assert_array_equal(ours(x, training=True), stock(x, training=True))
    np.testing.assert_array_equal(later(x), ours_later(x))

    assert type(ours.cell) is getattr(layers, type(stock.cell).__name__)
    assert ours.get_config() == stock.get_config()
    assert [v.path for v in ours.weights] == [v.path for v in stock.weights]
    found = list(ours._flatten_layers(include_self=False))
    assert [id(layer) for layer in found] == [id(ours.cell)]


def test_cell_keeps_arguments_that_are_not_in_the_config():
    def activation(x):
        return keras.ops.tanh(2 * x)

    layer: Any = cast(Any, layers.LSTM)(
        UNITS, activation=activation, dtype="mixed_bfloat16", trainable=False, seed=3
    )

    assert layer.cell.activation is activation
    assert layer.cell.dtype_policy.name == "mixed_bfloat16"
    assert not layer.cell.trainable
    assert layer.cell.seed == 3
    assert layer.cell.name == "lstm_cell"


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layer_equals_the_stock_layer_with_dequantized_weights(kind):
    options = {"return_sequences": True, "return_state": True, "go_backwards": True}
    layer, stock = quantized(kind, **options)
    mask = np.arange(STEPS) < np.asarray([[2], [4], [3]])
    state = list(np.random.default_rng(1).normal(size=(2, 3, UNITS)).astype(np.float32))
    state = state[: len(stock.state_size)]

    found = layer(sequences(), mask=mask, initial_state=state)

    assert_close(found, stock(sequences(), mask=mask, initial_state=state))


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("kind", ["SimpleRNN", "LSTM", "GRU"])
def test_cell_accepts_states_like_the_stock_cell(kind):
    layer, stock = quantized(kind)
    x, state = sequences()[:, 0], np.full((3, UNITS), 0.5, np.float32)
    states = [state] * len(stock.state_size)

    assert_close(layer.cell(x, states), stock.cell(x, states))
    if len(states) == 1:
        assert_close(layer.cell(x, state), stock.cell(x, state))


@pytest.mark.slow
def test_unrolled_stateful_and_dropout_layers_match_the_stock_ones():
    layer, stock = quantized("LSTM", stateful=True, unroll=True)
    for _ in range(2):
        assert_close(layer(sequences()), stock(sequences()))
    assert_close(layer.states, stock.states)
    layer, stock = quantized("GRU", dropout=0.5, seed=5)
    assert_close(layer(sequences()), stock(sequences()))
    assert_close(layer(sequences(), training=True), stock(sequences(), training=True))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("kind", ["SimpleRNN", "LSTM", "GRU"])
def test_int8_cell_multiplies_codes(kind):
    cell = built(make(kind)).cell
    cell.quantize("int8")
    states = cell.get_initial_state(3)

    jaxpr = jax.make_jaxpr(lambda x: cell(x, states)[0])(sequences()[:, 0])

    assert products(jaxpr) == {("int8", "int8", "int32")}


def test_one_kernel_can_stay_in_float():
    layer = built(make("LSTM"))
    before = layer(sequences())
    layer.cell.quantize(config=QuantizationConfig({"*/recurrent_kernel": W8A8}))

    error = np.linalg.norm(layer(sequences()) - before) / np.linalg.norm(before)

    assert list(layer.cell.stored_weights) == ["recurrent_kernel"]
    assert 0 < error < 0.01


def test_a_layer_with_a_quantized_policy_runs():
    layer = built(layers.LSTM(UNITS, dtype="int8_from_float32"))

    assert set(layer.cell.stored_weights) == {"kernel", "recurrent_kernel"}
    assert layer(sequences()).shape == (3, UNITS)


def wrapped() -> Any:
    return keras.Sequential(
        [
            keras.Input((STEPS, FEATURES)),
            layers.Bidirectional(layers.GRU(UNITS, return_sequences=True), merge_mode="sum"),
            keras.layers.RNN([layers.LSTMCell(5), layers.SimpleRNNCell(4)], return_sequences=True),
            layers.TimeDistributed(layers.Dense(3)),
        ]
    )


@pytest.mark.slow
def test_wrappers_and_stacks_quantize_and_round_trip_through_files(tmp_path):
    keras.utils.set_random_seed(0)
    model = wrapped()
    wanted = model.predict(sequences(), verbose=0)
    model.quantize("int8")
    found = model.predict(sequences(), verbose=0)

    assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.02  # 3 products.
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(loaded, model)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = wrapped()
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert_same(fresh, model)


def test_float_files_interchange_with_stock_layers(tmp_path):
    ours, stock = (
        keras.Sequential([keras.Input((STEPS, FEATURES)), make("LSTM", package)])
        for package in (layers, keras.layers)
    )
    stock.save_weights(tmp_path / "stock.weights.h5")
    ours.load_weights(tmp_path / "stock.weights.h5")

    np.testing.assert_array_equal(ours(sequences()), stock(sequences()))


def test_cell_without_a_step_raises():
    class Cell(layers.LSTMCell.__mro__[1], keras.layers.LSTMCell):
        pass

    cell = Cell(UNITS)
    cell.build((None, FEATURES))
    cell.quantize("int8")

    with pytest.raises(NotImplementedError, match="Cell must define `step`"):
        cell(sequences()[:, 0], cell.get_initial_state(3))
