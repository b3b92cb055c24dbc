"""`model.quantize` by Keras' configs of GPTQ and AWQ."""

import warnings
from typing import Any

import keras
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.keras import QuantizableMixin, QuantizedWeight, convert, layers, quantize

from .test_calibrated import TEXT, batches, model_of_every_kind, tokenize
from .test_models import relative_error

OPTIONS = {"num_samples": 16, "sequence_length": 6, "group_size": 16}
CONFIGS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not hasattr(keras.quantizers, name), reason="Keras before 3.14"),
    )
    for name in ("GPTQConfig", "AWQConfig")
]


def config_of(name="GPTQConfig", dataset=None, **options) -> Any:
    make: Any = getattr(keras.quantizers, name)
    return make(TEXT if dataset is None else dataset, tokenize, **{**OPTIONS, **options})


# Keras 3.16 asks for the blocks before it asks layers, and returns a report.
ASKS_FOR_BLOCKS = hasattr(keras.quantizers, "QuantizationReport")


def with_blocks(config, model):
    """The config, with the whole model as one block where Keras asks for blocks."""
    if ASKS_FOR_BLOCKS and config.quantization_layer_structure is None:
        config.quantization_layer_structure = {"sequential_blocks": [model]}
    return config


def quantize_in_place(model, config, **options):
    """The texts of the warnings of `model.quantize`."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.quantize(config.mode, config=config, **options)
    return [str(x.message) for x in found]


def quantized_layers(model):
    return [x.name for x in model._flatten_layers() if getattr(x, "stored_weights", None)]


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_in_place_is_as_its_quantized_copy(name, tmp_path):
    original, test = model_of_every_kind(), batches(5)[-1]
    model = convert(original)
    config = with_blocks(config_of(name, iter(TEXT)), model)  # Can be read only once.
    held = dict(vars(config))
    told = quantize_in_place(model, config)
    assert vars(config) == held
    assert [x for x in told if "float" in x] == [
        f"table stays in float: {config.mode} quantizes layers that multiply activations with "
        "their weights, in the sequential blocks if there are any."
    ] * (not ASKS_FOR_BLOCKS)
    found = np.asarray(model(test))
    copy, _ = quantize(original, config_of(name))
    for layer in ("hidden", "einsum", "head"):
        pair = [x.get_layer(layer).quantized_weight("kernel") for x in (model, copy)]
        np.testing.assert_array_equal(*(x.codes for x in pair))
    assert quantized_layers(model) == [x for x in quantized_layers(copy) if x != "table"]
    nearest, _ = quantize(
        original,
        {"table/*": None, "*": jq.ArrayConfig(format=jq.INT4, group_size=16, symmetric=False)},
    )
    exact = np.asarray(original(test))
    assert relative_error(found, exact) < relative_error(np.asarray(nearest(test)), exact)

    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    fresh = convert(original)
    fresh.load_weights(tmp_path / "model.weights.h5")
    for other in (loaded, fresh):
        np.testing.assert_array_equal(other(test), found)


def stack(ours: bool, blocks: int = 2) -> Any:
    """A table and blocks of two layers each, of jaxquant's or stock classes."""
    keras.utils.set_random_seed(0)
    source: Any = layers if ours else keras.layers
    tokens = keras.Input((6,), dtype="int32")
    x = source.Embedding(40, 32, name="table")(tokens)
    for number in range(blocks):
        block = keras.Sequential(name=f"block_{number}")
        block.add(source.Dense(48, activation="relu", name=f"up_{number}"))
        block.add(source.EinsumDense("btd,df->btf", (None, 32), name=f"down_{number}"))
        x = block(x)
    return keras.Model(tokens, source.Dense(16, name="head")(x), name="stack")


def blocks_of(model):
    blocks = [x for x in model.layers if x.name.startswith("block")]
    return {"pre_block_layers": [model.get_layer("table")], "sequential_blocks": blocks}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_say_which_layers_are_quantized_and_errors_are_as_in_stock_keras(name):
    test, errors = batches(5)[-1], []
    for ours in (False, True):
        model = stack(ours, 1)
        exact = np.asarray(model(test))
        # Tokens: stock Keras does not call a function.
        tokens = [np.concatenate(batches(4)).reshape(-1).astype(np.int32)]
        config = config_of(
            name, tokens, num_samples=32, quantization_layer_structure=blocks_of(model)
        )
        told = quantize_in_place(model, config)
        errors.append(relative_error(np.asarray(model(test)), exact))
    assert sorted(quantized_layers(model)) == ["down_0", "up_0"]
    left = sorted(x.partition(" ")[0] for x in told if "stays in float" in x)
    assert left == ["head", "table"] * (not ASKS_FOR_BLOCKS)
    assert 0 < errors[1] < 1.1 * errors[0]


class Blocks(keras.Model):
    def get_quantization_layer_structure(self, mode=None):
        return blocks_of(self)


IN_BLOCKS = ["down_0", "down_1", "up_0", "up_1"]


def test_blocks_that_the_model_names_and_filters():
    plain = stack(True)
    model = Blocks(plain.input, plain.output)
    quantize_in_place(model, config_of(), filters="up_|head")
    assert quantized_layers(model) == ["up_0", "up_1"]


@pytest.mark.skipif(not ASKS_FOR_BLOCKS, reason="Keras before 3.16")
def test_the_report_of_keras_lists_what_is_quantized():
    plain = stack(True)
    model: Any = Blocks(plain.input, plain.output)
    blocks = blocks_of(model)
    held = dict(blocks)
    report = model.quantize("gptq", config=config_of(quantization_layer_structure=blocks))
    assert blocks == held
    assert sorted(path.rpartition("/")[2] for path, *_ in report.quantized) == IN_BLOCKS
    assert {mode for _, mode, _ in report.quantized} == {"int4"}
    assert [path for path, _ in report.skipped] == ["table", "head"]
    assert "up_1" in model.quantization_summary(verbose=False)


class Gain(QuantizableMixin, keras.layers.Layer):
    matrix = QuantizedWeight(axis=0)

    def build(self, input_shape):
        self.matrix = self.add_weight(name="matrix", shape=(input_shape[-1], 32))

    def call(self, inputs):
        return jq.matmul(inputs, self.operand("matrix"))


def test_layers_of_the_mixin_and_training_afterwards():
    keras.utils.set_random_seed(0)
    start = keras.Input((6,), dtype="int32")
    model: Any = keras.Sequential([start, layers.Embedding(40, 32), Gain()])
    model.add(layers.Dense(3, name="head"))
    model.compile("sgd", "mse")
    x, y = batches(1)[0], np.zeros((16, 6, 3), np.float32)
    model.fit(x, y, verbose=0)
    quantize_in_place(model, with_blocks(config_of(), model))
    assert quantized_layers(model) == ["gain", "head"]
    with pytest.warns(UserWarning, match="compiled before 2 of its 4 trainable variables"):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_config_serves_again_after_an_error_of_keras(in_place):
    asked = []

    def breaks(layer):
        """When Keras asks about another layer in a block than the first."""
        asked.append(layer.name)
        if asked.count("up_1") == 2:
            raise KeyError("broken")
        return True

    model, other, third = (Blocks(x.input, x.output) for x in (stack(True) for _ in range(3)))
    config = config_of()
    with pytest.raises(KeyError, match="broken"):
        quantize_in_place(model, config, filters=breaks)
    assert sorted(quantized_layers(model)) == IN_BLOCKS
    if in_place and ASKS_FOR_BLOCKS:
        with pytest.raises(ValueError, match=r"GPTQConfig that an earlier .* Call"):
            quantize_in_place(other, config)
    if in_place:
        quantize_in_place(other, config)
    else:
        other, _ = quantize(other, config)
    expected, _ = quantize(third, config_of())
    found, wanted = (x.get_layer("block_0").layers[0] for x in (other, expected))
    np.testing.assert_array_equal(*(x.quantized_weight("kernel").codes for x in (found, wanted)))
    assert config.dataset is TEXT
    assert config.quantization_layer_structure is None


def with_stock_head():
    plain = stack(True, 1)
    x = plain.layers[-2].output
    return keras.Model(plain.input, keras.layers.Dense(3, name="stock_head")(x))


def quantized_before():
    model = stack(True, 1)
    model.get_layer("head").quantize("int8")
    return model


def only_a_table():
    return keras.Sequential([keras.Input((6,), dtype="int32"), layers.Embedding(40, 32)])


class Keeps(layers.Dense):
    def build(self, input_shape):
        super().build(input_shape)
        self.kept = [self.kernel]


def with_a_kept_kernel():
    start = keras.Input((6,), dtype="int32")
    return keras.Sequential([start, layers.Embedding(40, 32), layers.Dense(16), Keeps(3)])


PROBLEMS: dict[str, tuple[Any, Any, str]] = {
    "kept": (with_a_kept_kernel, {}, "declares 'kernel' as a QuantizedWeight, so it must keep the"),
    "stock": (with_stock_head, {}, r"stock_head: stock layer; quantize jaxquant\.keras\.convert"),
    "twice": (quantized_before, {}, "Layer 'head' is already quantized"),
    "short": (lambda: stack(True, 1), {"dataset": ["ab"]}, "one sequence of 6 tokens; got 2"),
    "groups": (lambda: stack(True, 1), {"group_size": 5}, "methods need groups that divide"),
    "nothing": (only_a_table, {}, "no layer multiplies activations"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_errors_change_nothing(name):
    make, options, words = PROBLEMS[name]
    if name == "nothing" and ASKS_FOR_BLOCKS:
        pytest.skip("Keras asks no layer.")
    model = make()
    before, known = model.get_weights(), quantized_layers(model)
    config = with_blocks(config_of(**options), model)
    held = dict(vars(config))
    with pytest.raises(ValueError, match=words):
        model.quantize("gptq", config=config)
    assert vars(config) == held
    assert quantized_layers(model) == known
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_one_layer_says_what_to_call():
    layer = layers.Dense(3)
    layer.build((None, 4))
    words = r"gptq quantizes a whole model.*the layer 'dense.*alone\. Call model\.quantize\('gptq'"
    with pytest.raises(ValueError, match=words):
        layer.quantize("gptq", config=config_of())
