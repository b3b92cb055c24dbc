"""QuantizableMixin: failures change nothing, hooks, policies, files."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from keras import ops

from jaxquant import NF4A16, ArrayConfig
from jaxquant.keras import (
    AbsMaxQuantizer,
    Int4QuantizationConfig,
    Int8QuantizationConfig,
    QuantizableMixin,
    QuantizationConfig,
    QuantizedWeight,
    layers,
)

from .test_layers import relative_error

_register = keras.saving.register_keras_serializable(package="test_mixin")
MODES = ["int8", "int4", "float8"]
BOUNDS = {"int8": 0.02, "int4": 0.2, "float8": 0.07}


def some_inputs(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


INPUTS = some_inputs(4, 24)


def built(layer, width=24) -> Any:
    keras.utils.set_random_seed(0)
    layer.build((None, width))
    return layer


def dense(policy=None, **arguments):
    return built(layers.Dense(5, dtype=policy, bias_initializer="normal", **arguments))


def state(layer):
    """What a failing call must not change: outputs, variables, policy, attributes, files."""
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    return {
        "outputs": np.asarray(layer(INPUTS), np.float32).tobytes(),
        "variables": [(id(v), np.asarray(v).tobytes()) for v in layer.variables],
        "trainable": [id(v) for v in layer.trainable_weights],
        "policy": layer.dtype_policy.name,
        "mode": layer.quantization_mode,
        "config": layer.get_config(),
        "attributes": set(vars(layer)),
        "file": {k: np.asarray(v).tobytes() for k, v in store.items()},
    }


# Failures change nothing.


class RaisesHalfWay(layers.Dense):
    error = RuntimeError("half way")

    def _int8_build(self, shape, name=None):
        super()._int8_build(shape)
        self.extra = self.add_weight(name="extra", shape=(2,))
        self.note = "created"
        raise self.error


class MissesAName(layers.Dense):
    def _int8_build(self, shape, name=None):
        super()._int8_build(shape)
        self.missing.assign(1)  # pyright: ignore[reportAttributeAccessIssue]


class BuildsNothing(layers.Dense):
    def _int8_build(self, shape, name=None):
        pass


def with_kernel(change, layer=None):
    layer = dense() if layer is None else layer
    layer.kernel.assign(change(np.asarray(layer.kernel)))
    return layer


def replaced(value):
    def change(kernel):
        kernel = kernel.copy()
        kernel[3, 2] = value
        return kernel

    return change


HALF_SCALES = QuantizationConfig(ArrayConfig(scale_dtype="float16"))
FAILURES = {
    "NaN": (
        lambda: with_kernel(replaced(np.nan)),
        "int8",
        ValueError,
        r"dense\S*/kernel holds NaN",
    ),
    "Inf": (lambda: with_kernel(replaced(np.inf)), "int4", ValueError, r"kernel holds NaN or Inf"),
    "float8 NaN": (lambda: with_kernel(replaced(np.nan)), "float8", ValueError, r"holds NaN or"),
    "half way": (lambda: built(RaisesHalfWay(5)), "int8", RuntimeError, "half way"),
    "builds nothing": (
        lambda: built(BuildsNothing(5)),
        "int8",
        ValueError,
        r"BuildsNothing\._int8_build must create the variables of 'kernel'; got \[\]",
    ),
    # Keras' Model.quantize takes an AttributeError to mean that the layer lacks `quantize`.
    "missing name": (
        lambda: built(MissesAName(5)),
        "int8",
        RuntimeError,
        r"failed: 'MissesAName' object has no attribute 'missing'",
    ),
    "too large": (
        lambda: with_kernel(lambda x: x * 1e9),
        HALF_SCALES,
        ValueError,
        "would lose its",
    ),
    "too small": (
        lambda: with_kernel(lambda x: x * 1e-12),
        HALF_SCALES,
        ValueError,
        "would lose its",
    ),
    "gptq": (dense, "gptq", ValueError, "you must pass a `GPTQConfig`"),
    "awq": (dense, "awq", ValueError, r"must pass an `AWQConfig`|Invalid quantization mode"),
    "unknown mode": (dense, "int3", ValueError, r"Invalid quantization mode\. .*mode=int3"),
    "no mode": (dense, None, ValueError, "You must provide either `mode` or `config`"),
    "float16": (
        lambda: dense("float16"),
        "int8",
        ValueError,
        "got dtype_policy='float16', which computes in float16",
    ),
    "mixed_float16": (
        lambda: dense("mixed_float16"),
        "int8",
        ValueError,
        "Load the model with dtype='mixed_bfloat16', 'bfloat16' or 'float32', or quantize to int4",
    ),
}


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_quantize_does_not_change_the_layer(name):
    make, mode, kind, message = FAILURES[name]
    layer = make()
    before = state(layer)
    arguments = {"config": mode} if isinstance(mode, QuantizationConfig) else {"mode": mode}
    with pytest.raises(kind, match=message):
        layer.quantize(**arguments)
    assert state(layer) == before


@pytest.mark.parametrize(
    "layer",
    [lambda: with_kernel(replaced(np.nan)), lambda: built(RaisesHalfWay(5))],
    ids=["NaN", "half way"],
)
def test_an_invalid_policy_is_not_set(layer):
    layer = layer()
    before = state(layer)
    with pytest.raises((ValueError, RuntimeError), match=r"holds NaN|half way"):
        layer.dtype_policy = "int8_from_float32"
    assert state(layer) == before
    # Once it is fixed, it can be set.
    layer = with_kernel(np.nan_to_num, layer)
    if type(layer) is layers.Dense:
        layer.dtype_policy = "int8_from_float32"
        assert layer.quantization_mode == "int8"


def test_model_quantize_does_not_hide_attribute_errors_of_a_layer():
    model = keras.Sequential([keras.Input((24,)), MissesAName(5)])
    with pytest.raises(RuntimeError, match="no attribute 'missing'"):
        model.quantize("int8")


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("mode", MODES)
def test_quantizing_twice_raises(mode):
    layer = dense()
    layer.quantize(mode)
    before = state(layer)
    for again in MODES:
        with pytest.raises(ValueError, match=r"already quantized with dtype_policy"):
            layer.quantize(again)
    assert state(layer) == before


def test_quantizing_an_unbuilt_layer_raises():
    with pytest.raises(ValueError, match="Cannot quantize a layer that isn't yet built"):
        layers.Dense(3).quantize("int8")


def test_the_error_for_a_layer_without_declared_weights_says_what_to_write():
    class Plain(QuantizableMixin, keras.layers.Layer):
        pass

    layer = built(Plain())
    with pytest.raises(NotImplementedError, match=r"Plain declares no weight .*QuantizedWeight"):
        layer.quantize("int8")


def test_unsupported_configs_raise():
    class Foreign(keras.quantizers.QuantizationConfig):
        @property
        def mode(self):
            return "int8"

        def __repr__(self):
            return "Foreign()"

    message = r"Dense can be quantized to int8, int4 and float8; got mode='int8' and config=Foreign"
    with pytest.raises(NotImplementedError, match=message):
        dense().quantize(config=Foreign())


# Hooks, each overridden by name.


@pytest.mark.parametrize("mode", MODES)
def test_the_call_of_a_mode_can_be_overridden(mode):
    def doubled(self, inputs, training=None):
        return 2 * self.call(inputs)

    layer = built(type("Doubled", (layers.Dense,), {f"_{mode}_call": doubled})(5))
    wanted = np.asarray(layer(INPUTS))
    layer.quantize(mode)
    assert relative_error(layer(INPUTS), 2 * wanted) < BOUNDS[mode]
    other = built(type(layer)(5))
    other.quantize(next(m for m in MODES if m != mode))
    assert relative_error(other(INPUTS), wanted) < 0.2


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("mode", MODES)
def test_the_build_of_a_mode_can_be_extended(mode):
    def build(self, shape, name=None):
        getattr(layers.Dense, f"_{mode}_build")(self, shape)
        self.offset = self.add_weight(
            name="offset", shape=(5,), initializer=lambda s, dtype: jnp.full(s, 7, dtype)
        )

    kind = _register(type(f"WithOffset{mode}", (layers.Dense,), {f"_{mode}_build": build}))
    layer = built(kind(5))
    layer.quantize(mode)
    layer.offset.assign(np.arange(5))
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    loaded = built(kind.from_config(layer.get_config()))
    loaded.load_own_variables(store)
    np.testing.assert_array_equal(loaded.offset, np.arange(5))
    np.testing.assert_array_equal(loaded(INPUTS), layer(INPUTS))


def test_several_weights_are_built_by_name():
    seen = []

    class Two(QuantizableMixin, keras.layers.Layer):
        first = QuantizedWeight(axis=0)
        second = QuantizedWeight(axis=0)

        def build(self, input_shape):
            width = input_shape[-1]
            self.first = self.add_weight(name="first", shape=(width, 6))
            self.second = self.add_weight(name="second", shape=(6, 3))

        def call(self, inputs):
            return ops.matmul(ops.matmul(inputs, self.first), self.second)

        def _int8_build(self, shape, name=None):
            seen.append((name, shape))
            super()._int8_build(shape, name)

    layer = built(Two())
    wanted = np.asarray(layer(INPUTS))
    layer.quantize("int8")
    assert seen == [("first", (24, 6)), ("second", (6, 3))]
    assert relative_error(layer(INPUTS), wanted) < 0.02
    # Only one of them.
    layer = built(Two())
    layer.quantize(config=QuantizationConfig({"*second": NF4A16}))
    assert [v.name for v in layer.trainable_weights] == ["first"]
    assert relative_error(layer(INPUTS), wanted) < 0.2


# Policies.


# Keras does not support float16 with int8: see FAILURES.
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("policy", "mode"),
    [
        ("mixed_bfloat16", "int8"),
        ("bfloat16", "int8"),
        ("float16", "int4"),
        ("mixed_float16", "float8"),
    ],
)
def test_scales_are_float32_under_every_policy(policy, mode):
    layer = dense(policy)
    wanted = np.asarray(layer(INPUTS), np.float32)
    layer.quantize(mode)
    assert layer.dtype_policy.name == f"{mode}_from_{policy}"
    seen = []

    class Spy(type(layer)):
        def product(self, inputs, kernel):
            seen.append((inputs.dtype, kernel.scale.dtype, kernel.dtype, self.kernel.dtype))
            return super().product(inputs, kernel)

    layer.__class__ = Spy
    outputs = layer(INPUTS)
    compute = jnp.dtype(layer.compute_dtype)
    assert seen == [(compute, jnp.float32, compute, compute)]
    assert outputs.dtype == compute
    assert layer.stored_weights["kernel"].variables[1].dtype == "float32"
    assert relative_error(np.asarray(outputs, np.float32), wanted) < BOUNDS[mode]


POLICIES = [
    ("int8", "int8_from_float32", 1),
    ("int4", "int4_from_float32", 1),
    ("float8", "float8_from_mixed_bfloat16", 1),
]
# Since Keras 3.14.
if hasattr(keras.dtype_policies, "Int4DTypePolicy"):
    POLICIES += [("int4", "int4/8_from_float32", 3)]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("mode, policy, groups", POLICIES)
def test_a_quantized_policy_can_be_set_at_construction_or_later(mode, policy, groups):
    layer = dense(policy)
    assert layer.quantization_config.mode == layer.quantization_mode == mode
    assert layer.quantized_weight("kernel").reorder(None).scale.shape == (groups, 5)
    assert [v.name for v in layer.trainable_weights] == ["bias"]
    later = dense()
    wanted = np.asarray(later(INPUTS))
    later.dtype_policy = policy
    assert later.quantized_weight("kernel").reorder(None).scale.shape == (groups, 5)
    assert relative_error(np.asarray(later(INPUTS), np.float32), wanted) < 0.2


def test_a_policy_of_another_method_raises():
    with pytest.raises(NotImplementedError, match=r"policy of int8, int4, float8; got 'gptq/4/8_"):
        dense("gptq/4/8_from_float32")
    layer = dense()
    before = state(layer)
    with pytest.raises(ValueError, match="Implicitly enabling GPTQ"):
        layer.dtype_policy = "gptq/4/8_from_float32"
    assert state(layer) == before


def test_policies_from_a_map_apply_by_path(tmp_path):
    policies = keras.dtype_policies.DTypePolicyMap(default_policy="float32")
    policies["second"] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    inputs = keras.Input((24,))
    hidden = layers.Dense(9, dtype=policies, name="first")(inputs)
    model = keras.Model(inputs, layers.Dense(5, dtype=policies, name="second")(hidden))
    model.quantize("int8")
    assert policies["first"].name == "int8_from_float32"
    assert policies["second"].name == "int8_from_mixed_bfloat16"
    found = np.asarray(model(INPUTS), np.float32)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.asarray(loaded(INPUTS), np.float32), found)


# Configs of layers.


@_register
class AutoConfig(QuantizableMixin, keras.layers.Layer):
    """Has arguments but no get_config: Keras generates one."""

    kernel = QuantizedWeight(axis=0)

    def __init__(self, factor, shift=0.0, **kwargs):
        super().__init__(**kwargs)
        self.factor, self.shift = factor, shift

    def build(self, input_shape):
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], 3))

    def call(self, inputs):
        return self.factor * ops.matmul(inputs, self.kernel) + self.shift


@_register
class OwnConfig(AutoConfig):
    """A subclass of a subclass, with its own get_config."""

    def get_config(self):
        return {**super().get_config(), "factor": self.factor, "shift": self.shift}


@_register
class Wider(layers.Dense):
    """A subclass of Dense with one more argument."""

    def __init__(self, units, gain=1.0, **kwargs):
        super().__init__(units, **kwargs)
        self.gain = gain

    def call(self, inputs, training=None):
        return self.gain * super().call(inputs)

    def get_config(self):
        return {**super().get_config(), "gain": self.gain}


AUTHORS: dict[str, Any] = {
    "auto": lambda: AutoConfig(2.0, shift=0.5),
    "own": lambda: OwnConfig(2.0, 0.5),
    "dense": lambda: Wider(5, gain=3.0),
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("name", "mode"),
    [("auto", "int8"), ("auto", "int4"), ("own", "int8"), ("own", None), ("dense", "int8")],
)
def test_custom_layers_round_trip_with_their_arguments(name, mode, tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((24,)), AUTHORS[name]()])
    wanted = np.asarray(model(INPUTS))
    if mode:
        model.quantize(mode)
        assert relative_error(model(INPUTS), wanted) < BOUNDS[mode]
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[0]) is type(model.layers[0])
    np.testing.assert_array_equal(loaded(INPUTS), model(INPUTS))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "config",
    [
        Int8QuantizationConfig(AbsMaxQuantizer(value_range=(-9, 9)), None),
        Int4QuantizationConfig(block_size=8),
        QuantizationConfig(NF4A16),
    ],
    ids=["int8", "int4", "nf4"],
)
def test_from_config_restores_the_quantization_config(config):
    layer = dense()
    layer.quantize(config=config)
    arguments = layer.get_config()
    again = layers.Dense.from_config(arguments)
    assert "quantization_config" in arguments  # from_config does not change its argument.
    assert again.quantization_config.get_config() == layer.quantization_config.get_config()
    built(again)
    assert again.quantized_weight("kernel").format == layer.quantized_weight("kernel").format
    for found, wanted in zip(again.weights, layer.weights, strict=True):
        assert (found.shape, found.dtype, found.name) == (wanted.shape, wanted.dtype, wanted.name)


# Gradients, compilation.


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("mode", MODES)
def test_inputs_get_the_gradient_of_the_dequantized_product(mode):
    layer = dense()
    layer.quantize(mode)
    upstream = some_inputs(4, 5, seed=3)
    gradient = jax.grad(lambda x: jnp.sum(layer(x) * upstream))(jnp.asarray(INPUTS))
    np.testing.assert_allclose(
        gradient, upstream @ np.asarray(layer.kernel).T, rtol=2e-4, atol=1e-5
    )


def test_equal_configs_share_one_compilation():
    traced = []

    @jax.jit
    def run(weight, x):
        traced.append(weight.format)
        return x @ weight.dequantize()

    for config in [
        Int8QuantizationConfig(),
        Int8QuantizationConfig(),
        Int4QuantizationConfig(),
    ] * 2:
        layer = dense()
        layer.quantize(config=config)
        run(layer.quantized_weight("kernel"), INPUTS)
    assert [f.name for f in traced] == ["int8", "int4"]


# Files.


def store_of(layer) -> dict[str, Any]:
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    return {key: np.asarray(value) for key, value in store.items()}


@pytest.mark.parametrize("mode", [*MODES, "nf4"])
def test_a_quantized_file_quantizes_a_float_layer(mode):
    layer, arguments = (
        dense(),
        {"config": QuantizationConfig(NF4A16)} if mode == "nf4" else {"mode": mode},
    )
    layer.quantize(**arguments)
    fresh = built(layers.Dense(5))
    fresh.load_own_variables(store_of(layer))
    assert fresh.quantization_mode == layer.quantization_mode
    assert type(fresh.quantization_config) is type(layer.quantization_config)
    np.testing.assert_array_equal(fresh(INPUTS), layer(INPUTS))
    assert {k: v.tobytes() for k, v in store_of(fresh).items()} == {
        k: v.tobytes() for k, v in store_of(layer).items()
    }


def without(key):
    return lambda store: {k: v for k, v in store.items() if k != key}


WRONG_FILES = {
    "floats": (lambda: store_of(dense()), "other variables than layer"),
    "other mode": (lambda: quantized_store("int4"), "quantized in another way|other variables"),
    "other groups": (
        lambda: quantized_store(config=QuantizationConfig(ArrayConfig(group_size=8))),
        "quantized in another way|other variables",
    ),
    "no scale": (lambda: without("2")(quantized_store("int8")), "other variables than layer"),
    "no codes": (
        lambda: without("0")(quantized_store("int8")),
        r"numbered from 0; got \['1', '2'\]",
    ),
    "cut": (
        lambda: {**(store := quantized_store("int8")), "0": store["0"][:7]},
        r"must have shape \(24, 5\) as int8.*; got \(7, 5\)",
    ),
    "one more": (
        lambda: {**quantized_store("int8"), "3": np.zeros(2)},
        "other variables than layer",
    ),
}


def quantized_store(mode=None, config=None):
    layer = dense()
    layer.quantize(mode, config=config)
    return store_of(layer)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_does_not_fit_raises_and_changes_nothing(name):
    make, message = WRONG_FILES[name]
    layer = with_kernel(lambda kernel: kernel[::-1])
    layer.quantize("int8")
    before = state(layer)
    with pytest.raises(ValueError, match=message):
        layer.load_own_variables(make())
    assert state(layer) == before


@pytest.mark.parametrize("name", ["no scale", "cut", "one more"])
def test_a_damaged_quantized_file_leaves_a_float_layer_in_float(name):
    layer = dense()
    before = state(layer)
    make, message = WRONG_FILES[name]
    with pytest.raises(ValueError, match=message):
        layer.load_own_variables(make())
    assert state(layer) == before


# Models.


def shared_model():
    inputs = keras.Input((24,))
    layer = layers.Dense(24, activation="tanh", name="shared")
    return keras.Model(inputs, layers.Dense(3, name="out")(layer(layer(inputs))))


def nested_model():
    inner = keras.Sequential([keras.Input((24,)), layers.Dense(9, name="a")], name="inner")
    inputs = keras.Input((24,))
    return keras.Model(inputs, layers.Dense(3, name="out")(inner(inputs)))


def wrapped_model():
    inputs = keras.Input((24,))
    steps = keras.layers.Reshape((4, 6))(inputs)
    return keras.Model(inputs, keras.layers.TimeDistributed(layers.Dense(3, name="step"))(steps))


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "mode"),
    [(shared_model, "int4"), (nested_model, "int8"), (wrapped_model, "float8")],
)
def test_models_of_all_kinds_are_quantized_once_and_round_trip(make, mode, tmp_path):
    keras.utils.set_random_seed(0)
    model = make()
    wanted = np.asarray(model(INPUTS))
    model.quantize(mode)
    found = np.asarray(model(INPUTS))
    assert 0 < relative_error(found, wanted) < 0.25
    np.testing.assert_allclose(model.predict(INPUTS, verbose=0), found, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(INPUTS), found)
    dense_layers = [x for x in model._flatten_layers() if isinstance(x, layers.Dense)]
    assert {x.quantization_mode for x in dense_layers} == {mode}
