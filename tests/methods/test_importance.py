import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.methods import GPTQ, Importance, MeanSquare, SecondMoment

CONFIGS = [
    jq.ArrayConfig(format=jq.INT4, group_size=16),
    jq.ArrayConfig(format=jq.INT4, group_size=16, symmetric=False, scale_dtype="bfloat16"),
    jq.ArrayConfig(format=jq.NF4, group_size=16),
    jq.ArrayConfig(format=jq.NVFP4),
    jq.ArrayConfig(format=jq.MXFP4),
    jq.ArrayConfig(format=jq.INT8),
]


def weighted_error(q, weight, mean_square):
    """The objective, from its definition."""
    w = weight.astype(np.float64)
    spread = np.sqrt(np.mean(w**2, 1, keepdims=True) + w**2)
    return np.sum(mean_square * spread * np.square(np.asarray(q.dequantize(), np.float64) - w))


def matrix(seed, rows=6):
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, 32)) * rng.uniform(0.1, 3, (1, 32))
    return weight.astype(np.float32), rng.exponential(size=32).astype(np.float32) ** 2


def run(weight, mean_square, config, **arguments):
    method = Importance(**arguments)
    return jax.jit(lambda w, m: method(w, {MeanSquare: m}, config, 1))(weight, mean_square)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(c.format))
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_the_weighted_error_is_never_above_that_of_the_largest_magnitude(config, seed):
    weight, mean_square = matrix(seed)
    nearest = weighted_error(jq.quantize(weight, config, 1), weight, mean_square)
    found = weighted_error(run(weight, mean_square, config), weight, mean_square)
    assert found <= nearest * (1 + 1e-5)


@pytest.mark.slow
def test_refinements_lower_the_error():
    weight, mean_square = matrix(0, rows=64)
    config = CONFIGS[0]
    errors = [
        weighted_error(run(weight, mean_square, config, steps=n), weight, mean_square)
        for n in (0, 1, 4)
    ]
    assert errors[2] <= errors[1] < errors[0]


def test_refined_scales_are_the_weighted_least_squares_ones():
    weight, mean_square = matrix(1)
    q = run(weight, mean_square, jq.ArrayConfig(format=jq.INT4), steps=20)
    w, codes = weight.astype(np.float64), np.asarray(q.codes, np.float64)
    weights = mean_square * np.sqrt(np.mean(w**2, 1, keepdims=True) + w**2)
    best = np.sum(weights * w * codes, 1) / np.sum(weights * codes**2, 1)
    np.testing.assert_allclose(np.asarray(jax.tree.leaves(q.scale)[0])[:, 0], best, rtol=1e-4)


@pytest.mark.parametrize("format", [jq.INT4, jq.NF4], ids=str)
def test_scales_are_negative_where_that_is_better(format):
    weight, mean_square = matrix(3, rows=32)
    config = jq.ArrayConfig(format=format)
    plain = jq.ArrayConfig(format=format, range=jq.MinMSE())
    q = run(weight, mean_square, config)
    is_negative = np.asarray(q.scale)[:, 0] < 0
    assert 0 < is_negative.sum() < len(weight)
    found = weighted_error(q, weight, mean_square)
    of_signs = [
        weighted_error(run(w, mean_square, plain), w, mean_square) for w in (weight, -weight)
    ]
    assert found < 0.99 * min(of_signs)


def test_channels_that_count_for_nothing_change_nothing():
    weight, mean_square = matrix(2)
    mean_square[16:] = 0
    q = run(weight, mean_square, CONFIGS[0])
    nearest = jq.quantize(weight, CONFIGS[0], 1)
    scale, other = q.scale, nearest.scale
    assert isinstance(scale, jax.Array)
    assert isinstance(other, jax.Array)
    np.testing.assert_array_equal(scale[:, 1], other[:, 1])
    assert np.any(scale[:, 0] != other[:, 0])


@pytest.mark.slow
def test_the_method_vectorizes():
    pairs = [matrix(seed) for seed in range(3)]
    weight, mean_square = (np.stack(x) for x in zip(*pairs, strict=True))
    mapped = jax.vmap(lambda w, m: Importance()(w, {MeanSquare: m}, CONFIGS[0], 1))(
        weight, mean_square
    )
    for i, (w, m) in enumerate(pairs):
        np.testing.assert_array_equal(
            np.asarray(mapped.codes[i], int), np.asarray(run(w, m, CONFIGS[0]).codes, int)
        )


@pytest.mark.parametrize("steps", [-1, 1.5])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match=f"steps must be a nonnegative int; got {steps}"):
        Importance(steps=steps)


REPEATED = jq.ArrayConfig(format=jq.INT4, range=jq.MinMSE())


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_importance_counts_like_repeated_elements(symmetric):
    config = jq.ArrayConfig(format=jq.INT4, range=jq.MinMSE(), symmetric=symmetric)
    x = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    times = np.random.default_rng(1).integers(1, 5, 12)
    q = jq.quantize(x, config, importance=times[:, None].astype(np.float32))
    expected = jq.quantize(np.repeat(x, times, 0), config)
    np.testing.assert_allclose(q.scale, expected.scale, rtol=1e-6)
    assert np.any(q.scale != jq.quantize(x, config).scale)


def test_importance_of_one_changes_nothing():
    x = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    q = jq.quantize(x, REPEATED, importance=np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(q.codes, jq.quantize(x, REPEATED).codes)


def test_huge_and_tiny_importance_is_no_problem():
    x = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    times = np.random.default_rng(1).uniform(1, 5, (12, 1)).astype(np.float32)
    q = jq.quantize(x, REPEATED, importance=times)
    for factor in (1e30, 1e-30):
        other = jq.quantize(x, REPEATED, importance=times * np.float32(factor))
        np.testing.assert_array_equal(q.scale, other.scale)


@pytest.mark.parametrize(
    "importance, range_, message",
    [
        (np.ones((4, 1)), jq.AbsMax(), r"importance weights the errors .* got importance with ran"),
        (np.ones(4), jq.MinMSE(), r"importance must have the rank of x.*; got \(4,\) for x \(4, 2"),
        (np.ones((3, 1)), jq.MinMSE(), r"importance must have the rank of x.*; got \(3, 1\)"),
    ],
)
def test_bad_importance(importance, range_, message):
    config = jq.ArrayConfig(range=range_)
    with pytest.raises(ValueError, match=message):
        jq.quantize(jnp.ones((4, 2)), config, importance=importance)


@pytest.mark.parametrize("factor", [2.0**-80, 2.0**70])
def test_scales_of_weights_do_not_matter(factor):
    weight, mean_square = matrix(3)
    expected = run(weight, mean_square, CONFIGS[0])
    found = run(weight * np.float32(factor), mean_square, CONFIGS[0])
    np.testing.assert_array_equal(found.codes, expected.codes)
    assert isinstance(found.scale, jax.Array)
    np.testing.assert_allclose(found.scale / np.float32(factor), expected.scale, rtol=1e-6)


def test_nan_stays_in_its_group():
    weight, mean_square = matrix(4)
    mean_square[16:] = np.exp(np.arange(16) / 2)
    weight[2, 3] = 0
    expected = np.array(run(weight, mean_square, CONFIGS[0]).dequantize())
    weight[2, 3] = np.nan
    expected[2, :16] = np.nan
    np.testing.assert_array_equal(run(weight, mean_square, CONFIGS[0]).dequantize(), expected)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("method", [Importance(), GPTQ(importance=True)])
def test_ranges_that_minimize_no_error_raise(method):
    config = jq.ArrayConfig(format=jq.INT4, range=jq.Percentile(90))
    means = {MeanSquare: jnp.ones(4), SecondMoment: jnp.eye(4)}
    with pytest.raises(ValueError, match=r"got importance with range=Percentile\(p=90\), which"):
        method(jnp.ones((3, 4)), means, config, 1)
