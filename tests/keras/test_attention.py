"""Attention with quantized projections: what the table of all layers does not cover."""

from typing import Any

import jax
import keras
import numpy as np
import pytest

from jaxquant import W8A8, W8A16, Rule
from jaxquant.keras import QuantizableMixin, QuantizationConfig, layers

from .test_layers import MODES, assert_same, quantize, relative_error

BATCH, QUERIES, KEYS, FEATURES = 2, 3, 5, 12
KINDS = {
    "MultiHeadAttention": {"num_heads": 2, "key_dim": 4},
    "GroupQueryAttention": {"head_dim": 4, "num_query_heads": 4, "num_key_value_heads": 2},
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, package=layers, **arguments):
    options = {"bias_initializer": "normal", "name": "attention", **KINDS[kind], **arguments}
    layer = getattr(package, kind)(**options)
    layer.build((BATCH, QUERIES, FEATURES), (BATCH, KEYS, FEATURES))
    return layer


def gate(kind) -> dict[str, Any]:
    """The argument for a gate, if this Keras version has it."""
    return {"use_gate": True} if "use_gate" in make(kind, keras.layers).get_config() else {}


def inputs():
    rng = np.random.default_rng(0)
    shapes = [(BATCH, n, FEATURES) for n in (QUERIES, KEYS, KEYS)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def projections(layer):
    names = ("_query_dense", "_key_dense", "_gate_dense", "_value_dense", "_output_dense")
    return [getattr(layer, name) for name in names if hasattr(layer, name)]


def same_values(layer, stock):
    for ours, theirs in zip(projections(layer), projections(stock), strict=True):
        theirs.kernel.assign(ours.kernel)
        theirs.bias.assign(ours.bias)


def test_projections_are_stored_as_matrices_with_the_contracted_axes_last():
    layer = make("MultiHeadAttention")
    for each in projections(layer):
        each.quantize("int8")
    shapes = [x.quantized_weight("kernel").codes.shape for x in projections(layer)]
    last = [(2, 4, 12)] * 3 + [(12, 2, 4)]
    assert shapes == {"cpu": last, "gpu": last}.get(jax.default_backend(), shapes)


def test_a_rule_that_names_other_axes_also_says_how_kernels_are_stored():
    layer = layers.EinsumDense("abc,cde->abde", output_shape=(QUERIES, 4, 8))
    layer.build((None, QUERIES, FEATURES))
    for axis, order in ((None, (-2, -1, -3)), (0, (-2, -1, -3)), (-1, None), ((0, 1), None)):
        config = QuantizationConfig([Rule("*", W8A16, axis=axis)])
        found = layer.weight_state.like("kernel", (FEATURES, 4, 8), config)
        assert found.order == order or jax.default_backend() == "tpu"


@pytest.mark.some_rows(1)
@each_kind
def test_float_layer_equals_the_stock_layer(kind):
    keras.utils.set_random_seed(1)
    stock = make(kind, keras.layers, **gate(kind))
    keras.utils.set_random_seed(1)
    ours = make(kind, **gate(kind))

    np.testing.assert_array_equal(ours(*inputs()), stock(*inputs()))

    assert ours.get_config() == stock.get_config()
    assert [v.path for v in ours.variables] == [v.path for v in stock.variables]
    configs = [[x.get_config() for x in projections(layer)] for layer in (ours, stock)]
    assert configs[0] == configs[1]
    found = [x for x in ours._flatten_layers(include_self=False) if x.variables]
    assert {id(x) for x in found} == {id(x) for x in projections(ours)}
    assert all(isinstance(x, QuantizableMixin) for x in found)


def test_projections_keep_settings_that_are_not_in_the_config():
    class Halved(keras.constraints.Constraint):
        def __call__(self, w):
            return w / 2

    constraint = Halved()
    layer = make("MultiHeadAttention", kernel_constraint=constraint, dtype="mixed_bfloat16")

    assert all(x.kernel_constraint is constraint for x in projections(layer))
    assert all(x.dtype_policy.name == "mixed_bfloat16" for x in projections(layer))
    assert [x.name for x in projections(layer)] == ["query", "key", "value", "attention_output"]


@pytest.mark.slow
@each_kind
def test_quantized_layer_equals_the_stock_layer_with_dequantized_weights(kind):
    layer, stock = make(kind, **gate(kind)), make(kind, keras.layers, **gate(kind))
    for projection in projections(layer):
        projection.quantize(config=QuantizationConfig(W8A8.weights))
    same_values(layer, stock)
    mask = np.random.default_rng(1).random((BATCH, QUERIES, KEYS)) < 0.7
    calls = [
        {},
        {"attention_mask": mask, "use_causal_mask": True, "return_attention_scores": True},
    ]
    for call in calls:
        found, wanted = layer(*inputs(), **call), stock(*inputs(), **call)
        for x, y in zip(keras.tree.flatten(found), keras.tree.flatten(wanted), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-6)


def model_of(kind, policy) -> Any:
    query, value = keras.Input((QUERIES, FEATURES)), keras.Input((KEYS, FEATURES))
    layer = getattr(layers, kind)(bias_initializer="normal", dtype=policy, **KINDS[kind])
    return keras.Model([query, value], layer(query, value, use_causal_mask=True))


# The projections of both kinds are EinsumDense, which test_layers.py has in all modes.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, mode, policy",
    [
        ("MultiHeadAttention", "int8", "float32"),
        ("GroupQueryAttention", "int4 block 32", "mixed_bfloat16"),
    ],
)
def test_model_is_close_to_float_and_round_trips_through_files(kind, mode, policy, tmp_path):
    keras.utils.set_random_seed(0)
    model, x = model_of(kind, policy), inputs()[:2]
    config, bound = MODES[mode]
    wanted = model(x)
    quantize(model, config)
    found = as_float(model(x))

    # The errors of two successive products, values and outputs, add in squares.
    assert 0 < relative_error(found, as_float(wanted)) <= 2**0.5 * bound
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    assert_same(loaded, model)
    predicted = as_float(loaded.predict(x, verbose=0))
    assert relative_error(predicted, found) <= (2e-6 if policy == "float32" else 1e-2)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = model_of(kind, policy)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert_same(fresh, model)


def as_float(x):
    return np.asarray(x, np.float32)


@each_kind
def test_float_files_interchange_with_stock_layers(kind, tmp_path):
    ours, stock = (
        keras.Sequential([make_self_attention(kind, package)]) for package in (layers, keras.layers)
    )
    x = inputs()[0]
    for model in (stock, ours):
        model(x)
    stock.save_weights(tmp_path / "stock.weights.h5")
    ours.load_weights(tmp_path / "stock.weights.h5")

    np.testing.assert_array_equal(ours(x), stock(x))


def make_self_attention(kind, package):
    start = keras.Input((QUERIES, FEATURES))
    return keras.Model(start, getattr(package, kind)(**KINDS[kind])(start, start))
