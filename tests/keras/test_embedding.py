"""Reversible embeddings: what the table of all layers does not cover."""

from typing import Any

import jax
import keras
import numpy as np
import pytest

from jaxquant import W4A16, W8A8
from jaxquant.keras import (
    Int4QuantizationConfig,
    QuantizationConfig,
    functional,
    layers,
    quantize,
)
from jaxquant.tree import is_quantized

from .recurrent_cases import products

TOKENS, WIDTH = 11, 24
TIES = pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])


def make(package=layers, **arguments):
    layer = package.ReversibleEmbedding(TOKENS, WIDTH, name="table", **arguments)
    layer.build()
    return layer


def tokens():
    return np.random.default_rng(0).integers(0, TOKENS, (2, 5)).astype(np.int32)


def activations():
    return np.random.default_rng(1).normal(size=(2, 5, WIDTH)).astype(np.float32)


def with_weights_of(layer, **arguments):
    """A stock layer with the dequantized weights of a layer."""
    stock = make(keras.layers, **arguments)
    reverse = [] if layer.tie_weights else [layer.reverse_embeddings]
    stock.set_weights([layer.embeddings, *reverse])
    return stock


@TIES
def test_float_layer_equals_the_stock_layer(is_tied):
    stock = make(keras.layers, tie_weights=is_tied, logit_soft_cap=0.5)
    ours = make(tie_weights=is_tied, logit_soft_cap=0.5)
    ours.set_weights(stock.get_weights())

    np.testing.assert_array_equal(ours(tokens()), stock(tokens()))
    np.testing.assert_array_equal(
        ours(activations(), reverse=True), stock(activations(), reverse=True)
    )
    assert ours.get_config() == stock.get_config()


@pytest.mark.some_rows(2)
@TIES
@pytest.mark.parametrize("scheme", [W8A8.weights, W4A16], ids=["int8", "int4 groups"])
def test_quantized_layer_equals_the_stock_layer_with_dequantized_weights(scheme, is_tied):
    arguments = {"tie_weights": is_tied, "logit_soft_cap": 0.1}
    layer = make(**arguments)
    layer.quantize(config=QuantizationConfig(scheme))
    stock = with_weights_of(layer, **arguments)

    np.testing.assert_allclose(layer(tokens()), stock(tokens()), atol=1e-7)
    np.testing.assert_allclose(
        layer(activations(), reverse=True), stock(activations(), reverse=True), atol=2e-6
    )


@TIES
def test_int8_projection_multiplies_codes(is_tied):
    layer = make(tie_weights=is_tied)
    layer.quantize("int8")

    jaxpr = jax.make_jaxpr(lambda x: layer(x, reverse=True))(activations())

    assert products(jaxpr) == {("int8", "int8", "int32")}


def test_a_table_of_lookups_has_no_activations_to_quantize():
    start = keras.Input((5,), dtype="int32")
    table = layers.Embedding(TOKENS, WIDTH)
    model = keras.Model(start, layers.Dense(3)(table(start)))
    quantized, _ = quantize(model, W8A8)
    _, params = functional(quantized)
    found = jax.tree.leaves(params, is_leaf=is_quantized)
    quantizes_inputs = {x.shape: x.inputs is not None for x in found if is_quantized(x)}
    assert quantizes_inputs == {(TOKENS, WIDTH): False, (WIDTH, 3): True}


def test_tied_weight_is_stored_once():
    layer = make()
    layer.quantize("int8")

    assert list(layer.stored_weights) == ["embeddings"]
    assert [tuple(v.shape) for v in layer.variables] == [(TOKENS, WIDTH), (TOKENS, 1)]


@TIES
def test_padded_groups_can_be_projected(is_tied):
    layer = make(tie_weights=is_tied)
    layer.quantize(config=Int4QuantizationConfig(block_size=16))

    found = layer(activations(), reverse=True)

    stock = with_weights_of(layer, tie_weights=is_tied)
    np.testing.assert_allclose(found, stock(activations(), reverse=True), atol=1e-6)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_logits_have_the_reverse_dtype(policy):
    plain, wide = (make(dtype=policy, reverse_dtype=dtype) for dtype in (None, "float32"))
    for layer in (plain, wide):
        layer.quantize("int8")
    x = keras.ops.cast(activations(), plain.compute_dtype)

    assert plain(x, reverse=True).dtype == plain.compute_dtype
    assert wide(x, reverse=True).dtype == "float32"
    assert wide(tokens()).dtype == wide.compute_dtype


@pytest.mark.parametrize("mode", [None, "int8"])
def test_outputs_have_the_mask_of_the_tokens(mode):
    layer = make(mask_zero=True)
    if mode is not None:
        layer.quantize(mode)
    x = np.array([[3, 0, 0], [1, 2, 0]], np.int32)

    outputs = layer(x)

    np.testing.assert_array_equal(outputs._keras_mask, x != 0)
    reversed_mask = getattr(layer(np.asarray(outputs), reverse=True), "_keras_mask", None)
    assert reversed_mask is None


def test_adapter_learns_in_both_directions():
    layer = make()
    layer.quantize("int8")
    before = layer(tokens()), layer(activations(), reverse=True)
    layer.enable_lora(2)
    rng = np.random.default_rng(2)
    layer.lora_embeddings_b.assign(rng.normal(size=(2, WIDTH)))
    delta = np.asarray(layer.lora_embeddings_a) @ np.asarray(layer.lora_embeddings_b)

    after = layer(tokens()), layer(activations(), reverse=True)

    np.testing.assert_allclose(after[0] - before[0], delta[tokens()], atol=1e-5)
    difference = after[1] - before[1]
    np.testing.assert_allclose(difference, activations() @ delta.T, atol=1e-4)


def test_adapter_is_added_without_dequantizing_the_table():
    layer = make()
    layer.quantize("int8")
    layer.enable_lora(2)
    lookup = jax.make_jaxpr(layer)(tokens())
    projection = jax.make_jaxpr(lambda x: layer(x, reverse=True))(activations())
    for program in (lookup, projection):
        assert f"i8[{TOKENS},{WIDTH}]" in str(program)
        assert f"f32[{TOKENS},{WIDTH}]" not in str(program)


@TIES
def test_quantized_layer_round_trips_through_a_file_and_is_an_embedding(is_tied, tmp_path):
    start = keras.Input((5,), dtype="int32")
    table = layers.ReversibleEmbedding(TOKENS, WIDTH, tie_weights=is_tied)
    model = keras.Model(start, table(table(start), reverse=True))
    model.quantize(config=QuantizationConfig({"*/embeddings": W8A8}))
    found = model(tokens())

    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")

    np.testing.assert_array_equal(loaded(tokens()), found)
    assert isinstance(table, layers.Embedding)
