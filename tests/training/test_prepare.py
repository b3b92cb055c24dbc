"""Trees in training: products equal to those of the converted tree, bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import (
    INT4,
    SCHEMES,
    W8A8,
    W8A16,
    ArrayConfig,
)
from jaxquant.training import (
    LearnedRange,
    LearnedStep,
    Prepared,
    convert,
    fake_quantize,
    init_learned,
    prepare,
)

from .. import cases, checks
from .prepared import (
    ALL,
    GROUPED,
    OPERATIONS,
    K,
    N,
    X,
    assert_equal_trees,
    calibrated,
    learn,
    moved,
    operation_case,
    products,
    weights,
)


@pytest.mark.slow
def test_values_in_training_are_those_of_quantize_whatever_the_range():
    """Compiled as users compile; below, ranges are those of the largest magnitude."""
    chosen = {name: cases.FEW[name] for name in ("int4-percentile", "int4-asym_min_mse")}
    x = jnp.asarray(cases.gaussian(), jnp.bfloat16)
    values = jax.jit(lambda x: {n: fake_quantize(x, *c) for n, c in chosen.items()})(x)
    for name, case in chosen.items():
        np.testing.assert_array_equal(values[name], jq.quantize(x, *case).dequantize(), name)


# Weights and inputs of these are those of other schemes.
ALIKE = ("W8A16", "W4A16", "W4A8", "MXFP4A16", "INT2 g32")
# Apart, because programs with 4-bit floats take long to compile.
NARROW = [rule for rule in ALL if rule.pattern == "NVFP4A16"]
REST = [rule for rule in ALL if rule not in NARROW and rule.pattern not in ALIKE]
# One of each kind of scale, with inputs and without.
FEW = [rule for rule in ALL if rule.pattern in ("W8A8", "W4A16_ASYM", "W4A4", "blocks")]


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "make, rules, dtype",
    [
        (prepare, REST, "float32"),
        (prepare, NARROW, "float32"),
        (learn, FEW, "bfloat16"),
    ],
    ids=["float32", "narrow-float32", "learned-bfloat16"],
)
def test_products_are_those_of_the_converted_tree_bit_for_bit(make, rules, dtype):
    params, x = weights(rules, dtype), X.astype(dtype)
    prepared = make(params, rules)
    apply = jax.jit(products)
    if make is prepare:
        quantized = jq.tree.quantize(params, rules)
        assert_equal_trees(convert(prepared), quantized)
        values = jax.jit(
            lambda tree: {k: fake_quantize(p.weight, p.config, p.axis) for k, p in tree.items()}
        )
        assert_equal_trees(values(prepared), jq.tree.dequantize(quantized))

    prepared = moved(prepared)
    converted = convert(prepared)

    assert_equal_trees(apply(prepared, x), apply(converted, x))
    for name in {"W8A8", "W4A16_ASYM"} & prepared.keys():
        np.testing.assert_array_equal(
            jq.matmul(x, prepared[name]), jq.matmul(x, converted[name]), err_msg=name
        )


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_equals_that_with_the_converted_weight(name):
    prepared, x, outputs = operation_case(name)
    outputs = jax.jit(outputs)
    assert_equal_trees(outputs(prepared, x), outputs(convert(prepared), x))


def test_a_w8a8_product_is_an_integer_product():
    prepared = moved(prepare(weights({"w": W8A8}), {"w": W8A8}))
    (row,) = jq.explain(products, prepared, X).rows
    assert row.is_integer
    x, w = jq.quantize(X, ArrayConfig(), axis=-1), convert(prepared)["w"].reorder(None)
    whole = np.asarray(x.codes, np.int64) @ np.asarray(w.codes, np.int64)
    want = whole.astype(np.float32) * np.asarray(x.scale) * np.asarray(w.scale)
    np.testing.assert_allclose(jax.jit(products)(prepared, X)["w"], want, rtol=3e-7)


@pytest.mark.slow
def test_a_prepared_tree_is_saved_and_loaded(tmp_path):
    rules = {"a": W8A8, "b": GROUPED}
    prepared = moved(learn(weights(rules), rules)) | {"bias": jnp.ones(3)}
    prepared["a"] = calibrated(prepared["a"], jnp.float32(0.3))
    path = tmp_path / "training.safetensors"
    jq.save(path, prepared)
    abstract = jax.eval_shape(lambda tree: tree, prepared)
    assert_equal_trees(jq.load(path, like=abstract), prepared)


@pytest.mark.slow
def test_the_first_learned_steps_and_ranges_are_those_of_quantization_after_training():
    rules = {"a": ArrayConfig(format=INT4, group_size=32), "b": GROUPED.weights}
    params = weights(rules) | {"bias": jnp.ones(3)}

    learned = init_learned(params, rules)

    assert isinstance(learned["a"], LearnedStep)
    assert isinstance(learned["b"], LearnedRange)
    assert learned["bias"] is None
    for range, first in [(None, init_learned(params, rules, None)), (jq.MinMSE(), learned)]:
        got = convert(prepare(params, rules, first))
        for name, config in rules.items():
            config = config if range is None else dataclasses.replace(config, range=range)
            q = jq.quantize(params[name], config).reorder(got[name].order)
            np.testing.assert_allclose(checks.scale_of(got[name]), checks.scale_of(q), rtol=1e-6)
            np.testing.assert_array_equal(checks.zero_point_of(got[name]), checks.zero_point_of(q))


def test_axes_count_from_the_end_so_that_a_slice_of_a_stack_is_quantized_alike():
    rules = [jq.Rule("w", ArrayConfig(), axis=1)]
    prepared = prepare(weights(rules, shape=(3, 32, 8)), rules)["w"]
    first = jax.tree.map(lambda a: a[0], prepared)
    whole, slice = convert([prepared])[0], convert([first])[0]
    assert prepared.axis == -2
    np.testing.assert_array_equal(slice.codes, whole.codes[0])
    blocks = [jq.Rule("w", ArrayConfig(group_size=(16, None)), axis=(1, 2))]
    assert prepare(weights(blocks, shape=(3, 32, 8)), blocks)["w"].axis == (-2, -1)


@pytest.mark.slow
def test_a_prepared_weight_can_be_cast_to_another_dtype():
    prepared = prepare(weights({"w": W8A16}), {"w": W8A16})["w"]
    narrow = prepared.astype(jnp.bfloat16)
    assert (narrow.dtype, narrow.weight.dtype) == (jnp.bfloat16, jnp.float32)
    x = X.astype(jnp.bfloat16)

    def total(p):
        return jnp.sum(jq.matmul(x, p), dtype=jnp.float32)

    served = convert([prepared])[0].astype(jnp.bfloat16)
    assert jq.matmul(x, narrow).dtype == jnp.bfloat16
    np.testing.assert_array_equal(jq.matmul(x, narrow), jq.matmul(x, served))
    gradient = jax.grad(total)(narrow).weight
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient[:, 0], np.sum(x, 0, dtype=np.float32), rtol=0.02, atol=0.05)


def test_prepared_weights_print_in_one_line_and_know_their_shape():
    prepared = learn(weights({"w": W8A8}), {"w": W8A8})["w"]
    assert repr(prepared) == "Prepared(int8 128x24, LearnedStep, float32)"
    assert repr(prepare({"w": X}, {"w": W8A8})["w"]) == "Prepared(int8 5x128, float32)"
    assert (prepared.shape, prepared.ndim, prepared.size) == ((K, N), 2, K * N)
    placeholder = jax.tree.map(lambda _: None, prepared)
    assert repr(placeholder) == "Prepared(int8, weight=None)"


def test_a_report_of_a_prepared_tree_equals_that_of_the_converted_one():
    params = weights({"w": W8A8})
    prepared = learn(params, {"w": W8A8})
    for before in (params, None):
        assert jq.tree.report(before, prepared) == jq.tree.report(before, convert(prepared))


def test_mismatched_trees_raise():
    params, rules = weights({"a": W8A8, "b": W8A8}), {"a": W8A8}
    learned, prepared = init_learned(params, rules), prepare(params, rules)
    cases = [
        (
            lambda: convert(params),
            "convert expects a tree from prepare; got one .* with paths a, b",
        ),
        (lambda: convert(convert(prepared)), "convert expects a tree from prepare"),
        (lambda: convert({}), "with paths none"),
        (
            lambda: prepare(prepared, rules),
            r"a: already prepared for training \(Prepared\(int8 128x24, float32\)\); training",
        ),
        (lambda: jq.tree.quantize(prepared, W8A8), "a: already prepared for training"),
        (lambda: prepare(convert(prepared), rules), "a: already quantized"),
        (lambda: prepare(params, {"c": W8A8}), "rule 'c' matches no leaf"),
        (
            lambda: prepare(params, {"b": W8A8}, learned),
            r"learned must be for the leaves that the rules select, \['b'\]; got \['a'\]",
        ),
        (
            lambda: prepare(params, {"a": GROUPED}, learned),
            r"learned does not fit a: A LearnedStep needs symmetric=True; got",
        ),
        (
            lambda: prepare(params, {"a": SCHEMES["W4A16"]}, {"a": LearnedStep(jnp.ones((2, 1)))}),
            r"learned does not fit a: .* shape of the scales, \(1, 24\); got \(2, 1\)",
        ),
        (
            lambda: prepare(params, rules, {"a": jnp.ones((1, N))}),
            "learned does not fit a: learned must be a LearnedStep, a LearnedRange",
        ),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()


def test_a_trained_array_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        jq.core.TrainedArray()  # pyright: ignore[reportAbstractUsage] (so meant)
    assert isinstance(prepare({"w": X}, {"w": W8A8})["w"], Prepared)
