"""Converting whole models from stock layers to jaxquant layers, and back."""

import functools
import re
from typing import Any

import jax
import keras
import numpy as np
import pytest

from jaxquant import NF4A16, W4A16, W8A8, W8A16
from jaxquant.keras import (
    AbsMaxQuantizer,
    Int4QuantizationConfig,
    Int8QuantizationConfig,
    PercentileQuantizer,
    QuantizableMixin,
    QuantizationConfig,
    QuantizedWeight,
    convert,
    layers,
    to_stock,
)
from jaxquant.keras.compat import sublayers
from jaxquant.keras.models.composite import COUNTERPARTS
from jaxquant.keras.models.convert import stock_class

HAS_BLOCKS = "block_size" in keras.quantizers.Int4QuantizationConfig().get_config()


@functools.cache
def whole_model() -> Any:
    """A functional model with every kind of structure; many weights share one shape, for speed."""
    x = keras.Input((3, 8), name="x")
    t = keras.Input((3,), dtype="int32", name="t")
    shared = keras.layers.Dense(8, activation="relu", name="shared")
    z = keras.layers.Add()([shared(x), shared(keras.layers.Embedding(11, 8, name="table")(t))])
    z = keras.layers.MultiHeadAttention(2, 4, name="attention")(z, z)
    z = keras.layers.LayerNormalization()(keras.ops.add(z, 1.0))
    lstm = keras.layers.LSTM(4, return_sequences=True, dropout=0.1, unroll=True)
    z = keras.layers.Bidirectional(lstm, name="both")(z)
    z = keras.layers.TimeDistributed(keras.layers.Dense(8), name="each")(z)
    middle = [
        keras.layers.Conv1D(8, 3, name="conv", bias_initializer="normal"),
        keras.layers.BatchNormalization(),
        keras.layers.Lambda(lambda y: keras.ops.add(keras.ops.sin(y), np.pi)),
    ]
    inner = keras.Sequential([keras.Input((3, 8)), *middle], name="inner")
    y = keras.layers.RNN(keras.layers.GRUCell(4, name="cell"), name="rnn", unroll=True)(inner(z))
    y = keras.layers.Dense(3, name="last")(keras.layers.Dropout(0.3)(y))
    return keras.Model({"x": x, "t": t}, {"y": y, "z": z}, name="whole")


def whole_inputs():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(4, 3, 8)).astype("f"), "t": rng.integers(0, 11, (4, 3))}


def outputs(model, inputs):
    """All outputs, compiled once."""
    return jax.jit(lambda x: model(x))(inputs)


def assert_equal(found, wanted):
    keras.tree.map_structure(np.testing.assert_array_equal, found, wanted)


def classes(model):
    return {x.name: type(x) for x in sublayers(model) if x.variables}


@pytest.mark.slow
def test_convert_changes_only_the_classes_and_to_stock_undoes_it():
    model, inputs = whole_model(), whole_inputs()
    model.get_layer("inner").get_layer("conv").trainable = False
    model.get_layer("both").forward_layer.trainable = False
    model.compile("adam", loss=lambda y, z: keras.ops.sum(y - z))
    before = [np.array(v) for v in model.variables]
    copy = convert(model)

    assert_equal([np.array(v) for v in model.variables], before)
    assert [v.path for v in copy.weights] == [v.path for v in model.weights]
    assert [v.path for v in copy.trainable_weights] == [v.path for v in model.trainable_weights]
    assert copy.name == "whole"
    assert not copy.compiled
    assert copy.get_layer("shared") in copy.layers
    found = classes(copy)
    for name, cls in classes(model).items():
        ours = getattr(layers, cls.__name__, None)
        assert found[name] is (ours or cls), name
    assert found["shared"] is layers.Dense
    assert found["cell"] is layers.GRUCell
    back = to_stock(copy)
    assert classes(back) == classes(model)
    # With dropout, so that seeds matter too.
    wanted = model(inputs, training=True)
    assert_equal(copy(inputs, training=True), wanted)
    assert_equal(back(inputs, training=True), wanted)


def test_every_layer_replaces_the_stock_layer_of_its_name():
    names = [n for n, x in vars(layers).items() if isinstance(x, type)]
    pairs = {getattr(keras.layers, n): getattr(layers, n) for n in names}
    # Wrappers that are the same class replace nothing.
    assert {stock: ours for stock, ours in pairs.items() if stock is not ours} == COUNTERPARTS
    assert all(stock_class(ours) is stock for stock, ours in COUNTERPARTS.items())


def test_convert_copies_the_arrays():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    copy = convert(model)
    before = model.get_weights()
    # Training donates the arrays of a model.
    copy.compile("sgd", loss="mse")
    copy.fit(np.ones((2, 4)), np.ones((2, 2)), verbose=0)
    assert_equal(model.get_weights(), before)


def test_convert_keeps_jaxquant_layers():
    model: Any = keras.Sequential([keras.Input((8,)), layers.Dense(5, name="a")])
    model.quantize("int8")
    copy = convert(keras.Sequential([model, keras.layers.Dense(2)]))
    dense = copy.layers[0].get_layer("a")
    assert dense.quantization_mode == "int8"
    assert_equal(copy.layers[0](np.ones((2, 8))), model(np.ones((2, 8))))
    assert type(copy.layers[1]) is layers.Dense


def test_convert_sequential_models_that_are_not_built():
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dense(2)], name="late")
    copy = convert(model)
    assert not copy.built
    assert copy(np.ones((2, 4))).shape == (2, 2)
    assert not model.built


class Trainer(keras.Model):
    def train_step(self, *args):
        return {"loss": 0.5}


class TinyModel(keras.Model):
    """Its constructor does not accept the name that its config holds."""

    def __init__(self):
        start = keras.Input((4,))
        super().__init__(start, keras.layers.Dense(2)(start))


def test_convert_keeps_the_model_class_where_possible():
    start = keras.Input((4,))
    model = Trainer(start, keras.layers.Dense(2)(start))
    assert type(convert(model)) is Trainer
    tiny = convert(TinyModel())
    assert not isinstance(tiny, TinyModel)
    assert type(tiny.layers[-1]) is layers.Dense


class Own(keras.layers.Layer):
    def build(self, input_shape):
        self.factors = [self.add_weight(name="factor", shape=(input_shape[-1], 4))]

    def call(self, inputs):
        return inputs @ self.factors[0]


class MyDense(keras.layers.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.other = self.add_weight(name="kernel", shape=(3, 3))


class Block(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inside = keras.layers.Dense(4, name="inside")

    def build(self, input_shape):
        self.inside.build(input_shape)

    def call(self, inputs):
        return self.inside(inputs)


class NoConfig(keras.layers.Layer):
    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


class Scale(QuantizableMixin, keras.layers.Layer):
    kernel = QuantizedWeight(axis=0)

    def build(self, input_shape):
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1],))

    def call(self, inputs):
        return inputs * self.kernel


def test_convert_lists_every_unsupported_layer():
    quantized = keras.layers.Dense(4, name="stock")
    quantized.build((None, 4))
    quantized.quantize("int8")
    parts = [Own(name="own"), MyDense(4, name="mine"), Block(name="block"), quantized]
    parts += [NoConfig(keras.ops.sin, name="bare"), Scale(name="fine")]
    model = keras.Sequential([keras.Input((4,)), *parts], name="odd")
    with pytest.raises(ValueError, match=r"'odd' was not changed; fix these 4 problems") as error:
        convert(model)
    text = str(error.value)
    for words in (
        "odd/own: Own holds weights.*derive it from jaxquant.keras.QuantizableMixin, or pass keep",
        "odd/mine: MyDense holds weights.*derive it from jaxquant.keras.layers.Dense",
        "Dense is quantized to int8 by stock Keras; convert the float model",
        "bare: NoConfig cannot be made from its config: NotImplementedError: .*the object must "
        r"override `get_config\(\)` .*Write its get_config, and register",
    ):
        assert re.search(words, text), text


def test_convert_keeps_the_layers_named_by_keep():
    parts = [Own(name="own"), Block(name="block"), keras.layers.Dense(3, name="head")]
    model = keras.Sequential([keras.Input((4,)), *parts, keras.layers.Dense(2)])
    copy = convert(model, keep=["own", Block, "head"])
    assert [type(x) for x in copy.layers] == [Own, Block, keras.layers.Dense, layers.Dense]
    assert_equal(copy(np.ones((2, 4))), model(np.ones((2, 4))))
    with pytest.raises(
        ValueError, match=r"keep: no layer is 'hed'; layers are in\w+, own, block, "
    ):
        convert(model, keep=["own", Block, "hed"])


STOCK_MODES = {
    "int8": Int8QuantizationConfig(),
    "int8 weights": QuantizationConfig(W8A16),
    "int8 narrow inputs": Int8QuantizationConfig(
        activation_quantizer=AbsMaxQuantizer(value_range=(-100, 100))
    ),
    "int4 and 8-bit inputs": Int4QuantizationConfig(
        block_size=None, activation_quantizer=AbsMaxQuantizer()
    ),
    "int4 block 32": Int4QuantizationConfig(block_size=32),
    "int4 symmetric groups": QuantizationConfig({"*": W4A16}),
}
# Modes that differ in the layout of codes and scales per kind of layer; others vary these.
SHAPES = ("int8", "int4 and 8-bit inputs", "int4 block 32")


@functools.cache
def stock_dense():
    x = keras.Input((5, 40), name="x")
    return keras.Model({"x": x}, {"dense": keras.layers.Dense(7, bias_initializer="normal")(x)})


@functools.cache
def stock_model():
    x, t = keras.Input((5, 40), name="x"), keras.Input((5,), dtype="int32", name="t")
    return keras.Model(
        {"x": x, "t": t},
        {
            "dense": keras.layers.Dense(7, bias_initializer="normal")(x),
            "table": keras.layers.Embedding(11, 50)(t),
            # EinsumDense in both directions.
            "attention": keras.layers.MultiHeadAttention(2, 7, bias_initializer="normal")(x, x),
        },
    )


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("mode", STOCK_MODES)
def test_to_stock_gives_the_same_codes(mode):
    rng, model = np.random.default_rng(0), stock_model() if mode in SHAPES else stock_dense()
    inputs = {"x": rng.normal(size=(4, 5, 40)).astype("f"), "t": rng.integers(0, 11, (4, 5))}
    inputs = {x.name: inputs[x.name] for x in model.inputs}
    ours = convert(model)
    ours.quantize(config=STOCK_MODES[mode])
    if "int4" in mode and not HAS_BLOCKS:
        with pytest.raises(ValueError, match=r"packs another axis; update to 3\.14"):
            to_stock(ours)
        return
    stock = to_stock(ours)
    assert classes(stock) == classes(model)
    with_codes = [x for x in sublayers(stock) if x.variables and not sublayers(x)[1:]]
    assert {x.quantization_mode for x in with_codes} == {mode[:4]}
    found, wanted = outputs(stock, inputs), outputs(ours, inputs)
    for name in wanted:
        error = np.linalg.norm(found[name] - wanted[name])
        assert error < 1e-5 * np.linalg.norm(wanted[name]), name


def test_dequantized_layers_keep_their_random_seeds():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3, 8)), layers.GRU(4, dropout=0.5, unroll=True)])
    model.quantize("int8")
    stock = to_stock(model, dequantize=True)
    found, wanted = ([v for v in x.variables if v.dtype == "uint32"] for x in (stock, model))
    assert len(wanted) == 1
    assert_equal(found, wanted)


@pytest.mark.slow
def test_to_stock_lists_what_stock_keras_lacks():
    original, inputs = whole_model(), whole_inputs()
    model = convert(original)
    model.quantize(config=QuantizationConfig({"attention/*": None, "table/*": None, "*": W8A8}))
    with pytest.raises(ValueError, match="fix these 5 problems") as error:
        to_stock(model)
    assert "rnn/cell: GRUCell with QTensor(int8 8x12" in str(error.value)
    assert "Keras does not have the mode for this layer; pass dequantize=True" in str(error.value)
    assert "stock TimeDistributed uses the codes of its layer as weights" in str(error.value)
    back = to_stock(model, dequantize=True)
    assert classes(back) == classes(original)
    assert back.get_layer("shared").quantization_mode == "int8"
    assert back.get_layer("inner").get_layer("conv").quantization_mode is None
    found = outputs(back, inputs)
    for key, wanted in outputs(model, inputs).items():
        error = np.linalg.norm(found[key] - wanted)
        # Inputs of the float layers are no longer rounded.
        assert error < 0.05 * np.linalg.norm(wanted)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize(
    "config, words",
    [
        (QuantizationConfig(NF4A16), "Keras does not have the mode"),
        (Int4QuantizationConfig(None, AbsMaxQuantizer(), 4), "does not quantize activations|packs"),
        (
            Int8QuantizationConfig(activation_quantizer=PercentileQuantizer()),
            "by abs-max only, not by",
        ),
    ],
)
def test_to_stock_raises_for_modes_that_stock_layers_lack(config, words):
    model: Any = keras.Sequential([keras.Input((8,)), layers.Dense(5)])
    model.quantize(config=config)
    with pytest.raises(ValueError, match=words):
        to_stock(model)
    floats: Any = to_stock(model, dequantize=True).layers[0]
    np.testing.assert_array_equal(floats.kernel, model.layers[0].kernel)


def test_to_stock_raises_for_custom_layers():
    model = keras.Sequential([keras.Input((8,)), Scale(name="scale")])
    with pytest.raises(ValueError, match="Scale is a quantizable layer that Keras does not have"):
        to_stock(model, dequantize=True)
    assert type(to_stock(model, keep=[Scale]).layers[0]) is Scale
