"""Defects of quantization in stock Keras 3.15 that jaxquant layers do not have.

One test per defect, except for two that tests of other files have:

- Quantized attention saves and does not load: test_model_is_near_the_float_one_* in
  test_attention.py; for composed layers such as Bidirectional, in test_layers.py.
- There is no quantized Conv, Depthwise, Separable or recurrent layer: rows of test_layers.py.
"""

from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest

from jaxquant.keras import (
    AbsMaxQuantizer,
    Float8QuantizationConfig,
    Int4QuantizationConfig,
    Int8QuantizationConfig,
    layers,
)

from .test_guides import SimpleScale
from .test_layers import relative_error


def some_inputs(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def dense_with(kernel, **arguments) -> Any:
    layer: Any = layers.Dense(kernel.shape[1], **arguments)
    layer.build((None, kernel.shape[0]))
    layer.kernel.assign(kernel)
    return layer


@pytest.mark.parametrize("mean", [10, 100])
def test_default_int4_is_accurate_for_groups_that_do_not_straddle_zero(mean):
    kernel = np.random.default_rng(0).normal(size=(256, 64)) + mean
    layer, inputs = dense_with(kernel.astype(np.float32)), np.abs(some_inputs(8, 256))
    layer.quantize("int4")
    assert relative_error(layer.kernel, kernel) < 0.06
    assert relative_error(layer(inputs), inputs @ kernel) < 0.06


@pytest.mark.parametrize("block_size, bound", [(4, 0.07), (1, 0.01)])
def test_int4_error_shrinks_with_the_block_size(block_size, bound):
    keras.utils.set_random_seed(0)
    layer: Any = layers.Dense(9)
    layer.build((None, 40))
    kernel = np.asarray(layer.kernel)
    layer.quantize(config=Int4QuantizationConfig(block_size=block_size))
    assert relative_error(layer.kernel, kernel) < bound


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("mode, bound", [("int8", 0.02), ("int4", 0.15), ("float8", 0.07)])
def test_time_distributed_layers_use_weights_and_not_codes(mode, bound):
    keras.utils.set_random_seed(0)
    dense = layers.Dense(9, bias_initializer="normal")
    model: Any = keras.Sequential([keras.Input((5, 40)), keras.layers.TimeDistributed(dense)])
    inputs = some_inputs(4, 5, 40)
    wanted = np.asarray(model(inputs))
    model.quantize(mode)
    assert dense.quantization_mode == mode
    assert 0 < relative_error(model(inputs), wanted) < bound


class ReadsKernel(keras.layers.Layer):
    """A parent that uses the kernel of its child."""

    def __init__(self):
        super().__init__()
        self.child: Any = layers.Dense(9)

    def build(self, input_shape):
        self.child.build(input_shape)

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.child.kernel)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("mode, bound", [("int8", 0.01), ("int4", 0.15), ("float8", 0.05)])
def test_the_kernel_of_a_quantized_layer_is_its_weight(mode, bound):
    keras.utils.set_random_seed(0)
    parent, inputs = ReadsKernel(), some_inputs(4, 40)
    wanted = np.asarray(parent(inputs))
    kernel = np.asarray(parent.child.kernel)
    parent.child.quantize(mode)
    assert 0 < relative_error(parent.child.kernel, kernel) < bound
    assert 0 < relative_error(parent(inputs), wanted) < bound


class RaisesLate(layers.Dense):
    def _int8_build(self, shape, name=None):
        super()._int8_build(shape)
        raise RuntimeError("too late")


def test_a_failed_quantize_leaves_the_layer_in_float():
    keras.utils.set_random_seed(0)
    layer: Any = RaisesLate(9)
    layer.build((None, 40))
    inputs = some_inputs(4, 40)
    wanted, kernel = np.asarray(layer(inputs)), layer.kernel
    with pytest.raises(RuntimeError, match="too late"):
        layer.quantize("int8")
    assert layer.kernel is kernel
    assert (layer.dtype_policy.name, kernel.dtype) == ("float32", "float32")
    assert [v.name for v in layer.trainable_weights] == ["kernel", "bias"]
    assert len(layer.weights) == 2
    np.testing.assert_array_equal(layer(inputs), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [Int8QuantizationConfig(), Float8QuantizationConfig(training=True)]
)
def test_compile_fit_quantize_fit_needs_no_second_compile(config):
    keras.utils.set_random_seed(0)
    model: Any = keras.Sequential([keras.Input((40,)), layers.Dense(9)])
    inputs, targets = some_inputs(8, 40), some_inputs(8, 9)
    model.compile("sgd", loss="mse")
    losses = model.fit(inputs, targets, verbose=0).history["loss"]
    wanted = np.asarray(model(inputs))
    model.quantize(config=config)
    assert 0 < relative_error(model(inputs), wanted) < 0.07
    # Weights in int8 do not train.
    trains = isinstance(config, Float8QuantizationConfig)
    with nullcontext() if trains else pytest.warns(UserWarning, match="was compiled before 1 of"):
        losses += model.fit(inputs, targets, epochs=2, verbose=0).history["loss"]
    assert losses == sorted(losses, reverse=True)
    assert all(np.isfinite(np.asarray(v)).all() for v in model.weights)


def test_int4_with_a_weight_quantizer_saves_and_loads(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((40,)), layers.Dense(9)])
    inputs = some_inputs(4, 40)
    quantizer = AbsMaxQuantizer(axis=0, value_range=(-8, 7), output_dtype="int8")
    model.quantize(config=Int4QuantizationConfig(quantizer, None, block_size=32))
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), model(inputs))
    assert loaded.layers[0].quantization_config.weight_quantizer.value_range == (-8, 7)


@pytest.mark.parametrize("size", [1e-30, 1e10])
@pytest.mark.parametrize("mode, bound", [("int8", 0.01), ("int4", 0.15), ("float8", 0.05)])
def test_small_weights_keep_their_relative_precision(size, mode, bound):
    kernel = (some_inputs(40, 9) * size).astype(np.float32)
    layer = dense_with(kernel)
    layer.quantize(mode)
    assert relative_error(layer.kernel, kernel) < bound


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("policy", ["float16", "mixed_bfloat16"])
@pytest.mark.parametrize("mode, bound", [("int8", 0.01), ("int4", 0.15), ("float8", 0.05)])
def test_scales_stay_accurate_under_every_policy(policy, mode, bound):
    kernel = some_inputs(40, 9) * 1e-3
    layer = dense_with(kernel, dtype=policy)
    if layer.compute_dtype == "float16" and mode == "int8":
        with pytest.raises(ValueError, match=r"float32 or bfloat16 to be quantized to int8"):
            layer.quantize(mode)
        return
    kernel = np.asarray(layer.kernel, np.float32)
    layer.quantize(mode)
    assert layer.stored_weights["kernel"].variables[1].dtype == "float32"
    assert relative_error(np.asarray(layer.kernel, np.float32), kernel) < bound


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_error_for_non_finite_weights_names_them(mode, value):
    kernel = some_inputs(40, 9)
    kernel[3, 4] = value
    layer = dense_with(kernel, name="broken")
    with pytest.raises(ValueError, match=r"broken/kernel holds NaN or Inf; got shape \(40, 9\)"):
        layer.quantize(mode)
    assert layer.quantization_mode is None
    np.testing.assert_array_equal(layer.kernel, kernel)


@pytest.mark.parametrize("size", [1e-3, 1, 1e4])
def test_float8_needs_no_calibration_and_stores_one_byte_per_weight(size):
    layer, inputs = dense_with(some_inputs(40, 9)), some_inputs(8, 40) * np.float32(size)
    wanted = np.asarray(layer(inputs))
    layer.quantize("float8")
    assert 0 < relative_error(layer(inputs), wanted) < 0.07
    codes, scale = layer.stored_weights["kernel"].variables
    assert codes.value.nbytes == 40 * 9
    assert scale.shape in [(1, 9), (9, 1)]


@pytest.mark.parametrize("mode, bound", [("int8", 0.02), ("int4", 0.15), ("float8", 0.07)])
@pytest.mark.parametrize("equation", ["...x,xy->...y", "abx,xy->aby"])
def test_einsum_dense_with_an_ellipsis(equation, mode, bound):
    keras.utils.set_random_seed(0)
    layer: Any = layers.EinsumDense(equation, (None, 9) if "..." not in equation else 9)
    inputs = some_inputs(4, 5, 40)
    wanted = np.asarray(layer(inputs))
    layer.quantize(mode)
    assert 0 < relative_error(layer(inputs), wanted) < bound


class Scaled(layers.Dense):
    """A subclass, which stock Keras skips."""

    def call(self, inputs, training=None):
        return 3 * super().call(inputs)


def test_subclasses_of_dense_are_quantized():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((40,)), Scaled(9)])
    inputs = some_inputs(4, 40)
    wanted = np.asarray(model(inputs))
    model.quantize("int8")
    assert model.layers[0].quantization_mode == "int8"
    assert 0 < relative_error(model(inputs), wanted) < 0.02


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_a_reloaded_simple_scale_is_not_quantized_again(mode, tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), SimpleScale()])
    inputs = some_inputs(3, 6)
    model.quantize(mode)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="already quantized"):
        loaded.layers[0].quantize(mode)
    # Setting the policy must not quantize either.
    loaded.layers[0].dtype_policy = loaded.layers[0].dtype_policy
    np.testing.assert_array_equal(loaded(inputs), model(inputs))


@pytest.mark.parametrize("make", [SimpleScale, lambda: layers.Dense(9)], ids=["scale", "dense"])
def test_a_quantized_weights_file_in_a_float_model(make, tmp_path):
    models = []
    for seed in (0, 1):
        keras.utils.set_random_seed(seed)
        models += [keras.Sequential([keras.Input((40,)), make()])]
    quantized, fresh = models
    inputs = some_inputs(3, 40)
    quantized.quantize("int8")
    quantized.save_weights(tmp_path / "model.weights.h5")
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(fresh(inputs), quantized(inputs))
    assert fresh.layers[0].quantization_mode == "int8"


@pytest.mark.parametrize("kind", [AbsMaxQuantizer, keras.quantizers.AbsMaxQuantizer])
def test_configs_printed_in_the_guides_work(kind):
    # No block_size, which stock Keras rejects since its default became 128.
    weights = kind(value_range=(-8, 7), output_dtype="int8", axis=0)
    config = Int4QuantizationConfig(weight_quantizer=weights, activation_quantizer=None)
    layer = dense_with(some_inputs(40, 9))
    kernel = np.asarray(layer.kernel)
    layer.quantize(config=config)
    assert 0 < relative_error(layer.kernel, kernel) < 0.15
    assert Int8QuantizationConfig(kind(axis=0, value_range=(-100, 100))).mode == "int8"


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_a_model_with_nan_in_one_kernel_is_not_partially_quantized(mode):
    parts: list[Any] = [layers.Dense(4, name=name) for name in ("first", "second", "third")]
    model: Any = keras.Sequential([keras.Input((6,)), *parts])
    kernel = np.array(parts[1].kernel)
    kernel[0, 0] = np.nan
    parts[1].kernel.assign(kernel)
    with pytest.raises(ValueError, match="second/kernel holds NaN or Inf"):
        model.quantize(mode)
    assert [x.quantization_mode for x in parts] == [None, None, None]
    # A layer excluded by Keras' filters is not checked.
    model.quantize(mode, filters="first|third")
    assert [x.quantization_mode for x in parts] == [mode, None, mode]
