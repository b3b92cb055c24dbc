"""Keras quantizers: jaxquant's in stock layers, and stock and custom ones in jaxquant's layers."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from jaxquant import INT4, INT8, AbsMax, ArrayConfig, MinMSE, Percentile, quantize
from jaxquant.keras import (
    AbsMaxQuantizer,
    Int4QuantizationConfig,
    Int8QuantizationConfig,
    PercentileQuantizer,
    Quantizer,
    layers,
)
from jaxquant.keras.quantizers import QuantizerRange, as_array_config

from .test_layers import relative_error

_register = keras.saving.register_keras_serializable(package="test_quantizers")


@_register
class MinMSEQuantizer(Quantizer):
    """A custom quantizer with a range."""

    @property
    def range(self):
        return MinMSE()


@_register
class HalfQuantizer(keras.quantizers.Quantizer):
    """A custom quantizer whose largest code represents half of the largest magnitude."""

    def __init__(self, share=0.5, value_range=(-127, 127), output_dtype="int8"):
        super().__init__(output_dtype)
        self.share, self.value_range = share, value_range

    def __call__(self, x, axis=0, to_numpy=False):
        peak: Any = keras.ops.max(keras.ops.abs(x), axis=axis, keepdims=True)
        scale = self.value_range[1] / (self.share * peak)
        codes = keras.ops.clip(keras.ops.round(x * scale), *self.value_range)
        return keras.ops.cast(codes, self.output_dtype), scale

    def get_config(self):
        return {
            "share": self.share,
            "value_range": self.value_range,
            "output_dtype": self.output_dtype,
        }


class Truncating(HalfQuantizer):
    """Does not round to the nearest code."""

    def __call__(self, x, axis=0, to_numpy=False):
        _, scale = super().__call__(x, axis)
        return keras.ops.cast(keras.ops.clip(x * scale, *self.value_range), "int8"), scale


class WithoutAxes(HalfQuantizer):
    """Its scale has lost the axes it is shared along."""

    def __call__(self, x, axis=0, to_numpy=False):
        codes, scale = super().__call__(x, axis)
        return codes, keras.ops.squeeze(scale, axis)


OURS = {
    "abs-max": AbsMaxQuantizer,
    "percentile": lambda **kw: PercentileQuantizer(percentile=99, **kw),
    "own": MinMSEQuantizer,
}


def kernel_of(layer, values):
    layer.build((None, values.shape[0]))
    layer.kernel.assign(values)
    return layer


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CALLS = [(name, "float32", 0) for name in OURS]
CALLS += [("own", "bfloat16", 0), ("abs-max", "float16", 0)]
CALLS += [("own", "float32", axis) for axis in (-1, (0, 1), None)]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(("name", "dtype", "axis"), CALLS)
def test_codes_are_rounded_with_the_returned_scale(name, dtype, axis):
    x = jnp.asarray(draw(40, 6).astype(dtype))
    quantizer = OURS[name](axis=0, value_range=(-100, 100))
    codes, scale = quantizer(x) if axis is None else quantizer(x, axis=axis)

    axis = 0 if axis is None else axis
    shape = [1 if i in np.atleast_1d(axis) % 2 else n for i, n in enumerate(x.shape)]
    assert (codes.dtype, scale.dtype, scale.shape) == (jnp.int8, x.dtype, tuple(shape))
    exact = np.asarray(x, np.float64) * np.asarray(scale, np.float64)
    assert np.abs(np.clip(exact, -100, 100) - np.asarray(codes)).max() <= 0.5001
    config = ArrayConfig(range=quantizer.range, value_range=(-100, 100))
    step = np.asarray(quantize(x, config, axis).scale, np.float64)
    np.testing.assert_allclose(np.asarray(scale, np.float64) * step, 1, rtol=5e-3)


def test_a_scale_too_large_for_float16_is_clipped():
    x = jnp.asarray((draw(40, 6) * 3e-4).astype(np.float16))
    codes, scale = AbsMaxQuantizer(axis=0)(x)
    assert relative_error(np.asarray(codes, np.float64) / np.asarray(scale, np.float64), x) < 0.03


@pytest.mark.parametrize("name", OURS)
def test_quantizers_round_trip_through_their_configs(name):
    quantizer = OURS[name](axis=(0, 1), value_range=(-8, 7), output_dtype="int8")
    for saved in (
        type(quantizer).from_config(quantizer.get_config()),
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(quantizer)),
    ):
        assert type(saved) is type(quantizer)
        assert saved.get_config() == quantizer.get_config()
        assert saved.array_config(INT4) == quantizer.array_config(INT4)


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "policy", "mode"),
    [
        ("abs-max", "float32", "int8"),
        ("percentile", "mixed_bfloat16", "int8"),
        ("own", "float32", "int4"),
    ],
)
def test_jaxquant_quantizers_work_in_stock_layers(name, policy, mode, tmp_path):
    value_range = (-100, 100) if mode == "int8" else (-8, 7)
    weights = OURS[name](axis=0, value_range=value_range)
    stock: Any = keras.quantizers
    configs: dict[str, Any] = {
        "int8": lambda: stock.Int8QuantizationConfig(weights, OURS[name]()),
        "int4": lambda: stock.Int4QuantizationConfig(weights, None, **per_channel()),
    }
    kernel, inputs = draw(64, 9), draw(5, 64, seed=1)
    dense: Any = keras.layers.Dense(9, dtype=policy)
    model = keras.Sequential([keras.Input((64,)), dense])
    dense.kernel.assign(kernel)
    wanted = np.asarray(model(inputs), np.float32)
    model.quantize(config=configs[mode]())

    codes = dense._kernel.value if mode == "int8" else None
    if codes is not None:
        np.testing.assert_array_equal(np.abs(codes).max(axis=0), 100)
    found = model(inputs)
    assert found.dtype == dense.compute_dtype
    bound = {"int8": 0.12 if name == "percentile" else 0.03, "int4": 0.25}[mode]
    assert relative_error(np.asarray(found, np.float32), wanted) < bound
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        np.asarray(loaded(inputs), np.float32), np.asarray(found, np.float32)
    )


def per_channel():
    """The argument for stock int4 per channel, which is the only choice before Keras 3.14."""
    names = keras.quantizers.Int4QuantizationConfig.__init__.__code__.co_varnames
    return {"block_size": None} if "block_size" in names else {}


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("percentile", "int8"),
        ("own", "int8"),
        ("foreign", "int8"),
        ("foreign", "int4"),
        ("stock", "int4"),
    ],
)
def test_all_quantizers_work_in_jaxquant_layers(name, mode, tmp_path):
    value_range = (-100, 100) if mode == "int8" else (-7, 7)
    makers = {**OURS, "foreign": HalfQuantizer}
    if name == "stock":
        quantizer: Any = keras.quantizers.AbsMaxQuantizer(axis=0, value_range=value_range)
    else:
        quantizer = makers[name](value_range=value_range)
    inputs_quantizer = HalfQuantizer(0.9) if name == "foreign" else OURS["own"]()
    config = {
        "int8": lambda: Int8QuantizationConfig(quantizer, inputs_quantizer),
        "int4": lambda: Int4QuantizationConfig(quantizer, inputs_quantizer, block_size=32),
    }[mode]()
    layer: Any = layers.Dense(9)
    model = keras.Sequential([keras.Input((64,)), layer])
    layer.kernel.assign(draw(64, 9))
    before, inputs = np.asarray(layer.kernel), draw(5, 64, seed=1)
    wanted = np.asarray(model(inputs))
    model.quantize(config=config)

    q = layer.quantized_weight("kernel").reorder(None)
    codes = np.asarray(q.codes, np.int8)
    assert (codes.min(), codes.max()) == value_range
    assert layer.inputs_quantizer is inputs_quantizer
    if name == "foreign":
        groups = before.reshape(q.scale.shape[0], -1, 9)
        step = 0.5 * np.abs(groups).max(axis=1) / value_range[1]
        np.testing.assert_allclose(q.scale, step, rtol=1e-6)
    found = model(inputs)
    assert relative_error(found, wanted) < (0.5 if name == "foreign" else 0.25)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), found)
    assert type(loaded.layers[0].inputs_quantizer) is type(inputs_quantizer)


def test_jaxquant_and_stock_quantizers_give_the_same_codes():
    kernel = draw(64, 9)
    found = []
    for make in (AbsMaxQuantizer, keras.quantizers.AbsMaxQuantizer):
        layer: Any = kernel_of(layers.Dense(9), kernel)
        layer.quantize(config=Int8QuantizationConfig(make(axis=0, value_range=(-90, 90)), None))
        found += [layer.quantized_weight("kernel").codes]
    np.testing.assert_array_equal(*found)


def test_the_range_of_a_custom_quantizer_works_inside_jit():
    config = ArrayConfig(range=QuantizerRange(HalfQuantizer(), 127))
    x = jnp.asarray(draw(40, 6))
    q = jax.jit(quantize)(x, config)
    np.testing.assert_allclose(q.scale[0], np.abs(x).max(axis=0) / 254, rtol=1e-6)
    scale = np.asarray(q.scale)
    halved = np.clip(x, -127 * scale, 127 * scale)
    assert (np.abs(np.asarray(q.dequantize()) - halved) / scale).max() <= 0.5001


@pytest.mark.parametrize("kind", [Truncating, WithoutAxes])
def test_a_quantizer_that_does_more_than_choose_a_scale_raises(kind):
    wanted = rf"{kind.__name__} must return \(codes, scale\) with codes = clip\(round\(x \*"
    with pytest.raises(ValueError, match=wanted):
        as_array_config(kind(), INT8)
    with pytest.raises(ValueError, match=wanted):
        Int8QuantizationConfig(activation_quantizer=kind())


def test_a_quantizer_without_axes_raises():
    with pytest.raises(ValueError, match=r"must be called as quantizer\(x, axis=-1\).*; got Type"):
        as_array_config(keras.quantizers.Quantizer(), INT8)


@pytest.mark.parametrize("wrong", [AbsMax(), 8, AbsMaxQuantizer, lambda x: x, INT8])
def test_objects_that_are_not_quantizers_raise(wrong):
    wanted = r"A quantizer must be a keras\.quantizers\.Quantizer; got "
    with pytest.raises(ValueError, match=wanted):
        Int8QuantizationConfig(weight_quantizer=wrong)
    with pytest.raises(ValueError, match=wanted):
        Int4QuantizationConfig(activation_quantizer=wrong)


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        ({"value_range": (-200, 100)}, r"two ascending ints within \[-128, 127\].*got \(-200, 100"),
        ({"value_range": (5, 3)}, r"two ascending ints.*got \(5, 3\)"),
        ({"value_range": (-1.5, 3)}, r"two ascending ints.*got \(-1\.5, 3\)"),
        ({"value_range": (1, 5)}, r"needs qmin < 0 < qmax; got 1 to 5"),
        ({"value_range": 127}, r"value_range must be a pair .*; got 127"),
        ({"value_range": (-1, 0, 1)}, r"value_range must be a pair .*; got \(-1, 0, 1\)"),
        ({"axis": 1.5}, r"axis must be an int.*got 1\.5"),
        ({"output_dtype": "float32"}, r"output_dtype must .*; got 'float32'"),
        ({"output_dtype": "nothing"}, r"output_dtype must .*; got 'nothing'"),
    ],
)
def test_arguments_are_checked(arguments, wanted):
    for kind in (AbsMaxQuantizer, PercentileQuantizer):
        with pytest.raises(ValueError, match=wanted):
            kind(**arguments)


def test_percentiles_are_checked():
    with pytest.raises(ValueError, match=r"p must be above 50 and at most 100 .*; got 30"):
        PercentileQuantizer(30)
    assert PercentileQuantizer(99).range == Percentile(99)


def test_a_range_must_be_given_and_fit_the_format():
    with pytest.raises(NotImplementedError, match="Quantizer must define `range`"):
        Quantizer()
    with pytest.raises(ValueError, match=r"within \[-8, 7\] for int4; got \(-127, 127\)"):
        AbsMaxQuantizer().array_config(INT4)
