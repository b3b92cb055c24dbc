"""Convolutions on codes give the results of Keras."""

import functools
import re
from typing import Any

import jax
import keras
import numpy as np
import pytest

from jaxquant import INT8, NVFP4A16, ArrayConfig, Rule, Scheme, quantize
from jaxquant.keras import (
    Int4QuantizationConfig,
    Int8QuantizationConfig,
    QuantizationConfig,
    layers,
)

from .convolution_cases import CONVOLUTION
from .test_layers import relative_error

WEIGHTS_ONLY = Int8QuantizationConfig(activation_quantizer=None)
FORMATS = ["channels_last", "channels_first"]
UNKNOWN_TO_STOCK = ["quantization_config", "lora_rank", "lora_alpha"]
STRIDES, DILATION = ("channels_last", {"strides": 2}), ("channels_first", {"dilation_rate": 2})


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def images(shape, seed=0):
    return np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)


def built(layer, shape):
    """The layer, with random weights and biases."""
    layer.build((None, *shape))
    rng = np.random.default_rng(1)
    layer.set_weights([rng.normal(size=v.shape).astype(np.float32) for v in layer.weights])
    return layer


def stock_of(layer):
    """The Keras layer of the same arguments and weights, dequantized."""
    config = {k: v for k, v in layer.get_config().items() if k not in UNKNOWN_TO_STOCK}
    stock = getattr(keras.layers, type(layer).__name__)(**{**config, "dtype": "float32"})
    stock = built(stock, layer.get_build_config()["input_shape"][1:])
    names = [*layer.declared_weights, *(["bias"] if layer.use_bias else [])]
    stock.set_weights([np.asarray(getattr(layer, name)) for name in names])
    return stock


def assert_like_stock(layer, inputs, config: Any = WEIGHTS_ONLY):
    """Equal bit for bit in float, and up to the order of summation on codes."""
    np.testing.assert_array_equal(layer(inputs), stock_of(layer)(inputs))
    layer.quantize(config=config)
    assert relative_error(layer(inputs), stock_of(layer)(inputs)) < 1e-5


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("padding", "rest"), [("same", STRIDES), ("valid", DILATION), ("causal", DILATION)], ids=str
)
def test_convolution_equals_that_of_the_dequantized_kernel(padding, rest):
    data_format, step = rest
    shape = (9, 6) if data_format == "channels_last" else (6, 9)
    layer = layers.Conv1D(4, 3, padding=padding, data_format=data_format, groups=2, **step)
    assert_like_stock(built(layer, shape), images(shape))


@pytest.mark.some_rows(1)
@pytest.mark.parametrize(
    ("kind", "rest"),
    [("DepthwiseConv2D", STRIDES), ("DepthwiseConv2D", DILATION), ("SeparableConv2D", DILATION)],
    ids=str,
)
def test_depthwise_equals_that_of_the_dequantized_kernel(kind, rest):
    data_format, step = rest
    shape = (7, 9, 5) if data_format == "channels_last" else (5, 7, 9)
    options = {"data_format": data_format, "depth_multiplier": 2, "padding": "same", **step}
    filters = {"SeparableConv2D": {"filters": 4}}.get(kind, {})
    layer = getattr(layers, kind)(kernel_size=(2, 3), **filters, **options)
    assert_like_stock(built(layer, shape), images(shape))


# Padding, (strides, dilation, output padding): the latter is less than the strides.
UPSAMPLING = [
    ("valid", (2, 1, 1)),
    ("same", (2, 1, 1)),
    ("same", (1, 1, 0)),
    ("valid", (3, 1, 0)),
    ("same", (1, 2, None)),
]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(("padding", "step"), UPSAMPLING, ids=str)
def test_transpose_equals_that_of_the_dequantized_kernel(padding, step):
    strides, dilation, output_padding = step
    data_format = FORMATS[strides % 2]
    shape = (4, 5, 3) if data_format == "channels_last" else (3, 4, 5)
    layer = layers.Conv2DTranspose(
        filters=5,
        kernel_size=(4, 3),
        strides=strides,
        dilation_rate=dilation,
        padding=padding,
        output_padding=output_padding,
        data_format=data_format,
    )
    assert_like_stock(built(layer, shape), images(shape))


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("kind", ["Conv3D", "Conv3DTranspose", "Conv1DTranspose"])
def test_other_ranks_equal_those_of_the_dequantized_kernel(kind):
    rank = int(kind[4])
    shape = (*(5, 6, 4)[:rank], 3)
    layer = getattr(layers, kind)(4, (2, 3, 1)[:rank], strides=(1, 2, 3)[:rank], padding="same")
    assert_like_stock(built(layer, shape), images(shape))


def kernel_scheme(scheme, axis):
    return QuantizationConfig([Rule("*kernel", scheme, axis=axis)])


PER_CHANNEL = Scheme(ArrayConfig(format=INT8))
# Scales shared by channels or multipliers, grouped scales, and nested scales.
DEPTHWISE = {
    "padded": Int4QuantizationConfig(block_size=3),
    "of multipliers": kernel_scheme(PER_CHANNEL, (0, 1)),
    "of channels": kernel_scheme(PER_CHANNEL, (0, 2)),
    "of all": QuantizationConfig(Scheme(ArrayConfig(format=INT8, per_tensor=True))),
    "scaled scales": QuantizationConfig(NVFP4A16),
}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", DEPTHWISE)
def test_depthwise_supports_scales_of_any_shape(name):
    layer = built(layers.DepthwiseConv1D(16, depth_multiplier=3), (20, 4))
    assert_like_stock(layer, images((20, 4)), DEPTHWISE[name])


@pytest.mark.some_rows(1)
@pytest.mark.parametrize(
    ("kind", "block_size", "kernel_size"),
    [("Conv2D", 11, 1), ("Conv2D", 4, 3), ("Conv2DTranspose", 2, 3), ("Conv2DTranspose", 4, 3)],
)
def test_flipped_and_padded_kernels_with_blocks(kind, block_size, kernel_size):
    layer = built(getattr(layers, kind)(3, kernel_size), (5, 4, 66))
    assert_like_stock(layer, images((5, 4, 66)), Int4QuantizationConfig(block_size=block_size))


def test_integer_images_are_supported():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3)).astype(np.uint8)
    layer = built(layers.Conv2D(4, 3), (6, 5, 3))
    assert_like_stock(layer, pixels)


def convolutions(layer, inputs, platform):
    """Operand and result dtypes of each convolution in the compiled layer: ["i8", "i8", "i32"]."""
    traced = jax.jit(lambda x: layer(x)).trace(inputs)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    return [re.findall(r"tensor<(?:\d+x)*(\w+)>", line.rsplit(" : ", 1)[1]) for line in lines]


@functools.cache
def in_int8(case):
    """The layer of a case, quantized; for tests that do not change it."""
    layer = built(case.make(), case.input_shape)
    layer.quantize("int8")
    return layer


@pytest.mark.some_rows(2)
@each(CONVOLUTION)
def test_int8_accumulates_in_int32(case):
    layer = in_int8(case)
    wanted = [["i8", "i8", "i32"]] * len(layer.declared_weights)
    assert convolutions(layer, images(case.input_shape), "tpu") == wanted
    # On CPU where XLA is fast: channels last, one or two axes, not transposed. Depthwise ones are
    # sums of shifted images there.
    is_fast = layer.rank < 3 and "first" not in layer.data_format
    if is_fast and "Transpose" not in case.name:
        is_depthwise = case.name.startswith(("Depthwise", "Separable"))
        found = convolutions(layer, images(case.input_shape), "cpu")
        assert found == wanted[is_depthwise:]


@pytest.mark.some_rows(1)
@each([CONVOLUTION[i] for i in (0, 1, 4, 7)])  # One of each family.
def test_int8_scales_are_per_image(case):
    inputs = images(case.input_shape)
    inputs[1] *= 100
    layer = in_int8(case)
    rounded = quantize(inputs, ArrayConfig(), axis=tuple(range(1, inputs.ndim))).dequantize()
    assert relative_error(layer(inputs), stock_of(layer)(rounded)) < 1e-5


@pytest.mark.some_rows(1)
@each([case for case in CONVOLUTION if "2D" in case.name])
def test_lora_adds_to_the_quantized_convolution(case):
    layer = built(case.make(), case.input_shape)
    layer.quantize(config=WEIGHTS_ONLY)
    inputs = images(case.input_shape)
    before = layer(inputs)
    layer.enable_lora(2, lora_alpha=3)
    np.testing.assert_allclose(layer(inputs), before, rtol=1e-5, atol=1e-5)
    name = next(iter(layer.declared_weights))
    b = getattr(layer, f"lora_{name}_b")
    b.assign(np.random.default_rng(2).normal(size=b.shape))
    assert relative_error(layer(inputs), before) > 0.01
    assert relative_error(layer(inputs), stock_of(layer)(inputs)) < 1e-5


def test_lora_on_codes_trains_saves_and_loads(tmp_path):
    shape = (6, 7, 3)
    model: Any = keras.Sequential([keras.Input(shape), layers.Conv2D(4, 3, lora_rank=2)])
    inputs, layer = images(shape), model.layers[0]
    targets = np.asarray(model(inputs)) * 1.5
    layer.quantize("int8")
    codes = np.asarray(layer.quantized_weight("kernel").codes)
    assert {v.name for v in layer.trainable_variables} == {"bias", "lora_kernel_a", "lora_kernel_b"}

    model.compile(keras.optimizers.Adam(0.05), "mse")
    losses = model.fit(inputs, targets, epochs=30, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(layer.quantized_weight("kernel").codes, codes)

    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), model(inputs))


def test_a_file_keeps_the_output_padding(tmp_path):
    layer = layers.Conv2DTranspose(2, 3, strides=3, output_padding=(2, 0))
    model: Any = keras.Sequential([keras.Input((4, 5, 3)), layer])
    layer.quantize("int8")
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    inputs = images((4, 5, 3))
    np.testing.assert_array_equal(loaded(inputs), model(inputs))


def test_an_image_smaller_than_the_kernel_raises():
    layer = built(layers.Conv2D(4, 3), (None, None, 3))
    layer.quantize("int8")
    with pytest.raises(ValueError, match="images at least as large as its kernel; got shape"):
        layer(images((2, 5, 3)))


class Standardized(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - keras.ops.mean(kernel, axis=(0, 1, 2)))


def test_a_convolution_op_of_a_subclass_gets_the_dequantized_kernel():
    inputs = images((5, 6, 3))
    layer: Any = built(Standardized(4, 3), (5, 6, 3))
    wanted = layer(inputs)
    layer.quantize("int8")
    assert relative_error(layer(inputs), wanted) < 0.01
    kernel = layer.kernel - keras.ops.mean(layer.kernel, axis=(0, 1, 2))
    stock = keras.ops.conv(inputs, kernel) + layer.bias
    assert relative_error(layer(inputs), stock) < 1e-5


@pytest.mark.parametrize(
    "size, groups, order", [(1, 1, (-1, -4, -3, -2)), (3, 1, None), ((1, 3), 1, None), (1, 2, None)]
)
def test_kernels_of_one_pixel_are_stored_as_matrices(size, groups, order):
    if jax.default_backend() == "tpu":
        pytest.skip("stored as it is there")
    layer = built(layers.Conv2D(8, size, groups=groups), (5, 5, 4))
    layer.quantize("int8")
    assert layer.quantized_weight("kernel").order == order
    separable = built(layers.SeparableConv2D(8, 3), (5, 5, 4))
    separable.quantize("int8")
    assert separable.quantized_weight("pointwise_kernel").order == (-1, -4, -3, -2)
    assert separable.quantized_weight("depthwise_kernel").order is None
