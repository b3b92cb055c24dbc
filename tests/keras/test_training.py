"""Training before and after quantization: optimizers of replaced variables, and LoRA."""

import re
import warnings
from typing import Any

import h5py
import jax
import keras
import numpy as np
import pytest

from jaxquant.keras import Float8QuantizationConfig, convert, layers, quantize


def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(128, 20)).astype(np.float32)
    return inputs, np.tanh(inputs @ rng.normal(size=(20, 3)).astype(np.float32))


def model_of(optimizer: Any = "adam") -> Any:
    keras.utils.set_random_seed(1)
    start = keras.Input((20,))
    x = layers.Dense(16, activation="relu")(start)
    model: Any = keras.Model(start, layers.EinsumDense("ab,bc->ac", 3, bias_axes="c")(x))
    model.compile(optimizer, "mse")
    return model


def fit(model, epochs=2):
    return model.fit(*data(), epochs=epochs, verbose=0, shuffle=False).history["loss"]


@pytest.mark.slow
def test_training_continues_after_quantizing():
    model = model_of(keras.optimizers.SGD(0.03, momentum=0.9))
    fit(model)
    inputs, _ = data()
    dense = model.layers[1]
    moments = {v.path: np.asarray(v) for v in model.optimizer.variables}
    wanted = model.predict(inputs, verbose=0)
    for layer in model.layers[1:]:
        layer.quantize("int8")
    found = model.predict(inputs, verbose=0)
    assert np.linalg.norm(found - wanted) < 0.15 * np.linalg.norm(wanted)

    codes = np.asarray(dense.quantized_weight("kernel").codes)
    bias = np.asarray(dense.bias)
    with pytest.warns(UserWarning, match="2 of its 4 trainable variables were quantized or frozen"):
        model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables:
        np.testing.assert_array_equal(variable, moments[variable.path])
    losses = fit(model, 4)
    assert losses[-1] < losses[0]
    assert int(model.optimizer.iterations) == 6 * 4
    np.testing.assert_array_equal(dense.quantized_weight("kernel").codes, codes)
    assert np.any(np.asarray(dense.bias) != bias)


@pytest.mark.slow
def test_training_continues_in_float8_and_back():
    model = model_of()
    losses = fit(model)
    for layer in model.layers[1:]:
        layer.quantize(config=Float8QuantizationConfig(training=True))
    losses += fit(model)
    for layer in model.layers[1:]:
        layer.quantize("int8")
    # Of each layer the kernel, and the scale and the history of three operands.
    with pytest.warns(UserWarning, match="14 of its 16 trainable variables were quantized"):
        losses += fit(model)
    assert losses == sorted(losses, reverse=True)


def test_a_model_that_was_compiled_before_says_what_no_longer_trains():
    model: Any = keras.Sequential([keras.Input((20,)), layers.Dense(3, name="dense")], name="net")
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    model.quantize("int8")
    text = (
        r"before 1 of its 2 trainable variables were quantized or frozen \(net/dense/kernel\)\. "
        r"Training continues .* for the 1 trainable variables it has now\. Compile it again"
    )
    with pytest.warns(UserWarning, match=text):
        fit(model, 1)
    fit(model, 1)  # Once is enough.
    again: Any = keras.Sequential([keras.Input((20,)), layers.Dense(3)])
    again.compile("sgd", "mse")
    again.optimizer.build(again.trainable_variables)
    again.quantize("int8")
    again.compile("sgd", "mse")
    fit(again, 1)
    copy, _ = quantize(keras.Sequential([keras.Input((20,)), layers.Dense(3)]), "int8")
    with pytest.raises(ValueError, match="call `compile"):
        fit(copy, 1)


@keras.saving.register_keras_serializable("test_training")
class Net(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = layers.Dense(16, activation="relu")
        self.head = layers.Dense(3)

    def call(self, inputs):
        return self.head(self.hidden(inputs))


def subclassed():
    keras.utils.set_random_seed(1)
    model: Any = Net()
    model(keras.Input((20,)))
    model.compile("adam", "mse")
    return model


def quantize_each(model):
    for layer in model.layers:
        if layer.weights:
            layer.quantize("int8")


# Before training: a model that was compiled, what quantizes it, and whether a warning follows. A
# layer does not know the functional models that have not called it.
ONLY_COMPILED: dict[str, Any] = {
    "functional": (model_of, lambda model: model.quantize("int8"), True),
    "subclassed": (subclassed, lambda model: model.quantize("int8"), True),
    "subclassed, by layer": (subclassed, quantize_each, True),
    "functional, by layer": (model_of, quantize_each, False),
}


def values(model):
    return [np.asarray(v) for v in (*model.variables, *model.optimizer.variables)]


@pytest.mark.filterwarnings("ignore:Layer InputLayer")
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", ONLY_COMPILED)
def test_a_model_that_was_only_compiled_trains_as_if_it_were_compiled_after(name):
    make, run, warns = ONLY_COMPILED[name]
    wanted = make()
    quantize_each(wanted)
    wanted.compile("adam", "mse")
    model = make()
    run(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = fit(model, 1), fit(model, 1)
        expected = fit(wanted, 1), fit(wanted, 1)
    found = [str(x.message) for x in caught if "compiled before" in str(x.message)]
    assert len(found) == warns
    assert losses == expected
    for x, y in zip(values(model), values(wanted), strict=True):
        np.testing.assert_array_equal(x, y)
    text = (
        r"compiled before 2 of its variables were quantized \(\S+kernel, \S+kernel\)\. They no "
        r"longer train; the 2 trainable variables it has now do\. Compile it after quantizing"
    )
    assert all(re.search(text, x) for x in found)


# A policy and an optimizer.
OPTIMIZERS: dict[str, Any] = {
    "moments": ("float32", "adam"),
    "average": ("float32", {"class_name": "SGD", "config": {"momentum": 0.9, "use_ema": True}}),
    "wrapped": ("mixed_float16", "adam"),
    "no slots": ("mixed_bfloat16", "sgd"),
}


@pytest.fixture
def as_policy():
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


@pytest.mark.filterwarnings("ignore:Layer InputLayer", "ignore:The model was compiled before")
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_kernels_and_their_slots_are_freed(name, as_policy, tmp_path):
    policy, optimizer = OPTIMIZERS[name]
    as_policy(policy)
    model: Any = keras.Sequential([keras.Input((331,)), layers.Dense(337), layers.Dense(331)])
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(8, 331)).astype(np.float32)
    model.fit(x, x, verbose=0)
    assert large_floats() >= 2
    model.quantize("int4")
    assert large_floats() == 0
    model.fit(x, x, verbose=0)
    assert large_floats() == 0
    assert int(model.optimizer.iterations) == 2
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(model.optimizer)
    loaded.fit(x, x, verbose=0)


def large_floats():
    return sum(x.size == 331 * 337 and x.dtype == "float32" for x in jax.live_arrays())


class Shifted(layers.Dense):
    """The names of this weight's slots begin like those of the kernel's slots."""

    def build(self, input_shape):
        super().build(input_shape)
        self.shift = self.add_weight(name="kernel_shift", shape=(self.units,))

    def call(self, inputs):
        return super().call(inputs) + self.shift


@pytest.mark.filterwarnings("ignore:The model was compiled before")
def test_the_state_of_variables_that_still_train_is_kept():
    model: Any = keras.Sequential([keras.Input((20,)), Shifted(8), layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.03, momentum=0.9), "mse")
    fit(model)
    momenta = {v.path: np.asarray(v) for v in model.optimizer.variables}
    model.quantize("int8")
    model.optimizer.build(model.trainable_variables)
    found = {v.path: np.asarray(v) for v in model.optimizer.variables}
    gone = {path for path in momenta if path.endswith("kernel_momentum")}
    assert len(gone) == 2
    assert found.keys() == momenta.keys() - gone
    for path, value in found.items():
        np.testing.assert_array_equal(value, momenta[path])
        assert np.any(value)


def test_an_optimizer_of_a_model_that_is_not_compiled_is_replaced():
    model: Any = keras.Sequential([keras.Input((20,)), layers.Dense(3)])
    model.optimizer = keras.optimizers.SGD(momentum=0.9)
    model.optimizer.build(model.trainable_variables)
    model.quantize("int8")
    with pytest.warns(UserWarning, match="1 of its 2 trainable variables were quantized"):
        model.optimizer.build(model.trainable_variables)
    assert len(model.optimizer.variables) == 3


def test_frozen_variables_are_not_in_the_warning():
    model = subclassed()
    model.hidden.trainable = False
    model.quantize("int8")
    with pytest.warns(UserWarning, match=r"before 1 of its variables were quantized \(net.*the 1 "):
        model.optimizer.build(model.trainable_variables)
    again = subclassed()
    again.quantize("int8")
    again.compile("sgd", "mse")
    again.optimizer.build(again.trainable_variables)


@pytest.mark.filterwarnings("ignore:Layer InputLayer", "ignore:The model was compiled before")
@pytest.mark.parametrize("make", [model_of, subclassed])
def test_evaluate_and_predict_after_quantizing_run_on_codes(make):
    model, (inputs, targets) = make(), data()
    floats = model.predict(inputs, verbose=0)
    model.evaluate(inputs, targets, verbose=0)
    model.quantize("int8")
    found = model.predict(inputs, verbose=0)
    assert np.any(found != floats)
    np.testing.assert_allclose(found, model(inputs), rtol=1e-5, atol=1e-6)
    loss = model.evaluate(inputs, targets, verbose=0)
    np.testing.assert_allclose(loss, np.mean((found - targets) ** 2), rtol=1e-5)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("make", [model_of, subclassed])
@pytest.mark.parametrize("run", [convert, lambda x: quantize(x, "int8")[0]])
def test_a_copy_of_a_compiled_model_must_be_compiled(make, run):
    model, (inputs, targets) = make(), data()
    copy = run(model)
    for method in (copy.fit, copy.evaluate, copy.train_on_batch):
        with pytest.raises(ValueError, match="call `compile"):
            method(inputs, targets)
    assert model.compiled
    assert not copy.compiled


def test_quantize_compile_fit():
    model = model_of()
    for layer in model.layers[1:]:
        layer.quantize("int8")
    model.compile("adam", "mse")
    kernel = np.asarray(model.layers[1].kernel)
    losses = fit(model)
    assert losses[-1] < losses[0]
    assert [v.name for v in model.trainable_variables] == ["bias", "bias"]
    with pytest.raises(ValueError, match="already quantized"):
        model.layers[1].quantize("int8")
    np.testing.assert_array_equal(model.layers[1].kernel, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "int4"])
def test_lora_trains_and_is_in_files(mode, tmp_path):
    model = model_of()
    for layer in model.layers[1:]:
        if mode is not None:
            layer.quantize(mode)
        layer.enable_lora(4, lora_alpha=8)
    frozen = [np.asarray(v) for v in model.non_trainable_variables]
    losses = fit(model, 8)
    assert losses[-1] < 0.97 * losses[0]
    for found, wanted in zip(model.non_trainable_variables, frozen, strict=True):
        np.testing.assert_array_equal(found, wanted)
    inputs, _ = data()
    wanted = model.predict(inputs, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    found = loaded.predict(inputs, verbose=0)
    # Merged into float weights; beside codes it stays as it is.
    bound = {None: 1e-5, "int4": 0}[mode]
    assert np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted)
    # The adapter of a float layer restarts with zeros in one factor only, so that it can train.
    assert np.any(loaded.layers[1].lora_kernel_b) == (mode is not None)
    again = fit(loaded, 8)
    assert again[-1] < again[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "int4"])
def test_lora_on_a_table(mode):
    tokens = np.random.default_rng(0).integers(0, 9, (64, 5))
    table: Any = layers.Embedding(9, 20)
    model: Any = keras.Sequential([keras.Input((5,), dtype="int32"), table])
    if mode is not None:
        table.quantize(mode)
    table.enable_lora(3)
    model.compile(keras.optimizers.Adam(0.02), "mse")
    targets = np.ones((64, 5, 20), np.float32)
    losses = model.fit(tokens, targets, epochs=10, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    store: Any = {}
    values = np.asarray(table.embeddings)
    table.save_own_variables(store)
    table.load_own_variables(store)
    bound = {None: 1e-6, "int4": 0}[mode]
    assert np.linalg.norm(table.embeddings - values) <= bound * np.linalg.norm(values)


@pytest.mark.slow
def test_the_low_rank_path_equals_the_product_with_the_sum():
    layer: Any = layers.Dense(7, use_bias=False)
    layer.build((None, 20))
    layer.quantize("float8")
    layer.enable_lora(3, lora_alpha=5, b_initializer="normal")
    inputs, _ = data()
    base = layer.quantized_weight("kernel")
    added = inputs @ (5 / 3 * np.asarray(layer.lora_kernel_a) @ np.asarray(layer.lora_kernel_b))
    layer.lora_enabled = False
    plain = layer(inputs)
    layer.lora_enabled = True
    np.testing.assert_allclose(layer(inputs) - plain, added, atol=1e-5)
    np.testing.assert_allclose(
        layer.kernel - base.dequantize(), added_kernel(layer), rtol=1e-5, atol=1e-6
    )


def added_kernel(layer):
    return 5 / 3 * np.asarray(layer.lora_kernel_a) @ np.asarray(layer.lora_kernel_b)


def test_enable_lora_raises_where_it_is_not_supported():
    layer: Any = layers.Dense(3)
    with pytest.raises(ValueError, match="on a layer that isn't yet built; build it first"):
        layer.enable_lora(2)
    layer.build((None, 4))
    layer.enable_lora(2)
    with pytest.raises(ValueError, match="lora is already enabled"):
        layer.enable_lora(2)
    constrained: Any = layers.Dense(3, kernel_constraint="non_neg")
    constrained.build((None, 4))
    with pytest.raises(ValueError, match="Lora is incompatible with kernel constraints"):
        constrained.enable_lora(2)


@pytest.mark.parametrize(
    "config", [Float8QuantizationConfig(), "int8", "int4"], ids=["float8", "int8", "int4"]
)
def test_files_of_adapted_layers_load_bit_for_bit(config, tmp_path):
    keras.utils.set_random_seed(0)
    model: Any = keras.Sequential([keras.Input((20,)), layers.Dense(7)])
    layer = model.layers[0]
    mode = {"config": config} if not isinstance(config, str) else {"mode": config}
    layer.quantize(**mode)
    plain = np.asarray(model(data()[0]))
    layer.enable_lora(3, lora_alpha=5, b_initializer="normal")
    wanted = np.asarray(model(data()[0]))
    assert np.any(wanted != plain)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    fresh: Any = keras.Sequential([keras.Input((20,)), layers.Dense(7)])
    fresh.load_weights(tmp_path / "model.weights.h5")
    for other in (loaded, fresh):
        adapted = other.layers[0]
        assert (adapted.lora_rank, adapted.lora_alpha) == (3, 5)
        np.testing.assert_array_equal(other(data()[0]), wanted)
    wide: Any = keras.Sequential([keras.Input((20,)), layers.Dense(7)])
    wide.layers[0].enable_lora(2)
    with pytest.raises(
        ValueError, match=r"adapter of layer .* has rank 3; got a layer with LoRA of"
    ):
        wide.load_weights(tmp_path / "model.weights.h5")


def test_a_damaged_adapter_is_an_error(tmp_path):
    model: Any = keras.Sequential([keras.Input((20,)), layers.Dense(7)])
    layer, path = model.layers[0], tmp_path / "model.weights.h5"
    layer.quantize("int8")
    layer.enable_lora(3)
    model.save_weights(path)
    with h5py.File(path, "r+") as file:
        entry: Any = file["layers/dense/vars/lora_a"]
        entry[0, 0] = 7
    with pytest.raises(ValueError, match=r"entries \['lora_a'\] of layer .* do not have"):
        model.load_weights(path)


def test_a_model_with_lora_is_quantized_before():
    model = model_of()
    model.layers[1].enable_lora(2)
    with pytest.raises(
        ValueError, match="Dense has LoRA enabled; convert or quantize the model be"
    ):
        quantize(model, "int8")
