"""Custom layers and subclassed models that create stock layers in their own code."""

import functools
from typing import Any

import keras
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.keras import (
    Float8QuantizationConfig,
    Int4QuantizationConfig,
    convert,
    layers,
    quantize,
    to_stock,
)
from jaxquant.keras.compat import sublayers

from .layer_cases import CORE as CASES

stock = keras.layers


@keras.saving.register_keras_serializable()
class Feed(stock.Layer):
    """Creates one layer in `__init__`, and one without a name in `build`."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.up = stock.Dense(width, activation="relu", name="up")

    def build(self, input_shape):
        self.up.build(input_shape)
        self.down = stock.EinsumDense("bsk,kn->bsn", (None, input_shape[-1]))
        self.down.build((*input_shape[:-1], self.up.units))
        self.gain = self.add_weight(name="gain", shape=(input_shape[-1],), initializer="ones")

    def call(self, inputs):
        return inputs + self.gain * self.down(self.up(inputs))


class Network(keras.Model):
    """Layers in lists and dicts, one of them shared, made again from a config of two integers."""

    def __init__(self, width=24, count=2, **kwargs):
        super().__init__(**kwargs)
        self.table = stock.Embedding(11, 16, name="table")
        self.blocks = [Feed(width, name=f"block_{i}") for i in range(count)]
        self.parts = {"attention": stock.MultiHeadAttention(2, 8, name="attention")}
        self.again = self.blocks[0]
        self.lstm = stock.LSTM(8, unroll=True, name="lstm")
        self.head = stock.Dense(5, bias_initializer="normal", name="head")

    def call(self, inputs):
        x = self.table(inputs)
        for block in [*self.blocks, self.again]:
            x = block(x)
        return self.head(self.lstm(self.parts["attention"](x, x)))

    def top(self, inputs):
        """A method of its own."""
        return keras.ops.argmax(self(inputs), axis=-1)


def tokens():
    return np.random.default_rng(0).integers(0, 11, (3, 2))


@functools.cache
def network() -> Any:
    """Shared: it stays as it is."""
    keras.utils.set_random_seed(0)
    model = Network(name="net")
    model(tokens())
    return model


def graph() -> Any:
    keras.utils.set_random_seed(0)
    start = keras.Input((4, 16))
    x = Feed(24, name="feed")(start)
    return keras.Model(start, stock.Dense(3, name="head")(x), name="graph")


def relative_error(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def reasons_of(report) -> dict[str, str]:
    return {row.path: row.reason or "" for row in report.rows}


def kinds(model):
    return [(x.name, type(x).__name__, type(x).__module__.split(".")[0]) for x in sublayers(model)]


def test_a_subclassed_model_is_converted_and_quantized():
    model = network()
    wanted, before = np.asarray(model(tokens())), kinds(model)
    ours = convert(model)
    np.testing.assert_array_equal(ours(tokens()), wanted)
    assert isinstance(ours, Network)
    assert type(ours).__name__ == "Network"
    assert isinstance(ours.blocks[1].down, layers.EinsumDense)
    assert ours.again is ours.blocks[0]
    # The declaration holds it, not an attribute beside it.
    assert "kernel" not in vars(ours.lstm.cell)
    assert [v.path for v in ours.weights] == [v.path for v in model.weights]

    quantized, report = quantize(model, jq.W8A8)
    assert 0 < relative_error(quantized(tokens()), wanted) < 0.03
    np.testing.assert_array_equal(quantized.top(tokens()), np.argmax(quantized(tokens()), axis=-1))
    done = [row.path for row in report.rows if row.scheme]
    matrices = [v.path for v in model.weights if v.name in MATRICES]
    assert done == matrices
    assert len(done) == 1 + 2 * 2 + 4 + 2 + 1
    assert {v.path for v in quantized.weights} >= {v.path for v in model.weights}
    reasons = reasons_of(report)
    assert reasons["net/block_0/gain"] == "Feed is not a quantizable layer"

    # Nothing holds the float matrices.
    held = [v for x in sublayers(quantized) for v in vars(x).values()]
    assert not [v for v in held if isinstance(v, keras.Variable) and v.name in MATRICES]

    assert kinds(model) == before
    assert type(model) is Network
    np.testing.assert_array_equal(model(tokens()), wanted)


MATRICES = ("embeddings", "kernel", "recurrent_kernel")


def test_rules_keep_and_counts_reach_into_custom_layers():
    model = network()
    rules: Any = {"*/block_1/*": jq.NF4A16, "*/up/kernel": jq.W8A16}
    quantized, report = quantize(model, rules)
    formats = {row.path: row.scheme for row in report.rows if row.scheme}
    assert set(formats) == {v.path for v in model.weights if "up/kernel" in v.path} | {
        v.path for v in model.blocks[1].weights if v.name == "kernel"
    }
    assert quantized.blocks[0].up.quantized_weight("kernel").format == jq.INT8
    assert quantized.blocks[1].up.quantized_weight("kernel").format == jq.NF4

    quantized, report = quantize(model, "int8", keep=["block_0", stock.LSTM])
    reasons = reasons_of(report)
    assert reasons["net/block_0/up/kernel"] == reasons["net/lstm/lstm_cell/kernel"] == "kept"
    assert type(quantized.blocks[0]) is Feed
    assert type(quantized.blocks[0].up) is stock.Dense
    assert not reasons["net/block_1/up/kernel"]
    with pytest.raises(ValueError, match="keep: no layer is 'block_7'"):
        quantize(model, "int8", keep=["block_7"])


@pytest.mark.parametrize("make", [network, graph])
def test_files_of_a_model_with_custom_layers(make, tmp_path):
    model = make()
    x = tokens() if make is network else np.random.default_rng(0).normal(size=(2, 4, 16))
    quantized, _ = quantize(model, Int4QuantizationConfig(block_size=8))
    wanted = np.asarray(quantized(x))
    quantized.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"Network": Network}
    )
    np.testing.assert_array_equal(loaded(x), wanted)
    # Keras counts layers without a name.
    assert [kind for _, *kind in kinds(loaded)] == [kind for _, *kind in kinds(quantized)]
    loaded.save(tmp_path / "again.keras")  # Of a model that was loaded.
    again: Any = keras.saving.load_model(
        tmp_path / "again.keras", custom_objects={"Network": Network}
    )
    np.testing.assert_array_equal(again(x), wanted)
    quantized.save_weights(tmp_path / "model.weights.h5")
    floats = convert(model)
    floats.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(floats(x), wanted)
    # Weights of the float model fit its conversion.
    model.save_weights(tmp_path / "float.weights.h5")
    floats = convert(model)
    floats.load_weights(tmp_path / "float.weights.h5")
    np.testing.assert_array_equal(floats(x), model(x))


def test_a_class_that_is_not_registered_is_named_when_it_is_missing(tmp_path):
    quantized, _ = quantize(network(), "int8")
    quantized.save(tmp_path / "model.keras")
    with pytest.raises(TypeError, match="Could not locate class 'Network'"):
        keras.saving.load_model(tmp_path / "model.keras")


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("mode", ["int8", Float8QuantizationConfig(training=True)])
def test_copies_of_quantized_models(mode):
    model = graph()
    x = np.random.default_rng(0).normal(size=(2, 4, 16)).astype("f")
    ours = convert(model)
    ours.quantize(**({"mode": mode} if isinstance(mode, str) else {"config": mode}))
    again = convert(ours)
    np.testing.assert_array_equal(again(x), ours(x))
    assert kinds(again) == kinds(ours)
    if mode == "int8":
        back = to_stock(ours)
        assert kinds(back) == kinds(model)
        assert type(back.layers[1]) is Feed
        assert back.layers[1].up.quantization_mode == "int8"
        assert relative_error(back(x), ours(x)) < 1e-5


def test_the_policies_of_a_model_survive_its_config():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        quantized, _ = quantize(network.__wrapped__(), jq.W8A16)
    finally:
        keras.config.set_dtype_policy("float32")
    names = [x.dtype_policy.name for x in sublayers(quantized)]
    quantized.get_config()
    assert [x.dtype_policy.name for x in sublayers(quantized)] == names
    assert "int8_from_mixed_bfloat16" in names


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_layer_is_the_same_inside_a_custom_layer(case):
    keras.utils.set_random_seed(0)
    inputs = case.inputs(np.random.default_rng(0), (2, *case.input_shape))
    ours = case.make(name="inner")
    config = ours.get_config()
    cls = getattr(stock, type(ours).__name__)
    start = keras.Input(case.input_shape, dtype=inputs.dtype.name)
    plain: Any = keras.Sequential([start, cls.from_config(config)])
    held: Any = keras.Sequential([start, Holder(cls.__name__, config)])
    held.set_weights(plain.get_weights())
    wanted, expected = quantize(plain, "int8")
    found, report = quantize(held, "int8")
    np.testing.assert_array_equal(found(inputs), wanted(inputs))
    assert [r.scheme for r in report.rows] == [r.scheme for r in expected.rows]
    assert any(r.scheme for r in report.rows)


class Holder(stock.Layer):
    """Creates a layer in `build`."""

    def __init__(self, kind, arguments, **kwargs):
        super().__init__(**kwargs)
        self.kind, self.arguments = kind, dict(arguments)

    def build(self, input_shape):
        self.inner = getattr(stock, self.kind).from_config(dict(self.arguments))
        self.inner.build(input_shape)

    def call(self, inputs):
        return self.inner(inputs)

    def get_config(self):
        own = {"kind": self.kind, "arguments": self.arguments}
        return {**super().get_config(), **own}


class Normed(stock.Layer):
    """Creates a wrapper that shares the kernel of its layer."""

    def build(self, input_shape):
        self.norm = stock.SpectralNormalization(stock.Dense(16, name="shared"), name="norm")
        self.plain = stock.Dense(16, name="plain")
        self.norm.build(input_shape)
        self.plain.build(input_shape)

    def call(self, inputs):
        return self.plain(self.norm(inputs))


def test_a_kernel_that_a_wrapper_shares_stays_in_float_inside_a_custom_layer(tmp_path):
    model = keras.Sequential([keras.Input((16,)), Normed(name="normed")])
    quantized, report = quantize(model, "int8")
    reasons = reasons_of(report)
    kernels = [path for path in reasons if path.endswith("shared/kernel")]
    assert [reasons[path] for path in kernels] == ["SpectralNormalization shares it with its layer"]
    quantized.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"Normed": Normed}
    )
    assert type(loaded.layers[0].norm.layer) is stock.Dense
    np.testing.assert_array_equal(loaded(X[0]), quantized(X[0]))


class Unnamed(keras.Model):
    """Layers in nested lists, in a dict and in a tuple; Keras names and counts them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.pairs = [[stock.Dense(16), stock.Dense(16)] for _ in range(2)]
        self.heads = {"a": [stock.Dense(16), stock.Dropout(0.5)], "b": (stock.Dense(16),)}

    def build(self, input_shape):
        for layer in [x for pair in self.pairs for x in pair] + [*self.heads["b"]]:
            layer.build(input_shape)
        self.heads["a"][0].build(input_shape)
        self.shift = self.add_weight(shape=(16,), initializer="normal")
        self.gain = self.add_weight(shape=(16,), initializer="normal")

    def call(self, inputs, training=False):
        for first, second in self.pairs:
            inputs = second(first(inputs))
        inputs = self.gain * inputs + self.shift
        dense, dropout = self.heads["a"]
        return self.heads["b"][0](dropout(dense(inputs), training=training))

    def get_config(self):
        return {"name": self.name}


@pytest.fixture
def names_counted_again():
    yield keras.utils.clear_session
    keras.utils.clear_session()


def unnamed() -> Any:
    keras.utils.set_random_seed(0)
    model: Any = Unnamed(name="net")
    model(X[0])
    for weight in model.weights:
        if len(weight.shape) == 1:
            weight.assign(np.random.default_rng(0).normal(size=weight.shape))
    return model


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("count", [0, 1])
def test_layers_without_a_name_are_copied_in_their_order(count, names_counted_again):
    names_counted_again()
    _ = [(stock.Dense(1), keras.Variable(0.0)) for _ in range(count)]
    model = unnamed()
    names_counted_again()  # Names of the copy's layers overlap with those of others in the model.
    ours = convert(model)
    np.testing.assert_array_equal(ours(X[0]), model(X[0]))
    assert [v.path for v in ours.weights] == [v.path for v in model.weights]
    _, dropout = ours.heads["a"]
    assert dropout.name == model.heads["a"][1].name

    # Copies of a quantized model.
    quantized, _ = quantize(model, "int8")
    again = convert(quantized)
    np.testing.assert_array_equal(again(X[0]), quantized(X[0]))
    assert {v.path for v in again.weights} == {v.path for v in quantized.weights}
    assert relative_error(to_stock(quantized)(X[0]), quantized(X[0])) < 1e-5
    with pytest.raises(ValueError, match=r"these 6 problems:\n  .*kernel is already quantized"):
        quantize(quantized, "int8")


# What cannot be done.


class Bare(stock.Layer):
    """Multiplies with its own weight, which it keeps in a list, and adds another one."""

    def build(self, input_shape):
        self.matrices = [self.add_weight(name="matrix", shape=(input_shape[-1], 16))]
        self.places = self.add_weight(name="places", shape=(4, 16))

    def call(self, inputs):
        return inputs @ self.matrices[0] + self.places


class Adds(Bare):
    """Has a matrix that it only adds."""

    def call(self, inputs):
        return inputs + self.places + keras.ops.sum(self.matrices[0])


@keras.saving.register_keras_serializable()
class Raises(Feed):
    """Its config raises an error that Keras does not expect."""

    def get_config(self):
        raise AttributeError("no attribute 'rope'")


def odd(*extra) -> Any:
    keras.utils.set_random_seed(0)
    start = keras.Input((4, 16))
    x = start
    for layer in extra:
        x = layer(x)
    return keras.Model(start, stock.Dense(3, name="head")(x), name="odd")


X = np.random.default_rng(0).normal(size=(2, 4, 16)).astype(np.float32)


def test_only_matrices_that_are_multiplied_are_a_problem():
    quantized, report = quantize(odd(Adds(name="adds")), "int8")
    reasons = reasons_of(report)
    assert reasons["adds/matrix"] == "Adds is not a quantizable layer"
    assert quantized.get_layer("head").quantization_mode == "int8"
    # A subclassed model is called on the shape that it was built for.
    subclassed: Any = keras.Sequential([Adds(name="adds"), stock.Dense(2)])
    outer: Any = Outer(subclassed)
    outer(X)
    _, report = quantize(outer, "int8")
    assert [row.path for row in report.rows if row.scheme] == ["outer/sequential/dense/kernel"]


class Outer(keras.Model):
    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, inputs):
        return self.inner(inputs)

    def get_config(self):
        return {"inner": keras.saving.serialize_keras_object(self.inner)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["inner"]))


def test_what_cannot_be_quantized_is_listed_or_left():
    model = odd(Bare(name="bare"), Raises(24, name="raises"), stock.Dense(16, name="nan"))
    model.get_layer("nan").kernel.assign(np.full((16, 16), np.nan))
    with pytest.raises(ValueError, match="these 2 problems") as error:
        quantize(model, "int8")
    text = str(error.value)
    assert "bare: Bare holds weights and is not quantizable" in text
    assert "or strict=False to leave all such layers in float" in text
    assert "raises: Raises cannot be made from its config: AttributeError: no attribute" in text

    quantized, report = quantize(model, "int8", strict=False)
    reasons = reasons_of(report)
    assert reasons["bare/matrix"] == "Bare is not a quantizable layer"
    assert reasons["raises/up/kernel"].startswith("shared with the given model: Raises cannot be")
    assert reasons["nan/kernel"].startswith("nan/kernel holds NaN or Inf")
    assert not reasons["head/kernel"]
    assert quantized.get_layer("raises").up.kernel is model.get_layer("raises").up.kernel
    assert type(model.get_layer("raises").up) is stock.Dense
    # The graph of the given model is as it was.
    assert model.get_layer("raises").output is not quantized.get_layer("raises").output
    with pytest.raises(ValueError, match="nan/kernel holds NaN"):
        quantize(model, {"nan/*": jq.W8A8}, strict=False)


def test_a_layer_that_cannot_be_copied_is_shared_if_it_is_kept():
    model = odd(Raises(24, name="raises"))
    wanted = np.asarray(model(X))
    quantized, report = quantize(model, "int8", keep=["raises"])
    reasons = reasons_of(report)
    assert "AttributeError: no attribute 'rope'" in reasons["raises/up/kernel"]
    assert 0 < relative_error(quantized(X), wanted) < 0.03
    np.testing.assert_array_equal(model(X), wanted)


def test_models_that_cannot_be_made_from_their_config():
    outer: Any = Adds2(lambda x: x)
    outer(X)
    with pytest.raises(ValueError, match="Adds2 cannot be made from its config: NotImpl"):
        quantize(outer, "int8", strict=False)
    grows: Any = Grows(2)
    grows(X)
    with pytest.raises(ValueError, match="Grows makes 2 layers from its config; got one with 3"):
        convert(grows)
    other: Any = Grows(kind=stock.EinsumDense, arguments=("bi,io->bo", 16))
    other(X[0])
    with pytest.raises(ValueError, match="Grows makes layers of other classes from its config"):
        convert(other)
    narrow: Any = Grows(arguments=(4,))
    narrow(X[0])
    shapes = r"shapes \[\(16, 16\), \(16,\)\] from its config; got one with \[\(16, 4\), \(4,\)\]"
    with pytest.raises(ValueError, match=shapes):
        convert(narrow)
    with pytest.raises(ValueError, match="Feed is not built; call the model on data first"):
        convert(keras.Sequential([Feed(4)]))


class Adds2(keras.Model):
    def __init__(self, function):
        super().__init__()
        self.function, self.dense = function, stock.Dense(3)

    def call(self, inputs):
        return self.dense(self.function(inputs))


class Grows(keras.Model):
    """Its config does not hold how many layers it has, nor of which class and size."""

    def __init__(self, count=1, kind=stock.Dense, arguments=(16,)):
        super().__init__()
        self.parts = [kind(*arguments) for _ in range(count)]

    def call(self, inputs):
        for part in self.parts:
            inputs = part(inputs)
        return inputs

    def get_config(self):
        return {}


class Own(keras.Model):
    """A functional model with a constructor of its own, which its config calls."""

    def __init__(self, units, **kwargs):
        start = keras.Input((16,))
        dense = stock.Dense(units, name="dense")
        super().__init__(start, dense(start), **kwargs)
        self.dense, self.units = dense, units

    def get_config(self):
        return {"units": self.units, "name": self.name}

    def doubled(self, inputs):
        return 2 * self.dense(inputs)


def test_functional_models_keep_their_class_and_methods(tmp_path):
    model = Own(3, name="own")
    quantized, _ = quantize(keras.Sequential([keras.Input((16,)), model]), "int8")
    inner: Any = quantized.layers[0]
    assert isinstance(inner, Own)
    np.testing.assert_array_equal(inner.doubled(X[0]), 2 * inner(X[0]))
    assert inner.dense is inner.layers[1]
    quantized.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Own": Own})
    np.testing.assert_array_equal(loaded(X[0]), quantized(X[0]))


def test_a_converted_model_is_quantized_in_place():
    ours = convert(graph())
    wanted = np.asarray(ours(X))
    ours.quantize("int8")
    feed = ours.get_layer("feed")
    assert feed.up.quantization_mode == feed.down.quantization_mode == "int8"
    assert 0 < relative_error(ours(X), wanted) < 0.03
    with pytest.raises(ValueError, match="already quantized"):
        feed.up.quantize("int8")
    feed = convert(graph()).get_layer("feed")
    feed.up.kernel.assign(np.full(feed.up.kernel.shape, np.inf))
    with pytest.raises(ValueError, match="up/kernel holds NaN or Inf"):
        feed.up.quantize("int8")
    assert feed.up.quantization_mode is None
