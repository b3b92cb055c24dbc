"""Custom layers that multiply with their own weights: quantized by lifting their call."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.keras import convert, functional, quantize, to_stock

from .test_models import relative_error, schemes

X = np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)


@keras.saving.register_keras_serializable("tests")
class Experts(keras.layers.Layer):
    """Two products with stacks of matrices that it keeps under other names; a table of biases."""

    def __init__(self, experts=3, width=24, **kwargs):
        super().__init__(**kwargs)
        self.experts, self.width = experts, width

    def build(self, input_shape):
        sizes = self.experts, input_shape[-1], self.width
        self._up = self.add_weight(name="up", shape=sizes)
        self.down = self.add_weight(name="down", shape=(sizes[0], sizes[2], sizes[1]))
        self.shift = self.add_weight(name="shift", shape=(sizes[0], sizes[1]))

    def call(self, inputs, training=False):
        hidden = keras.ops.relu(keras.ops.einsum("bti,eih->beth", inputs, self._up))
        outputs = keras.ops.einsum("beth,eho->beto", hidden, self.down)
        return keras.ops.mean(outputs + self.shift[:, None, :], axis=1)

    def get_config(self):
        return {**super().get_config(), "experts": self.experts, "width": self.width}


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """Experts inside of a custom layer, with noise, and a stock layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.bank, self.out = Experts(name="bank"), keras.layers.Dense(16, name="out")
        self.noise = keras.layers.Dropout(0.5)

    def build(self, input_shape):
        self.bank.build(input_shape)
        self.out.build(input_shape)

    def call(self, inputs, training=False):
        return self.out(self.noise(self.bank(inputs), training=training))


@keras.saving.register_keras_serializable("tests")
class MyDense(keras.layers.Dense):
    """Its class has a property `kernel`."""


@keras.saving.register_keras_serializable("tests")
class Noisy(Experts):
    """Draws random numbers in training."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.noise = keras.layers.Dropout(0.5)

    def call(self, inputs, training=False):
        return super().call(self.noise(inputs, training=training))


def model_of(*made) -> Any:
    keras.utils.set_random_seed(0)
    start = x = keras.Input((6, 16))
    for layer in made:
        x = layer(x)
    model = keras.Model(start, x, name="lifted")
    for variable in model.variables:
        if variable.name in ("shift", "bias"):
            values = np.random.default_rng(1).normal(size=variable.shape)
            variable.assign(values.astype(np.float32))
    return model


CASES = {
    "experts": lambda: [Experts(name="bank")],
    "inside of a custom layer": lambda: [Block(name="block")],
    "a subclass of Dense": lambda: [MyDense(8, name="bank"), keras.layers.Dense(3)],
    "between stock layers": lambda: [keras.layers.Dense(16), Experts(name="bank")],
}


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_every_matrix_is_quantized_and_files_load(name, mode, tmp_path):
    model = model_of(*CASES[name]())
    exact = np.asarray(model(X))
    quantized, report = quantize(model, mode)
    left = [row.path for row in report.rows if row.scheme is None and "kernel" in row.path]
    assert not left
    found = np.asarray(quantized(X))
    assert 0 < relative_error(found, exact) < {"int8": 0.04, "int4": 0.4}[mode]
    np.testing.assert_array_equal(model(X), exact)

    # As the lifted function of the float model, but for the rounding of sums.
    apply, params = functional(quantized)
    explanation = jq.explain(apply, params, X)
    assert len(explanation) == sum(row.scheme is not None for row in report.rows)
    assert not explanation.dequantized
    assert relative_error(np.asarray(jax.jit(apply)(params, X)), found) < 1e-5
    quantized.save(tmp_path / "model.keras")
    quantized.save_weights(tmp_path / "model.weights.h5")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    fresh = convert(model)
    np.testing.assert_array_equal(fresh(X), exact)
    fresh.load_weights(tmp_path / "model.weights.h5")
    for other in (loaded, fresh, convert(quantized)):
        np.testing.assert_array_equal(other(X), found)
        assert [type(x).__name__ for x in other.layers] == [type(x).__name__ for x in model.layers]
    in_place = convert(model)
    in_place.quantize(mode)
    np.testing.assert_array_equal(in_place(X), found)


def test_experts_share_a_scale_along_the_axis_that_they_contract():
    model = model_of(Experts(name="bank"))
    quantized, report = quantize(model, {"*/up": jq.W4A16, "*/down": jq.W8A8})
    bank = quantized.get_layer("bank")
    assert isinstance(bank, Experts)
    shapes = {n: bank.quantized_weight(n).reorder(None).scale.shape for n in ("up", "down")}
    assert shapes == {"up": (3, 1, 24), "down": (3, 1, 16)}
    assert schemes(report)["bank/shift"] == "not declared quantizable"
    # Outside of its call, the layer's attributes have dequantized values.
    exact = np.asarray(model.get_layer("bank")._up)
    assert 0 < relative_error(np.asarray(bank._up), exact) < 0.2
    np.testing.assert_array_equal(bank._up, bank.up)


def test_dequantized_stock_layers_come_back():
    quantized, _ = quantize(model_of(Block(name="block")), "int8")
    with pytest.raises(ValueError, match=r"Experts with .*Keras does not have the mode"):
        to_stock(quantized)
    stock = to_stock(quantized, dequantize=True)
    assert type(stock.get_layer("block")) is Block
    assert type(stock.get_layer("block").bank) is Experts
    assert relative_error(np.asarray(stock(X)), np.asarray(quantized(X))) < 0.02


def test_a_subclassed_model_is_called_on_the_shape_that_it_was_built_for(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.block, self.head = Block(name="block"), keras.layers.Dense(3, name="head")

        def call(self, inputs):
            return self.head(self.block(inputs))

    net: Any = Net()
    exact = np.asarray(net(X))
    quantized, report = quantize(net, jq.W8A8)
    assert sum(row.scheme is not None for row in report.rows) == 4
    assert isinstance(quantized, Net)
    found = np.asarray(quantized(X))
    assert 0 < relative_error(found, exact) < 0.04
    quantized.save(tmp_path / "net.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(loaded(X), found)


@pytest.mark.parametrize("layer", [Block, Noisy])
def test_what_is_left_in_float_trains(layer):
    quantized, _ = quantize(model_of(layer(name="block")), jq.W8A16)
    quantized.compile(keras.optimizers.SGD(0.1), "mse")
    before = [np.asarray(v) for v in quantized.trainable_variables]
    codes = [np.asarray(v) for v in quantized.non_trainable_variables if v.dtype == "int8"]
    assert codes
    quantized.fit(X, np.zeros((2, 6, 16)), verbose=0)
    after = [np.asarray(v) for v in quantized.trainable_variables]
    assert all(not np.array_equal(x, y) for x, y in zip(after, before, strict=True))
    held = [np.asarray(v) for v in quantized.non_trainable_variables if v.dtype == "int8"]
    for x, y in zip(held, codes, strict=True):
        np.testing.assert_array_equal(x, y)


@keras.saving.register_keras_serializable("tests")
class ReadsVariable(Noisy):
    """Its code uses attributes of variables, also in training, where it is not lifted."""

    def call(self, inputs, training=False):
        assert self._up.name == "up"
        assert not callable(self.down.dtype)
        hidden = jnp.einsum("bti,eih->beth", self.noise(inputs, training=training), self._up.value)
        return keras.ops.einsum("beth,eho->bto", hidden, keras.ops.convert_to_tensor(self.down))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_a_layer_reads_a_quantized_weight_as_a_variable(policy, tmp_path):
    model = model_of(ReadsVariable(name="bank", dtype=policy))
    quantized, _ = quantize(model, jq.W8A16)
    found = np.asarray(quantized(X))
    assert 0 < relative_error(found, np.asarray(model(X))) < 0.04
    assert quantized(X, training=True).shape == found.shape
    apply, params = functional(quantized)
    explanation = jq.explain(apply, params, X)
    assert len(explanation) == 2
    assert not explanation.dequantized
    quantized.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(X), found)
    bank = quantized.get_layer("bank")
    np.testing.assert_array_equal(bank.up.value, bank.up)
    with pytest.raises(ValueError, match="'up' is quantized and cannot be assigned to; got a v"):
        bank.up.assign(np.zeros(bank.up.shape))


class Bare(keras.layers.Layer):
    """Multiplies with a matrix; a subclass says how it keeps it."""

    def build(self, input_shape):
        self.keep_matrix(self.add_weight(name="matrix", shape=(16, 16)))

    def keep_matrix(self, matrix):
        self.kept = matrix

    def call(self, inputs):
        return inputs @ self.read()

    def read(self):
        return self.kept


class InList(Bare):
    def keep_matrix(self, matrix):
        self.kept = [matrix]

    def read(self):
        return self.kept[0]


class Doubled(Bare):
    def keep_matrix(self, matrix):
        self.kept, self.other = matrix, self.add_weight(name="matrix", shape=(16, 16))


class Collides(Bare):
    def matrix(self):
        return self.kept


class Untraceable(Bare):
    def call(self, inputs):
        return inputs @ self.read() * float(np.asarray(inputs).sum())


PROBLEMS = {
    InList: "it does not keep the variable 'matrix' as an attribute",
    Doubled: "it has several variables named 'matrix'",
    Collides: "its class has an attribute 'matrix' beside the variable of that name",
}


@pytest.mark.parametrize("layer", PROBLEMS)
def test_what_cannot_be_lifted_is_a_problem(layer):
    model = model_of(layer(name="bare"), keras.layers.Dense(3))
    words = (
        f"bare: {layer.__name__} holds weights and is not quantizable: {PROBLEMS[layer]}; derive"
    )
    with pytest.raises(ValueError, match=words):
        quantize(model, "int8")
    _, report = quantize(model, "int8", strict=False)
    assert schemes(report)["bare/matrix"] == f"{layer.__name__} is not a quantizable layer"
    _, report = quantize(model, "int8", keep=["bare"])
    assert schemes(report)["bare/matrix"] == "kept"


def test_a_call_that_cannot_be_traced_is_a_problem():
    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.bare = Untraceable(name="bare")
            self.bare.build((None, 16))

        def call(self, inputs):
            return self.bare(inputs)

    net: Any = Net()
    net.built = True
    with pytest.raises(ValueError, match="quantizable: its call cannot be traced without an input"):
        quantize(net, "int8")


@keras.saving.register_keras_serializable("tests")
class Positions(keras.layers.Layer):
    """Adds a table of positions, or its first rows; the sequence may have no other length."""

    def __init__(self, length, cut=False, **kwargs):
        super().__init__(**kwargs)
        self.length, self.cut = length, cut

    def build(self, input_shape):
        self.table = self.add_weight(name="table", shape=(self.length, input_shape[-1]))

    def call(self, inputs):
        return inputs + (self.table[: inputs.shape[1]] if self.cut else self.table)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "length": self.length, "cut": self.cut}


# Layers after an input, and its shape without the batch.
OPEN_SHAPES: dict[str, Any] = {
    "as long as a table": ([Positions(64)], (None, 16)),
    "within a table": ([Positions(5, cut=True)], (None, 16)),
    "patches": (
        [
            keras.layers.Conv2D(16, 16, strides=16, padding="valid"),
            keras.layers.Reshape((-1, 16)),
            Positions(16),
        ],
        (None, None, 3),
    ),
}


@pytest.mark.parametrize("name", OPEN_SHAPES)
def test_a_call_that_accepts_some_lengths_is_traced(name):
    before, shape = OPEN_SHAPES[name]
    start = keras.Input(shape)
    x = start
    for layer in (*before, Experts(name="bank")):
        x = layer(x)
    _, report = quantize(keras.Model(start, x), "int8")
    kinds = {path.rpartition("/")[2]: kind for path, kind in schemes(report).items()}
    assert kinds["table"] == "Positions is not a quantizable layer"
    assert kinds["up"] == kinds["down"] == "int8 per channel, int8 inputs"


@keras.saving.register_keras_serializable("tests")
class Merges(keras.layers.Layer):
    """Multiplies one of two inputs, which have one length, with its weight."""

    def __init__(self, length, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def build(self, inputs_shape, other_shape):
        self.matrix = self.add_weight(name="matrix", shape=(inputs_shape[-1], 8))

    def call(self, inputs, other, *, scale=1.0):
        total = keras.ops.matmul(keras.ops.ones((1, self.length)), other)
        product = keras.ops.matmul(inputs, self.matrix)
        return keras.ops.add(keras.ops.multiply(scale, product), total)

    def compute_output_shape(self, inputs_shape, other_shape):
        return (*inputs_shape[:-1], 8)

    def get_config(self):
        return {**super().get_config(), "length": self.length}


def test_layers_of_a_graph_that_cannot_be_traced_are_traced_one_by_one():
    start, other = keras.Input((None, 16)), keras.Input((None, 1))
    first = Merges(8, name="first")(start, other=other, scale=2.0)
    inner = keras.Sequential([keras.Input((None, 8)), Experts(name="bank")], name="inner")
    second = Merges(77, name="second")(inner(first), other=other)
    model = keras.Model([start, other], second)
    words = r"problem:\n  second: Merges holds weights and is not quantizable: its call cannot be"
    with pytest.raises(ValueError, match=words):
        quantize(model, "int8")
    quantized, report = quantize(model, jq.W8A16, keep=["second"])
    kinds = schemes(report)
    assert kinds["first/matrix"] == kinds["inner/bank/up"] == "int8 per channel"
    assert kinds["second/matrix"] == "kept"
    x = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
    found = quantized.get_layer("first")(x, other=x[..., :1], scale=2.0)
    assert relative_error(found, model.get_layer("first")(x, other=x[..., :1], scale=2.0)) < 0.01


def test_weights_of_integers_are_not_listed():
    class Picks(keras.layers.Layer):
        def build(self, input_shape):
            picks = {"dtype": "int32", "trainable": False, "initializer": "ones"}
            self.picks = self.add_weight(name="picks", shape=(3, 77), **picks)

        def call(self, inputs):
            return keras.ops.matmul(keras.ops.cast(self.picks, inputs.dtype), inputs)

        def compute_output_shape(self, input_shape):
            return (input_shape[0], 3, input_shape[2])

        def get_config(self):
            return super().get_config()

    start = keras.Input((None, 16))
    model = keras.Model(start, keras.layers.Dense(3)(Picks(name="picks")(start)))
    quantized, report = quantize(model, "int8")
    assert sum(row.scheme is not None for row in report.rows) == 1
    x = np.random.default_rng(0).normal(size=(2, 77, 16)).astype(np.float32)
    assert relative_error(quantized(x), model(x)) < 0.03
