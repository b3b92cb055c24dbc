"""The examples of Keras' two guides on quantization, with jaxquant's classes.

"Customizing Quantization with QuantizationConfig" and "Writing quantization-compatible layers".
Changed are only what no JAX array has (`.numpy()`), and codes: `layer.kernel` is the weight that
they stand for, and they are `layer.quantized_weight("kernel").codes`.
"""

from typing import Any

import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import backend, dtype_policies, ops

import jaxquant
from jaxquant.keras import (
    AbsMaxQuantizer as OurAbsMaxQuantizer,
)
from jaxquant.keras import (
    Int4QuantizationConfig,
    Int8QuantizationConfig,
    QuantizableMixin,
    QuantizationConfig,
    QuantizedWeight,
    layers,
)

from .test_layers import relative_error

# Customizing quantization.

CONFIGS = [Int8QuantizationConfig, keras.quantizers.Int8QuantizationConfig]
QUANTIZERS = {"ours": OurAbsMaxQuantizer, "stock": keras.quantizers.AbsMaxQuantizer}


def get_model():
    """Builds a simple Sequential model for demonstration."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input(shape=(10,)), layers.Dense(32, activation="relu"), layers.Dense(1)]
    )


def inputs_for(model):
    return np.random.default_rng(0).normal(size=(64, *model.input_shape[1:])).astype(np.float32)


def codes_of(layer):
    return np.asarray(layer.quantized_weight("kernel").reorder(None).codes, np.int8)


def saved_and_loaded(model, path) -> Any:
    model.save(path / "model.keras")
    return keras.saving.load_model(path / "model.keras")


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("kind", "config"), [("ours", CONFIGS[0]), ("ours", CONFIGS[1]), ("stock", CONFIGS[1])]
)
def test_the_restricted_range_holds_for_weights_and_activations(kind, config, tmp_path):
    AbsMaxQuantizer, model = QUANTIZERS[kind], get_model()
    x = inputs_for(model)
    wanted = np.asarray(model(x))
    custom_int8_config = config(
        weight_quantizer=AbsMaxQuantizer(value_range=(-100, 100), axis=0),
        activation_quantizer=AbsMaxQuantizer(value_range=(-100, 100), axis=-1),
    )
    model.quantize(config=custom_int8_config)

    layer = model.layers[0]
    codes = layer.quantized_weight("kernel").codes
    assert codes.dtype == "int8"
    assert ops.all(ops.less_equal(codes, 100)), "Kernel values are not <= 100"
    assert ops.all(ops.greater_equal(codes, -100)), "Kernel values are not >= -100"
    assert ops.max(ops.abs(codes)) == 100
    # The activations too: the layer's output equals that of their codes.
    step = np.abs(x).max(axis=1, keepdims=True) / 100
    rounded = np.clip(np.round(x / step), -100, 100) * step
    expected = np.maximum(rounded @ np.asarray(layer.kernel), 0)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert relative_error(model(x), wanted) < 0.03
    np.testing.assert_array_equal(saved_and_loaded(model, tmp_path)(x), model(x))


@pytest.mark.slow
def test_int4_weights_only(tmp_path):
    AbsMaxQuantizer, model = QUANTIZERS["stock"], get_model()
    x = inputs_for(model)
    wanted = np.asarray(model(x))
    custom_int4_config = Int4QuantizationConfig(
        weight_quantizer=AbsMaxQuantizer(value_range=(-8, 7), output_dtype="int8", axis=0),
        activation_quantizer=None,
    )
    model.quantize(config=custom_int4_config)

    layer = model.layers[0]
    # Two codes per int8 byte.
    assert (layer.weights[1].dtype, layer.weights[1].shape) == ("int8", (32, 5))
    assert layer.inputs_quantizer is None
    assert np.abs(codes_of(layer)).max() == 7
    expected = np.maximum(x @ np.asarray(layer.kernel), 0)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert relative_error(model(x), wanted) < 0.2
    np.testing.assert_array_equal(saved_and_loaded(model, tmp_path)(x), model(x))


EPSILON = backend.epsilon()


@keras.saving.register_keras_serializable(package="test_guides")
class PercentileQuantizer(keras.quantizers.Quantizer):
    """Quantizes x using the percentile-based scale. Copied from the guide."""

    def __init__(
        self,
        percentile=99.9,
        value_range=(-127, 127),  # Default range for int8
        epsilon=EPSILON,
        output_dtype="int8",  # Default dtype for int8
    ):
        super().__init__(output_dtype=output_dtype)
        self.percentile = percentile
        self.value_range = value_range
        self.epsilon = epsilon

    def __call__(self, x, axis, to_numpy=False):
        """Quantizes x using the percentile-based scale."""
        # 1. Compute the percentile value of absolute inputs
        x_abs = ops.abs(x)
        if to_numpy:
            x_np: Any = ops.convert_to_numpy(x_abs)
            max_val = np.percentile(x_np, self.percentile, axis=axis, keepdims=True)
        else:
            max_val = ops.quantile(x_abs, self.percentile / 100, axis=axis, keepdims=True)
        # 2. Compute scale
        scale = ops.divide(self.value_range[1], ops.add(max_val, self.epsilon))
        if not to_numpy:
            scale = ops.cast(scale, backend.standardize_dtype(x.dtype))
        # 3. Quantize
        outputs = ops.multiply(x, scale)
        outputs = ops.clip(ops.round(outputs), self.value_range[0], self.value_range[1])
        outputs = ops.cast(outputs, self.output_dtype)
        return outputs, scale

    def get_config(self):
        """Returns the config of the quantizer for serialization support."""
        return {
            "percentile": self.percentile,
            "value_range": self.value_range,
            "epsilon": self.epsilon,
            "output_dtype": self.output_dtype,
        }


@pytest.mark.slow
def test_a_custom_quantizer_for_activations(tmp_path):
    AbsMaxQuantizer, model = QUANTIZERS["ours"], get_model()
    x = inputs_for(model)
    wanted = np.asarray(model(x))
    custom_int8_config = Int8QuantizationConfig(
        weight_quantizer=AbsMaxQuantizer(axis=0),
        activation_quantizer=PercentileQuantizer(percentile=99.9),
    )
    model.quantize(config=custom_int8_config)

    assert isinstance(model.layers[0].inputs_quantizer, PercentileQuantizer)
    assert relative_error(model(x), wanted) < 0.03
    loaded = saved_and_loaded(model, tmp_path)
    assert isinstance(loaded.layers[0].inputs_quantizer, PercentileQuantizer)
    np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.slow
def test_a_custom_quantizer_for_weights_too(tmp_path):
    model = get_model()
    x, kernel = inputs_for(model), np.asarray(model.layers[0].kernel)
    model.quantize(
        config=Int8QuantizationConfig(
            weight_quantizer=PercentileQuantizer(percentile=90),
            activation_quantizer=PercentileQuantizer(percentile=99.9),
        )
    )
    wanted, scale = PercentileQuantizer(percentile=90)(kernel, axis=0)
    codes = codes_of(model.layers[0])
    assert np.mean(np.abs(codes) == 127) > 0.1  # A percentile range clips values.
    assert np.abs(codes - np.asarray(wanted, np.int32)).max() <= 1
    q = model.layers[0].quantized_weight("kernel").reorder(None)
    np.testing.assert_allclose(1 / q.scale, np.asarray(scale), rtol=1e-5)
    np.testing.assert_array_equal(saved_and_loaded(model, tmp_path)(x), model(x))


# Writing quantization-compatible layers.


@keras.saving.register_keras_serializable(package="test_guides")
class SimpleScale(QuantizableMixin, keras.layers.Layer):
    """A layer that learns a per-feature scaling factor."""

    kernel = QuantizedWeight(axis=0)

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel", shape=(input_shape[-1],), initializer="random_uniform"
        )

    def call(self, inputs, training=None):
        return ops.multiply(inputs, self.kernel)


@keras.saving.register_keras_serializable(package="test_guides")
class HandWrittenScale(keras.layers.Layer):
    """The same with every hook written out, using the pure functions."""

    def build(self, input_shape):
        (input_dim,) = input_shape[1:]
        if self.quantization_mode:
            getattr(self, f"_{self.quantization_mode}_build")((input_dim,))
        else:
            self._kernel = self.add_weight(
                name="kernel", shape=(input_dim,), initializer="random_uniform"
            )

    def call(self, inputs, training=None):
        return ops.multiply(inputs, self._kernel)

    def compute_output_shape(self, input_shape):
        # With `call`, Keras would multiply with the packed kernel.
        return input_shape

    def quantize(self, mode, **kwargs):
        formats = {"int8": jaxquant.INT8, "int4": jaxquant.INT4}
        if mode not in formats:
            raise NotImplementedError(f"Unsupported quantization mode: {mode}")
        config = jaxquant.ArrayConfig(format=formats[mode])
        q = jaxquant.abs_max_quantize(self._kernel.value, config)
        kernel_shape = self._kernel.shape
        del self._kernel
        getattr(self, f"_{mode}_build")(kernel_shape)
        is_packed = config.format.bits == 4
        self._kernel.assign(jaxquant.pack_int4(q.codes, axis=0) if is_packed else q.codes)
        self.scale.assign(q.scale)
        # `_is_quantized` should be set before changing dtype policy to inform
        # the setter that quantized variables are initialized.
        self._is_quantized = True
        if self.dtype_policy.quantization_mode is None:
            self.dtype_policy = dtype_policies.get(f"{mode}_from_{self.dtype_policy.name}")

    def _int8_build(self, kernel_shape):
        self._kernel = self.add_weight(
            name="kernel", shape=kernel_shape, initializer="zeros", dtype="int8", trainable=False
        )
        self.scale = self.add_weight(
            name="scale", shape=(1,), initializer="ones", dtype="float32", trainable=False
        )

    def _int4_build(self, kernel_shape):
        # Metadata of the packed axis.
        (self._original_input_dim,) = kernel_shape
        self._int8_build((-(-self._original_input_dim // 2),))

    def _int8_call(self, inputs, training=None):
        return ops.multiply(ops.multiply(inputs, self._kernel), self.scale)

    def _int4_call(self, inputs, training=None):
        codes = jaxquant.unpack_int4(self._kernel.value, self._original_input_dim, axis=0)
        return ops.multiply(ops.multiply(inputs, codes), self.scale)

    def save_own_variables(self, store):
        for i, variable in enumerate(self._ordered()):
            store[str(i)] = variable

    def load_own_variables(self, store):
        for i, variable in enumerate(self._ordered()):
            variable.assign(store[str(i)])

    def _ordered(self):
        """None: kernel. Quantized: kernel, scale."""
        if not self.built:
            return []
        return [self._kernel] if self.quantization_mode is None else [self._kernel, self.scale]


SCALES: dict[str, Any] = {"mixin": SimpleScale, "by hand": HandWrittenScale}
BOUNDS = {"int8": 0.01, "int4": 0.15, "float8": 0.05}


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("name", "mode", "width"),
    [
        ("mixin", "int8", 7),
        ("mixin", "int4", 4),
        ("mixin", "int4", 7),
        ("mixin", "float8", 4),
        ("by hand", "int8", 4),
        ("by hand", "int4", 7),
    ],
)
def test_simple_scale_quantizes_saves_and_loads(name, mode, width, tmp_path):
    keras.utils.set_random_seed(1)
    x = np.random.default_rng(0).random((2, width)).astype("float32")
    model = keras.Sequential([keras.Input((width,)), SCALES[name]()])
    y_fp = np.asarray(model(x))
    model.quantize(mode)
    y_quantized = model(x)

    assert 0 < relative_error(y_quantized, y_fp) < BOUNDS[mode]
    assert model.layers[0].dtype_policy.name == f"{mode}_from_float32"
    np.testing.assert_array_equal(saved_and_loaded(model, tmp_path)(x), y_quantized)


@pytest.mark.parametrize("name", SCALES)
def test_both_versions_of_the_layer_agree(name):
    layer, x = SCALES[name](), np.random.default_rng(0).random((2, 4)).astype("float32")
    layer.build((None, 4))
    values = np.asarray([0.5, -1.0, 0.25, 0.125], np.float32)
    layer.weights[0].assign(values)
    layer.quantize("int8")
    expected = x * np.round(values * 127) / 127
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="already quantized"):
        layer.quantize("int8")
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6)


# The practical tips at the end of the guide.


def quantized_dense(mode="int8", width=10, units=3, config: Any = None) -> Any:
    layer = layers.Dense(units, bias_initializer="normal")
    layer.build((None, width))
    layer.quantize(mode if config is None else None, config=config)
    return layer


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_tip_no_float_kernel_is_allocated_on_reload(mode, monkeypatch):
    asked = []
    add_weight = keras.layers.Layer.add_weight

    def recording(self, *args, **kwargs):
        asked.append((kwargs["name"], kwargs.get("dtype")))
        return add_weight(self, *args, **kwargs)

    config = quantized_dense(mode).get_config()
    monkeypatch.setattr(keras.layers.Layer, "add_weight", recording)
    layers.Dense.from_config(config).build((None, 10))
    dtypes = dict(asked)
    assert dtypes.pop("kernel") in ("int8", "uint8")
    assert set(dtypes) == {"bias", "kernel_scale"} | ({"kernel_zero"} if mode == "int4" else set())


def test_tip_metadata_of_the_packed_axis_and_length():
    layer = quantized_dense("int4", width=9, units=5)
    stored = layer.stored_weights["kernel"]
    # Along the last stored axis, here logical axis 0: nine codes in five bytes.
    assert stored.codes.shape == (5, 5)
    assert stored.like.codes.shape == (5, 9)
    assert stored.like.order == (-1, -2)
    assert stored.shape == stored.like.shape == (9, 5)
    codes = layer.quantized_weight("kernel").codes.astype("int8")
    packed, _, _ = keras.quantizers.pack_int4(codes, axis=-1)
    np.testing.assert_array_equal(stored.codes, packed)


def test_tip_dequantizing_with_both_scales():
    layer = quantized_dense("int8", width=64)
    x = np.random.default_rng(0).normal(size=(2, 5, 64)) * [[[1]], [[90]]]
    x = x.astype(np.float32)
    q = layer.quantized_weight("kernel").reorder(None)
    inputs_scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    product = np.round(x / inputs_scale).astype(np.int64) @ np.asarray(q.codes, np.int64)
    expected = product * inputs_scale * np.asarray(q.scale) + np.asarray(layer.bias)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_tip_the_flag_is_set_before_the_policy(mode):
    seen = []

    class Watched(layers.Dense):
        @property
        def dtype_policy(self):
            return super().dtype_policy

        @dtype_policy.setter
        def dtype_policy(self, policy):
            seen.append((self._is_quantized, keras.dtype_policies.get(policy).name))
            super(Watched, type(self)).dtype_policy.fset(self, policy)

    layer: Any = Watched(3)
    layer.build((None, 10))
    layer.quantize(mode)
    assert seen == [(True, f"{mode}_from_float32")]
    # Only if the policy is a float policy: a reloaded layer already has the quantized policy.
    Watched.from_config(layer.get_config()).build((None, 10))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "mode, order",
    [
        (None, ["kernel", "bias"]),
        ("int8", ["kernel", "bias", "kernel_scale"]),
        ("int4", ["kernel", "bias", "kernel_scale", "kernel_zero"]),
        ("float8", ["kernel", "bias", "kernel_scale"]),
    ],
)
def test_tip_one_order_of_variables_per_mode(mode, order):
    layer: Any = layers.Dense(3, bias_initializer="normal")
    layer.build((None, 10))
    if mode:
        layer.quantize(mode)
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    assert sorted(set(store) - {"quantization"}) == [str(i) for i in range(len(order))]
    assert {v.name for v in layer.weights} == set(order)
    np.testing.assert_array_equal(store["1"], layer.bias)
    if mode:
        q = layer.quantized_weight("kernel").reorder(None)
        kernel, _, scale, *zero = (np.asarray(store[str(i)]) for i in range(len(order)))
        assert kernel.shape == ((10, 2) if mode == "int4" else (10, 3))
        stored_scale = 1 / q.scale[0] if mode == "int8" else q.scale
        np.testing.assert_allclose(scale, stored_scale, rtol=1e-6)
        assert [z.shape for z in zero] == [(1, 2)] * (mode == "int4")


def test_tip_the_mode_is_validated_first():
    class Untouched(SimpleScale):
        def quantized_values(self, *args, **kwargs):
            raise AssertionError("computed before the mode was checked")

    layer = Untouched()
    layer.build((None, 4))

    class Foreign(keras.quantizers.QuantizationConfig):
        @property
        def mode(self):
            return "int8"

    with pytest.raises(NotImplementedError, match=r"can be quantized to int8, int4 and float8; "):
        layer.quantize(config=Foreign())
    assert layer.quantization_mode is None


def test_tip_a_smoke_test_follows_quantizing():
    layer: Any = layers.Dense(3)
    layer.build((None, 10))
    layer.kernel.assign(np.full((10, 3), 1e10))
    config = QuantizationConfig(jaxquant.ArrayConfig(scale_dtype="float16"))
    with pytest.raises(ValueError, match=r"Quantizing \S+kernel would lose its values"):
        layer.quantize(config=config)
    assert layer.quantization_mode is None


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_tip_quantized_buffers_are_not_trainable(mode):
    layer = quantized_dense(mode)
    assert [v.name for v in layer.trainable_weights] == ["bias"]
    layer.trainable = False
    layer.trainable = True
    assert [v.name for v in layer.trainable_weights] == ["bias"]
    assert jnp.issubdtype(layer.stored_weights["kernel"].codes.value.dtype, jnp.integer)
