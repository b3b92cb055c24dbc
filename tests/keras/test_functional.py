"""Models as pure functions of their weights."""

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import jaxquant
from jaxquant import FP8, NF4A16, W4A16_ASYM, W8A8, QTensor, Rule
from jaxquant.keras import (
    Int4QuantizationConfig,
    QuantizationConfig,
    convert,
    functional,
    layers,
    quantize,
)
from jaxquant.methods import MeanSquare

# Each kind of layer and of format, but not all combinations: `functional` depends only on
# variables and formats.
RULES = [
    ("dense/*", W8A8),
    Rule("lstm/*", W4A16_ASYM, group_size=32),
    ("attention/*", FP8),
    ("table/*", NF4A16),
]


def whole_model():
    x, t = keras.Input((5, 40), name="x"), keras.Input((5,), dtype="int32", name="t")
    z = keras.layers.Dense(40, activation="relu", name="dense")(x)
    z = keras.layers.Dropout(0.5)(keras.layers.BatchNormalization()(z))
    table = keras.layers.Embedding(11, 40, name="table")(t)
    z = keras.layers.MultiHeadAttention(2, 8, name="attention")(z, table)
    return keras.Model([x, t], keras.layers.LSTM(8, name="lstm")(z))


def inputs():
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(4, 5, 40)), rng.integers(0, 11, (4, 5))
    return [jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.int32)]


def assert_close(found, wanted, step=2e-6):
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    assert np.linalg.norm(found - wanted) <= step * np.linalg.norm(wanted)


@pytest.mark.slow
def test_apply_returns_the_outputs_of_the_model(tmp_path):
    model = convert(whole_model())
    model.quantize(config=QuantizationConfig(RULES))
    apply, params = functional(model)
    compiled: Any = jax.jit(apply)
    outputs = compiled(params, *inputs())
    wanted = model.predict(inputs(), verbose=0)
    assert outputs.dtype == jnp.float32
    assert_close(outputs, wanted)

    jaxquant.save(tmp_path / "params.safetensors", params)
    loaded = jaxquant.load(tmp_path / "params.safetensors", like=params)
    np.testing.assert_array_equal(compiled(loaded, *inputs()), outputs)
    assert compiled._cache_size() == 1


def test_apply_computes_in_the_dtype_of_the_policy():
    dense = layers.Dense(5, dtype="mixed_bfloat16")
    model: Any = keras.Sequential([keras.Input((64,)), dense])
    model.quantize("int8")
    apply, params = functional(model)
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    outputs = jax.jit(apply)(params, x)
    assert outputs.dtype == jnp.bfloat16
    assert_close(outputs, model.predict_on_batch(x), 1e-2)


@functools.cache
def small():
    model: Any = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(5, name="a", bias_initializer="normal")], name="m"
    )
    quantized, _ = quantize(model, Int4QuantizationConfig(block_size=32))
    return quantized, *functional(quantized)


def test_params_hold_tensors_in_the_dtypes_of_their_formats():
    _, _, params = small()
    kernel = params["m"]["a"]["kernel"]
    assert isinstance(kernel, QTensor)
    assert kernel.codes.dtype == jnp.int4
    assert kernel.shape == (64, 5)
    assert params["m"]["a"]["bias"].dtype == jnp.float32


def test_apply_reads_only_params_and_does_not_change_the_model():
    model, *_ = small()
    # Separate params, because they are donated below.
    apply, params = functional(model)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    wanted, weights = np.asarray(apply(params, x)), model.get_weights()
    for variable in model.weights:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    np.testing.assert_array_equal(jax.jit(apply)(params, x), wanted)
    model.set_weights(weights)
    # Training donates the model's arrays, and here params are donated.
    with pytest.warns(UserWarning, match="donated buffers were not usable"):
        jax.jit(apply, donate_argnums=0)(params, x)
    np.testing.assert_array_equal(model(x), wanted)


def test_apply_computes_on_codes_like_matmul():
    """Codes are not packed, unpacked or moved before the product."""
    _, apply, params = small()
    x = jnp.ones((3, 64))
    layer = params["m"]["a"]

    def product(layer, x):
        return jaxquant.matmul(x, layer["kernel"]) + layer["bias"]

    def operations(f, *args):
        text = str(jax.jit(f).lower(*args).compile().as_text())
        lines = [line.split(", metadata")[0] for line in text.splitlines() if " = " in line]
        return sorted(line.split(" = ")[1].split("(")[0].split("{")[0] for line in lines)

    assert operations(apply, params, x) == operations(product, layer, x)


def test_apply_under_vmap_and_grad():
    _, apply, params = small()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 64)), jnp.float32)
    assert_close(jax.vmap(apply, (None, 0))(params, x)[1], apply(params, x[1]))

    def loss(bias):
        a = {**params["m"]["a"], "bias": bias}
        return jnp.sum(apply({"m": {"a": a}}, x[0]) ** 2)

    bias = params["m"]["a"]["bias"]
    assert_close(jax.grad(loss)(bias), 2 * jnp.sum(apply(params, x[0]), axis=0), 1e-5)
    assert_close(
        jax.grad(lambda x: jnp.sum(apply(params, x)))(x[0])[0],
        jnp.sum(params["m"]["a"]["kernel"].dequantize(), axis=1),
        1e-5,
    )


def test_apply_in_threads_and_nested():
    model, apply, params = small()
    x = jnp.ones((3, 64))
    doubled = jax.tree.map(lambda a: 2 * a if a.dtype == jnp.float32 else a, params)
    wanted = apply(params, x), apply(doubled, x)
    outputs = {}

    def run(i):
        # The settings of conftest.py are per thread.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            outputs[i] = [apply((params, doubled)[i % 2], x) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for i, found in outputs.items():
        for output in found:
            np.testing.assert_array_equal(output, wanted[i % 2])
    assert len(outputs) == 4
    with pytest.raises(ValueError, match="incompatible"):
        apply(doubled, jnp.ones((3, 65)))
    np.testing.assert_array_equal(model(x), wanted[0])


def test_apply_raises_for_other_params():
    _, apply, params = small()
    x = jnp.ones((3, 64))
    with pytest.raises(ValueError, match="got 1 leaves for 2, which differ at m/a/bias"):
        apply({"m": {"a": {"kernel": params["m"]["a"]["kernel"]}}}, x)
    bias = params["m"]["a"]["bias"]
    with pytest.raises(
        ValueError, match=r"m/a/kernel must be a QTensor like .*; got a \w+ of shape \(64, 5\)\."
    ):
        apply({"m": {"a": {"kernel": jnp.ones((64, 5)), "bias": bias}}}, x)
    with pytest.raises(ValueError, match=r"params at m/a/bias must be an array of shape \(5,\)"):
        apply({"m": {"a": {**params["m"]["a"], "bias": jnp.ones(4)}}}, x)
    with pytest.raises(ValueError, match="must be built; got built=False and 0 weights"):
        functional(keras.Sequential([keras.layers.Dense(2)]))
    late: Any = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    odd: list[Any] = ["nothing", 3]
    for method in odd:
        with pytest.raises(ValueError, match="must be the name of a method of Sequential, such a"):
            functional(late, method)
    apply, params = functional(late)
    late.quantize("int8")
    with pytest.raises(ValueError, match="are not those it had when `functional` was called"):
        apply(params, jnp.ones((1, 4)))


class Router(keras.layers.Layer):
    """Weights of its own, used without a stock layer."""

    def build(self, input_shape):
        self.experts = self.add_weight(name="experts", shape=(3, input_shape[-1], 32))

    def call(self, inputs):
        return keras.ops.max(keras.ops.einsum("bk,ekn->ebn", inputs, self.experts), axis=0)


class Subclassed(keras.Model):
    """Layers in a list and a dict, made without an argument of `__init__`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [keras.layers.Dense(64, name="first"), Router(name="router")]
        self.named = {"head": keras.layers.Dense(32, name="head", bias_initializer="normal")}

    def call(self, inputs):
        return self.project(self.blocks[0](inputs))

    def project(self, inputs, factor=1.0):
        return factor * self.named["head"](self.blocks[1](inputs))


def subclassed() -> Any:
    keras.utils.set_random_seed(0)
    model, x = Subclassed(name="sub"), np.random.default_rng(0).normal(size=(3, 64)).astype("f")
    return model, x, model(x)


def test_a_stock_model_of_any_class_runs_lifted():
    model, x, wanted = subclassed()
    apply, params = functional(model)
    assert sorted(params["sub"]) == ["first", "head", "router"]
    np.testing.assert_array_equal(apply(params, x), wanted)
    uses = jaxquant.uses(apply, params, x)
    assert uses.contracted == {
        "sub/first/kernel": (0,),
        "sub/router/experts": (1,),
        "sub/head/kernel": (0,),
    }
    rules = uses.rules(W8A8)
    statistics = jaxquant.collect(apply, params, [x], rules, MeanSquare)
    assert set(statistics) == set(uses.contracted)
    quantized = jaxquant.tree.quantize(params, rules)
    lifted = jaxquant.lift(apply, strict=True)
    assert_close(jax.jit(lifted)(quantized, x), wanted, 0.02)
    assert not isinstance(model.blocks[0], layers.Dense)
    with pytest.raises(ValueError, match=r"array of shape \(64, 64\).*Call jaxquant.lift\(apply\)"):
        apply(quantized, x)


def test_functional_calls_a_method():
    model, x, _ = subclassed()
    apply, params = functional(model, "project")
    np.testing.assert_array_equal(apply(params, x, factor=2.0), model.project(x, 2.0))
    doubled = jax.tree.map(lambda a: 2 * a, params)
    np.testing.assert_allclose(apply(doubled, x), _doubled(model, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(functional(model, "__call__")[0](params, x), model(x))
    for method in ("generate", "name"):
        with pytest.raises(ValueError, match=f"method of Subclassed.*; got '{method}'"):
            functional(model, method)


def _doubled(model, x):
    """`project` with twice the weights, in NumPy."""
    experts, kernel, bias = (np.asarray(v) for v in model.weights[-3:])
    return np.einsum("bk,ekn->ebn", x, 2 * experts).max(0) @ (2 * kernel) + 2 * bias


def test_layers_with_the_same_path_get_separate_params():
    parts = [keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="a")], name="in")]
    start = keras.Input((4,))
    again = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="a")], name="in")
    model = keras.Model(start, keras.Sequential([again], name="out")(parts[0](start)))
    apply, params = functional(model)
    assert set(params["in"]["a"]) == {"kernel", "bias", "kernel_1", "bias_1"}
    assert_close(apply(params, jnp.ones((1, 4))), model(jnp.ones((1, 4))))
