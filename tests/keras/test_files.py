"""Weight files: interchange with stock Keras, and files that cannot be loaded."""

import functools
import json
from typing import Any

import jax
import keras
import numpy as np
import pytest

from jaxquant import NF4A16
from jaxquant.keras import (
    Float8QuantizationConfig,
    Int4QuantizationConfig,
    Int8QuantizationConfig,
    QuantizableMixin,
    QuantizationConfig,
    QuantizedWeight,
    layers,
)
from jaxquant.keras.files import MARK

# Keras before 3.14 does not have blocks, and packs int4 along the other axis except in tables.
HAS_BLOCKS = "block_size" in keras.quantizers.Int4QuantizationConfig().get_config()


def einsum(equation, shape, **kwargs):
    return lambda kind: kind.EinsumDense(equation, shape, bias_initializer="normal", **kwargs)


# Layer, input shape of one example.
CASES: dict[str, Any] = {
    "dense": (lambda kind: kind.Dense(7, bias_initializer="normal"), (20,)),
    "one row": (lambda kind: kind.Dense(5), (1,)),
    "heads": (einsum("abc,cde->abde", (5, 3, 7), bias_axes="de"), (5, 20)),
    "two contracted": (einsum("abcd,cde->abe", (5, 9)), (5, 4, 8)),
    "transposed output": (einsum("abc,cde->abed", (5, 7, 3)), (5, 20)),
    "contracted last": (einsum("ab,cb->ac", (9,)), (20,)),
    "batch axis": (einsum("abc,bcd->abd", (5, 9)), (5, 20)),
    "few free axes": (einsum("abcd,bcde->ae", (6,)), (3, 4, 5)),
    "table": (lambda kind: kind.Embedding(11, 20), (6,)),
}
# For each layer, int4 block sizes that differ in kind: all rows, whole blocks, a smaller last
# block, and more than the number of rows.
BLOCK_SIZES = {
    "dense": (-1, 3),
    "one row": (-1,),
    "heads": (3,),
    "few free axes": (64,),
    "table": (3,),
}
# Keras reshapes the kernel to a matrix and groups along its rows: sometimes other groups.
UNLIKE_OURS = {
    "contracted last": (-1,),
    "batch axis": (8,),
    "two contracted": (3,),
}


def rows(block_sizes):
    return [(case, size) for case, sizes in block_sizes.items() for size in sizes]


def model_of(case, kind) -> Any:
    make, shape = CASES[case]
    dtype = "int32" if case == "table" else "float32"
    return keras.Sequential([keras.Input(shape, dtype=dtype), make(kind)])


def inputs_of(case):
    rng, shape = np.random.default_rng(0), (3, *CASES[case][1])
    return rng.integers(0, 11, shape) if case == "table" else rng.normal(size=shape).astype("f4")


def call(model, inputs):
    """The outputs, compiled once."""
    return jax.jit(lambda x: model(x))(inputs)


def near(found, wanted):
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


def quantize_stock(model, mode, **config: Any):
    """Quantizes the only layer, because a model would warn about its input."""
    configs: Any = {"int4": keras.quantizers.Int4QuantizationConfig}
    if config:
        model.layers[-1].quantize(config=configs[mode](activation_quantizer=None, **config))
    else:
        model.layers[-1].quantize(mode)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("case", CASES)
def test_int8_files_interchange_with_stock_keras(case, tmp_path):
    path, inputs = tmp_path / "model.weights.h5", inputs_of(case)
    stock, ours, again = (model_of(case, kind) for kind in (keras.layers, layers, keras.layers))
    quantize_stock(stock, "int8")
    stock.save_weights(path)
    ours.load_weights(path)
    assert near(call(ours, inputs), call(stock, inputs))
    assert isinstance(ours.layers[-1].quantization_config, Int8QuantizationConfig)

    ours.save_weights(path)
    quantize_stock(again, "int8")
    again.load_weights(path)
    for found, wanted in zip(again.weights, stock.weights, strict=True):
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=3e-7)


def test_an_elided_axis_has_length_one_in_the_scale_of_an_int8_file():
    layer: Any = layers.EinsumDense("...x,xyz->...zy", (3, 4))
    layer.build((None, 5, 20))
    layer.quantize("int8")
    store, values = {}, np.asarray(layer.kernel)
    layer.save_own_variables(store)
    assert store["1"].shape == (1, 1, 3, 4)
    layer.load_own_variables(store)
    np.testing.assert_array_equal(layer.kernel, values)


def check_stock_int4(case, block_size, path):
    """Writes a file in stock Keras, reads it here, and writes and reads it here again."""
    stock, ours, fresh = (model_of(case, kind) for kind in (keras.layers, layers, layers))
    quantize_stock(stock, "int4", **({"block_size": block_size} if HAS_BLOCKS else {}))
    stock.save_weights(path)
    floats, inputs = [np.asarray(v) for v in ours.weights], inputs_of(case)
    try:
        ours.load_weights(path)
    except ValueError:
        for found, wanted in zip(ours.weights, floats, strict=True):
            np.testing.assert_array_equal(found, wanted)
        raise
    assert near(call(ours, inputs), call(stock, inputs))
    ours.save_weights(path)
    fresh.load_weights(path)
    for found, wanted in zip(fresh.weights, ours.weights, strict=True):
        np.testing.assert_array_equal(found, wanted)
    return ours.layers[-1].quantization_config


if HAS_BLOCKS:

    @pytest.mark.some_rows(2)
    @pytest.mark.slow
    @pytest.mark.parametrize("case, block_size", rows(UNLIKE_OURS))
    def test_int4_files_of_stock_keras_with_other_groups_are_read(case, block_size, tmp_path):
        with pytest.raises(ValueError, match=r"no groups of shape .* can represent them"):
            check_stock_int4(case, block_size, tmp_path / "model.weights.h5")

    @pytest.mark.slow
    @pytest.mark.some_rows(2)
    @pytest.mark.parametrize("case, block_size", rows(BLOCK_SIZES))
    def test_int4_files_of_stock_keras_are_read(case, block_size, tmp_path):
        config = check_stock_int4(case, block_size, tmp_path / "model.weights.h5")
        assert isinstance(config, Int4QuantizationConfig)
        # A file does not record how much larger than the axis a block is.
        rows = {"one row": 1, "few free axes": 60}.get(case, 20)
        assert config.block_size == (None if block_size == -1 else min(block_size, rows))

else:

    def test_int4_tables_of_stock_keras_before_3_14_are_read(tmp_path):
        assert check_stock_int4("table", None, tmp_path / "model.weights.h5").block_size is None

    @pytest.mark.parametrize("case", [c for c in CASES if c != "table"])
    def test_int4_files_of_stock_keras_before_3_14_raise(case, tmp_path):
        with pytest.raises(ValueError, match=r"The int4 of Keras before 3\.14"):
            check_stock_int4(case, None, tmp_path / "model.weights.h5")


def stock_int4(rows, columns, size, rng):
    """Entries as stock Keras 3.15 writes them for a Dense layer, and the weight they represent."""
    groups = -(-rows // size)
    codes = rng.integers(-8, 8, (rows, columns)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (groups, columns)).astype(np.float32)
    zero = rng.integers(-8, 8, (groups, columns)).astype(np.int8)
    group = (np.arange(rows) // size).astype(np.float32)
    even, odd = codes[:, ::2] & 15, np.zeros((rows, -(-columns // 2)), np.int8)
    odd[:, : columns // 2] = codes[:, 1::2] & 15
    packed = (even.view(np.uint8) | (odd.view(np.uint8) << 4)).view(np.int8)
    bias = rng.normal(size=columns).astype(np.float32)
    weight = (codes.astype(np.float64) - zero[group.astype(int)]) * scale[group.astype(int)]
    return {str(i): x for i, x in enumerate((packed, bias, scale, zero, group))}, weight


def dense(units=7, rows=20, mode=None) -> Any:
    layer: Any = layers.Dense(units, bias_initializer="normal")
    layer.build((None, rows))
    if mode is not None:
        layer.quantize(mode)
    return layer


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("size", [8, 3, 20])
def test_int4_entries_decode_to_the_documented_weight(size):
    store, weight = stock_int4(20, 7, size, np.random.default_rng(0))
    layer = dense()
    layer.load_own_variables(store)
    assert near(layer.kernel, weight)
    np.testing.assert_array_equal(layer.bias, store["1"])
    assert layer.quantization_config.block_size == size
    layer.load_own_variables(store)
    assert near(layer.kernel, weight)


def test_files_keep_weights_left_in_float_by_the_rules():
    store: Any = {}
    layer: Any = Both()
    layer.build((None, 20))
    layer.quantize(config=QuantizationConfig({"*second": NF4A16}))
    layer.save_own_variables(store)
    fresh: Any = Both()
    fresh.build((None, 20))
    fresh.load_own_variables(store)
    np.testing.assert_array_equal(fresh.first, layer.first)
    np.testing.assert_array_equal(fresh.second, layer.second)
    assert list(fresh.stored_weights) == ["second"]


class Both(QuantizableMixin, keras.layers.Layer):
    first = QuantizedWeight(axis=0)
    second = QuantizedWeight(axis=0)

    def build(self, input_shape):
        self.first = self.add_weight(name="first", shape=(input_shape[-1], 3))
        self.second = self.add_weight(name="second", shape=(3, 4))


@functools.cache
def written(mode):
    store = {}
    dense(mode=mode).save_own_variables(store)
    return {key: np.asarray(value) for key, value in store.items()}


def entries_of(mode):
    """What a layer like `dense()` but for its values writes."""
    return dict(written(mode))


def without(store, key):
    return {k: v for k, v in store.items() if k != key}


def int4(**changes):
    return {**stock_int4(20, 7, 8, np.random.default_rng(0))[0], **changes}


def marked(text):
    return {**entries_of("int4"), MARK: np.frombuffer(text.encode(), np.uint8)}


REFUSED: dict[str, Any] = {
    "a missing entry": (lambda: without(entries_of("int8"), "1"), "numbered from 0"),
    "fewer entries": (lambda: without(entries_of("int8"), "2"), "other variables"),
    "no entries": (lambda: {MARK: entries_of("int4")[MARK]}, "numbered from 0"),
    "another shape": (lambda: {**entries_of("int8"), "0": np.ones((9, 7), np.int8)}, "must have"),
    "another scale": (lambda: {**entries_of("int8"), "2": np.ones(6)}, "other variables"),
    "a scale of zeros": (lambda: {**entries_of("int8"), "2": np.zeros(7)}, "finite numbers"),
    "another dtype": (lambda: {**entries_of("int4"), "0": np.ones((20, 4))}, "It is damaged"),
    "NaN scales": (lambda: {**entries_of("int4"), "2": np.full((1, 7), np.nan, "f4")}, "finite"),
    "no JSON": (lambda: marked("{nonsense"), "describe a config"),
    "no config": (lambda: marked("3"), "describe a config"),
    "another class": (
        lambda: marked(json.dumps(keras.saving.serialize_keras_object(dense()))),
        "got",
    ),
    "act order": (lambda: int4(**{"4": np.arange(20.0)[::-1] // 8}), "consecutive rows"),
    "other groups": (lambda: int4(**{"4": np.arange(20.0) // 4}), "int4 scale"),
    "no g_idx": (lambda: without(int4(), "4"), "int4 scale"),
    "another bias": (lambda: int4(**{"1": np.ones(6)}), "other variables"),
    "NaN steps": (lambda: int4(**{"2": np.full((3, 7), np.nan, "f4")}), "finite numbers"),
    "old int4": (lambda: {**entries_of("int8"), "0": np.ones((10, 7), np.int8)}, "before 3.14"),
}


QUANTIZED_TOO = ("a missing entry", "another scale", "another dtype", "no config", "act order")


@pytest.mark.parametrize(
    ("name", "mode"), [*((n, None) for n in REFUSED), *((n, "int8") for n in QUANTIZED_TOO)]
)
def test_other_files_raise_and_keep_the_layer_unchanged(name, mode):
    make, text = REFUSED[name]
    layer, inputs = dense(mode=mode), inputs_of("dense")
    before, policy = np.asarray(layer(inputs)), layer.dtype_policy.name
    with pytest.raises(ValueError, match=text):
        layer.load_own_variables(make())
    np.testing.assert_array_equal(layer(inputs), before)
    assert layer.dtype_policy.name == policy


@pytest.mark.parametrize(
    ("held", "wanted"), [("int4", "int8"), ("int8", "float8"), ("float8", "int8"), (None, "int8")]
)
def test_a_quantized_layer_does_not_load_a_file_of_another_kind(held, wanted):
    layer, inputs = dense(mode=wanted), inputs_of("dense")
    before = np.asarray(layer(inputs))
    with pytest.raises(ValueError, match=r"in another way|other variables"):
        layer.load_own_variables(entries_of(held))
    np.testing.assert_array_equal(layer(inputs), before)


def test_the_error_for_other_int4_tells_zero_points():
    per_channel = {"0": np.ones((20, 4), np.int8), "1": np.ones(7), "2": np.ones(7)}
    words = r"QTensor\(int4 20x7.*\) for QTensor\(int4 20x7.*\), with zero points\. Load"
    with pytest.raises(ValueError, match=words):
        dense(mode="int4").load_own_variables(per_channel)


def test_a_truncated_file_raises(tmp_path):
    path, inputs = tmp_path / "model.weights.h5", inputs_of("dense")
    model, fresh = model_of("dense", layers), model_of("dense", layers)
    model.layers[-1].quantize("int8")
    model.save_weights(path)
    path.write_bytes(path.read_bytes()[:-200])
    before = np.asarray(fresh(inputs))
    with pytest.raises(OSError, match="truncated"):
        fresh.load_weights(path)
    np.testing.assert_array_equal(fresh(inputs), before)


@pytest.mark.slow
def test_float8_files_of_stock_keras_need_a_layer_in_training(tmp_path):
    path, inputs = tmp_path / "model.weights.h5", inputs_of("dense")
    stock, ours = model_of("dense", keras.layers), model_of("dense", layers)
    quantize_stock(stock, "float8")
    stock.layers[-1].inputs_scale.assign(0.01)
    stock.save_weights(path)
    before = np.asarray(ours(inputs))
    with pytest.raises(ValueError, match="scales of float8 training"):
        ours.load_weights(path)
    np.testing.assert_array_equal(ours(inputs), before)
    layer = ours.layers[-1]
    layer.quantize(config=Float8QuantizationConfig(training=True))
    ours.load_weights(path)
    np.testing.assert_array_equal(layer.kernel, stock.layers[-1].kernel)
    assert float(layer.inputs_scale) == np.float32(0.01)
    with pytest.raises(ValueError, match="which trains in float8"):
        layer.load_own_variables(entries_of("int8"))
    with pytest.raises(ValueError, match="other variables"):
        layer.load_own_variables(entries_of(None))
    store = {}
    layer.save_own_variables(store)
    with pytest.raises(ValueError, match="float weights and float8 scales of layer"):
        dense(mode="int8").load_own_variables(store)
