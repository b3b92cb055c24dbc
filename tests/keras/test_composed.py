"""Layers made of layers: errors that name the sublayers and change nothing."""

from typing import Any

import keras
import numpy as np
import pytest

from jaxquant.keras import layers


def lstm() -> Any:
    layer = layers.LSTM(3)
    layer.build((None, 4, 5))
    return layer


def attention() -> Any:
    layer = layers.MultiHeadAttention(1, 4)
    layer.build((None, 4, 5), (None, 4, 5))
    return layer


@pytest.mark.parametrize("make, inner", [(lstm, "lstm_cell"), (attention, "query, key, value")])
def test_the_error_says_what_to_quantize_instead(make, inner):
    layer = make()
    text = f"has no weights except those of its sublayers; .* each of .*{inner}"
    with pytest.raises(NotImplementedError, match=text):
        layer.quantize("int8")


def set_policy(layer, policy):
    layer.dtype_policy = policy


@pytest.mark.parametrize("make", [lstm, attention])
def test_an_unsupported_policy_raises_and_keeps_the_old_one(make):
    layer = make()
    with pytest.raises(NotImplementedError, match="has no weights except those"):
        set_policy(layer, "int8_from_float32")
    assert layer.dtype_policy.name == "float32"


def test_lora_of_rank_zero_raises_and_changes_nothing():
    layer = layers.Dense(3)
    layer.build((None, 4))
    layer.quantize("int8")
    inputs = np.ones((2, 4), np.float32)
    before, variables = np.asarray(layer(inputs)), [v.path for v in layer.variables]
    with pytest.raises(ValueError, match="rank must be a positive int"):
        layer.enable_lora(0)

    def fail(shape, dtype=None):
        raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        layer.enable_lora(2, b_initializer=fail)
    np.testing.assert_array_equal(layer(inputs), before)
    assert [v.path for v in layer.variables] == variables
    layer.enable_lora(2)


@pytest.mark.slow
def test_a_loaded_model_trains_after_quantizing_without_a_call(tmp_path):
    inputs, targets = np.ones((8, 4), np.float32), np.ones((8, 3), np.float32)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5), layers.Dense(3)])
    model.compile("adam", "mse")
    model.fit(inputs, targets, batch_size=4, verbose="0")
    model.save(tmp_path / "model.keras")

    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    steps = int(loaded.optimizer.iterations)
    loaded.quantize("int8")
    codes = [np.asarray(layer.quantized_weight("kernel").codes) for layer in loaded.layers]
    with pytest.warns(UserWarning, match="2 of its 4 trainable variables were quantized"):
        loaded.fit(inputs, targets, batch_size=4, verbose="0")

    assert int(loaded.optimizer.iterations) == steps + 2
    assert np.all(np.isfinite(loaded.predict(inputs, verbose="0")))
    for layer, before in zip(loaded.layers, codes, strict=True):
        np.testing.assert_array_equal(layer.quantized_weight("kernel").codes, before)
