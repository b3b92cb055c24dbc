"""Training in 8-bit floats with delayed scaling."""

from typing import Any

import jax.numpy as jnp
import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from jaxquant.keras import Float8QuantizationConfig, layers
from jaxquant.keras.layer import float8

TRAINING = Float8QuantizationConfig(training=True)


def layer_of(kind, **kwargs) -> Any:
    layer = {
        "Dense": lambda: layers.Dense(7, bias_initializer="normal", **kwargs),
        "EinsumDense": lambda: layers.EinsumDense("ab,bc->ac", 7, bias_axes="c", **kwargs),
    }[kind]()
    layer.build((None, 20))
    return layer


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("size", [1e-3, 1e4])
@pytest.mark.parametrize("kind", ["Dense", "EinsumDense"])
def test_a_layer_is_accurate_before_its_first_batch(kind, size):
    layer = layer_of(kind)
    inputs = size * np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)
    wanted = np.asarray(layer(inputs))
    kernel = np.asarray(layer.kernel)
    layer.quantize(config=TRAINING)
    np.testing.assert_array_equal(layer.kernel, kernel)
    np.testing.assert_allclose(layer.kernel_scale, np.abs(kernel).max() / 448, rtol=1e-6)
    found = np.asarray(layer(inputs))
    assert 0 < np.linalg.norm(found - wanted) < 0.06 * np.linalg.norm(wanted)
    names = [v.name for v in layer.trainable_variables]
    assert names == ["kernel", "bias", *float8.SCALING]
    assert layer.inputs_amax_history.shape == (1024,)


def digits():
    pixels, labels = load_digits(return_X_y=True)
    return (pixels / 16).astype(np.float32), labels.astype(np.int32)


def classifier(policy, config=None) -> Any:
    keras.utils.set_random_seed(1)
    model: Any = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(32, activation="relu", dtype=policy),
            layers.EinsumDense("ab,bc->ac", 10, bias_axes="c", dtype=policy),
        ]
    )
    for layer in model.layers if config else ():
        layer.quantize(config=config)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    return model


@pytest.mark.slow
def test_training_on_digits_reaches_the_float_loss_and_round_trips_through_files(tmp_path):
    inputs, labels, policy = *digits(), "mixed_bfloat16"
    plain, model = classifier(policy), classifier(policy, TRAINING)
    options = {"epochs": 4, "batch_size": 64, "shuffle": False, "verbose": 0}
    losses = [m.fit(inputs, labels, **options).history["loss"] for m in (plain, model)]
    assert losses[1][-1] < 0.3 < losses[1][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.07)
    first = model.layers[0]
    for name in ("inputs", "kernel", "outputs_grad"):
        history = np.asarray(getattr(first, f"{name}_amax_history"))
        steps = 4 * -(-len(inputs) // 64)
        assert np.count_nonzero(history) == steps + (name == "kernel")
        largest = 57344 if name == "outputs_grad" else 448
        scale = getattr(first, f"{name}_scale")
        np.testing.assert_allclose(scale, history.max() / largest, rtol=1e-6)

    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    fresh = classifier(policy)
    fresh.layers[0](inputs[:2])
    fresh.optimizer = None
    fresh.load_weights(tmp_path / "model.weights.h5")
    for other in (loaded, fresh):
        for found, held in zip(other.weights, model.weights, strict=True):
            np.testing.assert_array_equal(found, held)
    assert np.isfinite(loaded.fit(inputs, labels, verbose=0).history["loss"][0])


def test_weights_can_be_stored_in_one_byte_after_training():
    layer = layer_of("Dense")
    inputs = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)
    wanted = np.asarray(layer(inputs))
    layer.quantize(config=TRAINING)
    before = [np.asarray(v) for v in layer.variables]
    with pytest.raises(ValueError, match="already quantized"):
        layer.quantize(config=TRAINING)
    layer.kernel.assign(np.full((20, 7), np.nan))
    with pytest.raises(ValueError, match="NaN or Inf"):
        layer.quantize("int8")
    layer.kernel.assign(before[0])
    assert layer.trains_in_float8
    for found, held in zip(layer.variables, before, strict=True):
        np.testing.assert_array_equal(found, held)
    layer.quantize(config=Float8QuantizationConfig())
    assert [v.name for v in layer.variables] == ["bias", "kernel", "kernel_scale"]
    assert layer.quantized_weight("kernel").nbytes == 20 * 7 + 4 * 7
    assert np.linalg.norm(layer(inputs) - wanted) < 0.06 * np.linalg.norm(wanted)
    with pytest.raises(ValueError, match="already quantized"):
        layer.quantize("int8")


def test_another_mode_can_follow_training():
    layer = layer_of("EinsumDense", dtype="mixed_bfloat16")
    layer.quantize(config=TRAINING)
    layer.quantize("int8")
    assert layer.dtype_policy.name == "int8_from_mixed_bfloat16"
    assert layer.quantized_weight("kernel").codes.dtype == jnp.int8


def test_layers_that_cannot_train_in_float8_raise():
    table: Any = layers.Embedding(9, 4)
    table.build((None, 3))
    with pytest.raises(NotImplementedError, match="cannot train in float8"):
        table.quantize(config=TRAINING)
    assert table.dtype_policy.name == "float32"

    adapted = layer_of("Dense")
    adapted.enable_lora(2)
    with pytest.raises(ValueError, match="without LoRA"):
        adapted.quantize(config=TRAINING)
    assert not adapted.trains_in_float8
    training = layer_of("Dense")
    training.quantize(config=TRAINING)
    with pytest.raises(ValueError, match="trains in float8"):
        training.enable_lora(2)

    broken = layer_of("Dense")
    broken.kernel.assign(np.full((20, 7), np.inf))
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        broken.quantize(config=TRAINING)
    assert [v.name for v in broken.variables] == ["kernel", "bias"]
