"""Each row of docs/keras.md's table of differences to stock Keras."""

import pathlib
import re
from typing import Any

import keras
import numpy as np
import pytest

import jaxquant.keras as jk

stock: Any = keras.layers
ours: Any = jk.layers
DOCUMENT = pathlib.Path(__file__).parents[2] / "docs/keras.md"
X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


def dense(source, mode=None, **options):
    layer = source.Dense(16, **options)
    layer.build((None, 8))
    if mode is not None:
        layer.quantize(mode)
    return layer


def ours_alone_quantizes(layer, stock_layer, shape):
    layer.build(shape)
    layer.quantize("int8")
    stock_layer.build(shape)
    with pytest.raises(NotImplementedError):
        stock_layer.quantize("int8")


def value_of_a_weight():
    found, wanted = dense(ours, "int8"), dense(stock, "int8")
    assert (found.kernel.dtype, found.quantized_weight("kernel").codes.dtype) == ("float32", "int8")
    assert keras.backend.standardize_dtype(wanted.kernel.dtype) == "int8"


def shape_of_codes():
    found, wanted = dense(ours, "int8"), dense(stock, "int8")
    (codes,) = (v for v in found.variables if v.name == "kernel")
    order = found.quantized_weight("kernel").order
    assert codes.shape == ((16, 8) if order else (8, 16))
    assert wanted.kernel.shape == (8, 16)


def private_names():
    found, wanted = (dense(source, "int4") for source in (ours, stock))
    # Keras 3.13 does not have groups.
    name = "g_idx" if hasattr(keras.quantizers, "AWQConfig") else "_orig_input_dim"
    assert (hasattr(found, name), hasattr(wanted, name)) == (False, True)


def subclasses():
    class Mine(ours.Dense):
        pass

    class Theirs(stock.Dense):
        pass

    ours_alone_quantizes(Mine(16), Theirs(16), (None, 8))


def float8():
    found, wanted = dense(ours, "float8"), dense(stock, "float8")
    assert "uint8" in [v.dtype for v in found.variables]
    assert {v.dtype for v in wanted.variables} == {"float32"}
    trained: Any = ours.Dense(16)
    trained.build((None, 8))
    trained.quantize(config=jk.Float8QuantizationConfig(training=True))
    assert len(trained.variables) == len(wanted.variables)


def one_layer():
    config = keras.quantizers.GPTQConfig(["x"], len, group_size=4)
    wanted = dense(stock)
    wanted.quantize("gptq", config=config)
    found = dense(ours)
    with pytest.raises(ValueError, match="gptq quantizes a whole model"):
        found.quantize("gptq", config=config)


def policies_of_methods():
    assert dense(stock, dtype="gptq/4/8_from_float32").quantization_mode == "gptq"
    with pytest.raises(NotImplementedError, match="Create it in float, then quantize it"):
        dense(ours, dtype="gptq/4/8_from_float32")


def not_finite():
    found, wanted = dense(ours), dense(stock)
    for layer in (found, wanted):
        layer.kernel.assign(np.full((8, 16), np.nan, np.float32))
    with pytest.raises(ValueError, match="NaN or Inf"):
        found.quantize("int8")
    with np.errstate(invalid="ignore"):
        wanted.quantize("int8")
    assert (found.quantization_mode, wanted.quantization_mode) == (None, "int8")


def files_of_lora(tmp_path):
    enabled = []
    for source in (ours, stock):
        models: list[Any] = [keras.Sequential([keras.Input((8,)), source.Dense(16)]) for _ in "ab"]
        for model in models:
            model.quantize("int8")
        models[0].layers[0].enable_lora(2)
        models[0].save_weights(tmp_path / "x.weights.h5")
        models[1].load_weights(tmp_path / "x.weights.h5")
        enabled.append(models[1].layers[0].lora_enabled)
        np.testing.assert_allclose(models[1](X), models[0](X), atol=1e-5)
    assert enabled == [True, False]


def other_layers():
    ours_alone_quantizes(ours.Conv2D(3, 3), stock.Conv2D(3, 3), (None, 8, 8, 4))
    assert hasattr(ours, "LSTM")
    assert not hasattr(ours, "ConvLSTM1D")


def int4_per_channel():
    entries = {"0": np.ones((8, 8), np.int8), "1": np.ones(16), "2": np.full(16, 2.0)}
    found, refuses = dense(ours), dense(ours, dtype="int4_from_float32")
    found.load_own_variables(entries)
    np.testing.assert_array_equal(found.kernel, np.tile([0.5, 0.0], (8, 8)))
    if "block_size" in keras.quantizers.Int4QuantizationConfig().get_config():
        dense(stock, dtype="int4_from_float32").load_own_variables(entries)
    with pytest.raises(ValueError, match=r"with zero points\. Load it into a float layer"):
        refuses.load_own_variables(entries)


def summaries():
    counts = []
    for source in (ours, stock):
        model: Any = keras.Sequential([keras.Input((8,)), source.Dense(16)])
        model.quantize("int4")
        if not hasattr(keras.quantizers, "QuantizationReport"):
            assert not hasattr(model, "quantization_summary")
            return
        summary = model.quantization_summary(verbose=False)
        counts += re.findall(r"Quantized params : (\d+)", summary)
    assert counts == ["64", "128"]


def ternary():
    if hasattr(keras.quantizers, "QuantizationReport"):
        assert dense(stock, "ternary").quantization_mode == "ternary"
    # Before, Keras raises a ValueError itself.
    with pytest.raises((NotImplementedError, ValueError), match="ternary"):
        dense(ours, "ternary")


DIFFERENCES = {
    "`layer.kernel`, `_kernel`, `embeddings`": value_of_a_weight,
    "shape of variables": shape_of_codes,
    "`g_idx`, private attributes": private_names,
    "`quantize` of a subclass": subclasses,
    '`"float8"`': float8,
    '`layer.quantize("gptq")`, `"awq"`': one_layer,
    "policies `gptq/...`, `awq/...`": policies_of_methods,
    "NaN or Inf in a weight": not_finite,
    "LoRA in files of quantized layers": files_of_lora,
    "layers with a mode": other_layers,
    "int4 entries per channel, in a layer with the policy `int4_from_...`": int4_per_channel,
    "`quantization_summary` of Keras 3.16": summaries,
    '`"ternary"` of Keras 3.16': ternary,
}


def test_the_table_has_a_row_for_each_difference():
    _, _, text = DOCUMENT.read_text().partition("## Differences from stock Keras")
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", text.partition("\n## ")[0], re.MULTILINE)
    assert rows == list(DIFFERENCES)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_difference_is_as_the_table_says(name, request):
    check = DIFFERENCES[name]
    needs_folder = check.__code__.co_argcount
    check(*[request.getfixturevalue("tmp_path")] * needs_folder)
