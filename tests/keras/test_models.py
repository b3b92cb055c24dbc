"""Quantizing whole models in one call."""

import functools
import importlib
import math
from typing import Any

import keras
import numpy as np
import pytest

from jaxquant import INT8, NF4A16, W4A16_ASYM, W8A8, ArrayConfig, Rule, explain
from jaxquant.keras import (
    Float8QuantizationConfig,
    Int8QuantizationConfig,
    QuantizedWeight,
    compat,
    convert,
    functional,
    layers,
    load_preset,
    load_weights,
    quantize,
    to_stock,
)


@functools.cache
def small_model() -> Any:
    """Shared: tests must not change it."""
    start = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 40, name="table")(start)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(33, name="hidden", bias_initializer="normal")(x)
    return keras.Model(start, keras.layers.Dense(3, name="head")(x), name="small")


def tokens():
    return np.random.default_rng(0).integers(0, 20, (4, 6))


def schemes(report):
    return {row.path: row.scheme or row.reason for row in report.rows}


def relative_error(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.slow
def test_quantize_reports_every_weight_and_does_not_change_the_model():
    model = small_model()
    before, wanted = model.get_weights(), np.asarray(model(tokens()))
    seen = []
    rules = {"head/*": None, "hidden/*": W4A16_ASYM, "nothing/*": W8A8}
    with pytest.raises(ValueError, match="rule 'nothing/\\*' matches no quantizable weight"):
        quantize(model, rules)
    rules = [Rule("head/*", None, note="the head"), ("hidden/*", W4A16_ASYM), ("table/*", W8A8)]
    quantized, report = quantize(model, rules, progress=lambda *done: seen.append(done))

    assert schemes(report) == {
        "table/embeddings": "int8 per channel",
        "norm/gamma": "LayerNormalization is not a quantizable layer",
        "norm/beta": "LayerNormalization is not a quantizable layer",
        "hidden/kernel": "int4 per channel asymmetric",
        "hidden/bias": "not declared quantizable",
        "head/kernel": "the head",
        "head/bias": "not declared quantizable",
    }
    assert [row.path for row in report.rows] == [v.path for v in model.weights]
    assert seen == [(1, 2, "table/embeddings"), (2, 2, "hidden/kernel")]
    table = report.rows[0]
    assert (table.shape, table.bytes_before, table.bytes_after) == ((20, 40), 3200, 800 + 80)
    assert table.bits_per_weight == 8 * 880 / 800
    values = quantized.get_layer("table").embeddings
    noise = relative_error(np.asarray(values), before[0])
    assert table.sqnr == pytest.approx(-20 * math.log10(noise), abs=0.01)
    assert 0 < relative_error(quantized(tokens()), wanted) < 0.15
    for now, then in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_quantize_reports_padded_groups_in_the_shape_of_the_weight():
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(5, use_bias=False)])
    quantized, report = quantize(model, ArrayConfig(format=INT8, group_size=32))
    (row,) = report.rows
    assert (row.shape, row.bytes_before) == ((40, 5), 800)
    noise = relative_error(np.asarray(quantized.layers[0].kernel), model.get_weights()[0])
    assert row.sqnr == pytest.approx(-20 * math.log10(noise), abs=0.01)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "rules, scheme",
    [
        ("int8", "int8 per channel, int8 inputs"),
        ("float8", "fp8_e4m3 per channel, fp8_e4m3 inputs"),
        (W8A8, "int8 per channel, int8 inputs"),
        (ArrayConfig(format=INT8), "int8 per channel"),
        (NF4A16, "nf4 g64"),
        (Int8QuantizationConfig(activation_quantizer=None), "int8 per channel"),
        (keras.quantizers.Int8QuantizationConfig(), "int8 per channel, int8 inputs"),
    ],
)
def test_quantize_supports_every_kind_of_rules(rules, scheme):
    model = keras.Sequential([keras.Input((128,)), keras.layers.Dense(5, name="a")])
    _, report = quantize(model, rules)
    assert report.rows[0].scheme == scheme


def test_quantize_lists_all_problems_and_changes_nothing():
    model: Any = keras.models.clone_model(small_model())
    for name in ("hidden", "head"):
        kernel = np.array(model.get_layer(name).kernel)
        kernel[0, 0] = np.nan
        model.get_layer(name).kernel.assign(kernel)
    with pytest.raises(ValueError, match=r"'small' was not changed; fix these 2 problems") as error:
        quantize(model, "int8")
    assert "hidden/kernel holds NaN or Inf" in str(error.value)
    assert "head/kernel holds NaN or Inf" in str(error.value)
    assert type(model.get_layer("head")) is keras.layers.Dense


@pytest.mark.parametrize("keep", ["head", keras.layers.Dense, 3, [3], [keras.layers.ReLU()]])
@pytest.mark.parametrize("copy", [convert, to_stock, lambda m, keep: quantize(m, W8A8, keep=keep)])
def test_keep_must_be_a_list_of_names_and_classes(copy, keep):
    with pytest.raises(ValueError, match=r"keep must be a list of names and classes .*; got"):
        copy(small_model(), keep=keep)


WRONG_FLAGS = {
    "strict of quantize": lambda x: quantize(small_model(), W8A8, strict=x),
    "strict of convert": lambda x: convert(small_model(), strict=x),
    "dequantize": lambda x: to_stock(small_model(), dequantize=x),
    "inputs": lambda x: QuantizedWeight(0, x),
    "is_matrix": lambda x: QuantizedWeight(0, is_matrix=x),
    "has_windows": lambda x: QuantizedWeight(0, has_windows=x),
    "in_groups": lambda x: QuantizedWeight(0, in_groups=x),
    "training": Float8QuantizationConfig,
    "compile": lambda x: load_preset(keras.Model, "folder", W8A8, compile=x),
}


def test_flags_must_be_true_or_false(monkeypatch):
    monkeypatch.setattr(keras.Model, "from_preset", None, raising=False)
    for name, call in WRONG_FLAGS.items():
        flag = name.split()[0]
        with pytest.raises(
            ValueError, match=f"{flag} must be True or False; got 'no'. Write {flag}=True"
        ):
            call("no")
    wrong: Any = 3
    for call in (
        lambda: quantize(small_model(), W8A8, progress=wrong),
        lambda: load_preset(keras.Model, "folder", W8A8, progress=wrong),
    ):
        with pytest.raises(ValueError, match=r"progress must be True for a bar, a .*; got 3\."):
            call()


TAKES_A_MODEL = [
    convert,
    to_stock,
    functional,
    lambda m: quantize(m, W8A8),
    lambda m: load_weights(m, "model.weights.h5"),
]


@pytest.mark.parametrize("copy", TAKES_A_MODEL)
def test_a_model_must_be_one_of_keras(copy):
    with pytest.raises(ValueError, match=r"model must be a Keras model or layer; got a function"):
        copy(lambda x: x)


@pytest.mark.slow
def test_quantize_raises_for_invalid_arguments():
    model = small_model()
    with pytest.raises(ValueError, match="the rules select no weight; quantizable are table/emb"):
        quantize(model, {"*": None})
    with pytest.raises(ValueError, match=r"rules must be a Scheme.*got 'int3'"):
        quantize(model, "int3")
    with pytest.raises(
        ValueError, match=r"or 'float8'; got 'W8A8'; write jaxquant.SCHEMES\['W8A8'"
    ):
        quantize(model, "W8A8")
    invalid: Any = INT8
    with pytest.raises(ValueError, match=r"got int8, a format; write jaxquant.ArrayConfig\(format"):
        quantize(model, invalid)
    with pytest.raises(ValueError, match="must be built; got built=False"):
        quantize(keras.Sequential([keras.layers.Dense(2)]), "int8")
    with pytest.raises(
        ValueError, match=r"must have weights; got none, of the layers InputLayer, ReLU"
    ):
        quantize(keras.Sequential([keras.Input((4,)), keras.layers.ReLU()]), "int8")
    once, _ = quantize(model, {"table/*": W8A8})
    with pytest.raises(ValueError, match="table/embeddings is already quantized, to QTensor"):
        quantize(once, "int8")
    twice, report = quantize(once, {"table/*": None, "*": NF4A16})
    assert schemes(report)["table/embeddings"] == "int8 per channel"
    assert twice.get_layer("head").quantization_mode == "int4"
    assert once.get_layer("head").quantization_mode is None


def test_quantize_keeps_the_layers_named_by_keep():
    quantized, report = quantize(small_model(), "int8", keep=["head", keras.layers.Embedding])
    found = schemes(report)
    assert (found["head/kernel"], found["table/embeddings"]) == ("kept", "kept")
    assert type(quantized.get_layer("head")) is keras.layers.Dense
    ours = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, name="a"), layers.Dense(2, name="b")]
    )
    kept, _ = quantize(ours, "int8", keep=["a"])
    assert [x.quantization_mode for x in kept.layers] == [None, "int8"]
    _, report = quantize(kept, "int8", keep=["b"])
    assert [row.reason or row.scheme for row in report.rows if "kernel" in row.path] == [
        "int8 per channel, int8 inputs",
        "int8 per channel, int8 inputs",
    ]
    # Layers declare the axes that they contract.
    few = [
        f"scales take {n:.1f} bits per weight; only {e} elements share one"
        for n, e in ((8, 4), (32 / 3, 3))
    ]
    assert [row.warning for row in report.rows if "kernel" in row.path] == few


def test_quantize_shows_a_progress_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    quantize(small_model(), "int8", progress=True)
    assert "head/kernel" in capsys.readouterr().err


@pytest.mark.slow
def test_fit_after_quantize_needs_compile_and_keeps_the_weights():
    model: Any = keras.models.clone_model(small_model())
    x, y = tokens(), np.random.default_rng(1).normal(size=(4, 6, 3))
    model.compile("sgd", loss="mse")
    model.fit(x, y, verbose=0)
    floats = model.get_weights()
    quantized, _ = quantize(model, "int8")
    predicted = quantized.predict(x, verbose=0)
    with pytest.raises(ValueError, match="must call `compile\\(\\)` before"):
        quantized.fit(x, y, verbose=0)
    np.testing.assert_array_equal(quantized.predict(x, verbose=0), predicted)

    dense = quantized.get_layer("hidden")
    codes, bias = np.array(dense.quantized_weight("kernel").codes), np.array(dense.bias)
    quantized.compile("sgd", loss="mse")
    quantized.fit(x, y, verbose=0)
    np.testing.assert_array_equal(dense.quantized_weight("kernel").codes, codes)
    assert not np.array_equal(dense.bias, bias)
    # Training one model did not donate arrays of the other.
    for now, then in zip(model.get_weights(), floats, strict=True):
        np.testing.assert_array_equal(now, then)
    model.fit(x, y, verbose=0)


def test_explain_names_the_layer_of_each_product():
    quantized, _ = quantize(small_model(), {"hidden/*": W4A16_ASYM, "head/*": W8A8})
    apply, params = functional(quantized)
    for rows in (explain(quantized, tokens()), explain(apply, params, tokens())):
        assert [row.path.split("/")[-2:] for row in rows] == [
            ["small", "hidden"],
            ["small", "head"],
        ]
        assert [row.formats for row in rows] == [
            ("float32", "int4 per channel asymmetric"),
            ("int8", "int8 per channel"),
        ]
        assert [row.line for row in rows] == ["", ""], "a line in Keras says nothing"
    assert not explain(small_model(), tokens()).rows


def test_importing_with_another_backend_raises(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "numpy")
    with pytest.raises(ImportError, match="got the backend 'numpy' of Keras"):
        importlib.reload(compat)
