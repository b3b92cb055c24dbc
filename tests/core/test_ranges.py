import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import (
    FP8_E4M3,
    INT2,
    INT4,
    INT8,
    MXFP4,
    NF4,
    NVFP4,
    AbsMax,
    ArrayConfig,
    MinMSE,
    Percentile,
    quantize,
    quantize_with_range,
)
from jaxquant.core import IQ4_NL, store_scale

from .. import cases, checks, oracles
from ..cases import along


@partial(jax.jit, static_argnames=("range", "symmetric", "axes"))
def range_of(range, x, symmetric, axes=(1,)):
    def no_error(low, high):
        raise AssertionError("This range needs no error.")

    return range(x, axes, symmetric, no_error)


PERCENTILES = [(101, 50.1), (101, 75), (101, 99.99), (101, 100), (1, 99), (2, 50.1), (1000, 99)]
PERCENTILES = [(i % 2 == 0, *row) for i, row in enumerate(PERCENTILES)]
PERCENTILES += [(False, 101, 99.99), (True, 1000, 75)]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("symmetric, count, p", PERCENTILES)
def test_percentile_is_that_of_numpy(symmetric, count, p):
    random = np.random.default_rng(count)
    # The last rows hold many duplicates, one value only, one sign only, and zeros.
    x = random.normal(size=(7, count)).astype(np.float32)
    x[2] = random.integers(-2, 3, count)
    x[3], x[4], x[5] = 1.5, np.abs(x[4]) + 1, -np.abs(x[5]) - 1
    x[6, : count // 2] = 0

    low, high = range_of(Percentile(p), x, symmetric)

    expected = np.array([oracles.percentile_range(row, symmetric, p) for row in x])
    np.testing.assert_allclose(low[:, 0], expected[:, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(high[:, 0], expected[:, 1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_percentile_orders_floats_of_every_size_and_sign(dtype):
    with jax.enable_x64(dtype == "float64"):
        info = np.finfo(dtype)
        x = [-info.max, -1, -1e-30, -info.tiny, -0.0, 0.0, info.tiny, 1e-30, 1, 2, info.max]
        x = np.random.default_rng(0).permutation(np.array(x, dtype))[None]
        for p in (60.0, 100.0):
            _, high = range_of(Percentile(p), x, symmetric=False)
            assert high == max(np.percentile(x, p), 0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), p=st.sampled_from([60, 97.5]))
def test_percentile_of_any_data_is_that_of_numpy(seed, p):
    random = np.random.default_rng(seed)
    x = (random.normal(size=(3, 37)) * np.exp2(random.integers(-40, 40, (3, 37)))).astype("f4")
    x[random.random(x.shape) < 0.3] = random.choice([0, 1, -1, x[0, 0]])
    low, high = range_of(Percentile(p), x, symmetric=False)
    expected = np.array([oracles.percentile_range(row, False, p) for row in x])
    np.testing.assert_allclose(low[:, 0], expected[:, 0], rtol=2e-6)
    np.testing.assert_allclose(high[:, 0], expected[:, 1], rtol=2e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_spans_several_axes_at_once(symmetric):
    x = np.random.default_rng(0).normal(size=(5, 3, 7)).astype(np.float32)
    low, high = range_of(Percentile(90), x, symmetric, axes=(0, 2))
    assert low.shape == high.shape == (1, 3, 1)
    for i in range(3):
        expected = oracles.percentile_range(x[:, i], symmetric, 90)
        np.testing.assert_allclose((low[0, i, 0], high[0, i, 0]), expected, rtol=1e-6)


@pytest.mark.parametrize("format, symmetric", [(INT8, True), (INT4, False)], ids=str)
def test_percentile_100_is_abs_max_bit_for_bit(format, symmetric):
    x = cases.gaussian()
    config = ArrayConfig(format=format, symmetric=symmetric, range=Percentile(100))
    plain = dataclasses.replace(config, range=AbsMax())
    checks.assert_equal_quantized(quantize(x, config, 1), quantize(x, plain, 1))


@pytest.mark.parametrize("p", [50, 0, -1, 100.1, float("nan")])
def test_percentile_must_be_above_50_and_at_most_100(p):
    with pytest.raises(ValueError, match=r"p must be above 50 and at most 100 \(percent\); got"):
        Percentile(p)


def test_elements_beyond_the_percentile_are_clipped_to_it():
    x = np.linspace(-1, 1, 201, dtype=np.float32)[None]
    values = quantize(x, ArrayConfig(range=Percentile(80)), axis=1).dequantize()
    np.testing.assert_allclose(np.abs(values).max(), 0.8, rtol=1e-6)
    inside = np.abs(x) <= 0.8
    assert np.all(np.abs(values - x)[inside] <= 0.5001 * 0.8 / 127)


MSE_CASES = [
    along(1, format=INT4),
    along(1, format=INT4, group_size=64, symmetric=False),
    along(1, format=NF4),
    along(1, format=FP8_E4M3),
    along(1, format=MXFP4),
]


def squared_errors(x, config, axis=1):
    square = (np.asarray(quantize(x, config, axis).dequantize(), np.float64) - x) ** 2
    return np.array([square[where].sum() for _, where in oracles.blocks(x.shape, config, axis)[1]])


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("config, axis", MSE_CASES, ids=str)
def test_min_mse_is_never_worse_than_abs_max_in_any_group(config, axis):
    x = cases.gaussian()
    x[:, 7] *= 8  # Outliers, which are worth clipping in the narrow formats.
    plain = squared_errors(x, config, axis)
    best = squared_errors(x, dataclasses.replace(config, range=MinMSE()), axis)
    assert np.all(best <= plain * (1 + 1e-5))
    if config.format.bits <= 4 and config.stored_scale_dtype != "float8_e8m0fnu":
        assert best.sum() < plain.sum()


NESTED = [
    along(1, format=NVFP4),
    along(-1, format=INT4, group_size=32, symmetric=False, scale_dtype="float8_e4m3fn"),
    along((0, 1), format=INT4, group_size=16, scale_dtype="float8_e4m3fn"),
]


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("config, axis", NESTED, ids=str)
def test_min_mse_is_never_worse_than_abs_max_where_scales_are_nested(config, axis):
    x = np.random.default_rng(0).standard_t(4, cases.SHAPE).astype(np.float32)
    x[3] *= 50  # The outer scale follows the largest group, and all others lie far below.
    plain = squared_errors(x, config, axis)
    best = squared_errors(x, dataclasses.replace(config, range=MinMSE()), axis)
    assert np.all(best <= plain * (1 + 1e-5))
    assert best.sum() < plain.sum() or config.format.bits == 8


@pytest.mark.slow
def test_min_mse_is_never_worse_than_abs_max_in_a_stack_with_nested_scales():
    stack = np.random.default_rng(0).standard_t(4, (3, 32, 64)).astype(np.float32)
    stack *= np.array([1e-3, 1, 1e3], np.float32)[:, None, None]
    config = ArrayConfig(format=NVFP4)
    plain = squared_errors(stack, config, axis=-2)
    best = squared_errors(stack, dataclasses.replace(config, range=MinMSE()), axis=-2)
    assert np.all(best <= plain * (1 + 1e-5))
    assert best.sum() < plain.sum()
    whole = quantize(stack, dataclasses.replace(config, range=MinMSE()), axis=-2)
    for i, layer in enumerate(stack):
        alone = quantize(layer, dataclasses.replace(config, range=MinMSE()), axis=-2)
        np.testing.assert_array_equal(whole.dequantize()[i], alone.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize("end", ["lower", "upper"])
def test_min_mse_searches_each_end_of_an_asymmetric_range_finely(end):
    # Many elements at one end and an outlier at the other, whose end is to be searched alone.
    random = np.random.default_rng(1)
    x = np.concatenate([random.random((32, 255)) * 1.2 - 1, random.uniform(1, 4, (32, 1))], 1)
    x = jnp.asarray(x if end == "upper" else -x, jnp.float32)
    config = ArrayConfig(format=INT4, symmetric=False)
    q = quantize(x, dataclasses.replace(config, range=MinMSE()), axis=1)
    low, high = (
        (edge - checks.zero_point_of(q).astype(np.float32)) * np.asarray(q.scale)
        for edge in (-8, 7)
    )

    @jax.jit
    def errors(factor):
        ends = (low, high * factor) if end == "upper" else (low * factor, high)
        values = quantize_with_range(x, *ends, config, axis=1).dequantize()
        return jnp.sum(jnp.square(values - x), 1)

    found = jnp.sum(jnp.square(q.dequantize() - x), 1)
    best = jax.lax.map(errors, jnp.linspace(0.8, 1.25, 181)).min(0)
    assert found.sum() <= 1.0002 * best.sum()


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("format", [INT2, NF4], ids=str)
def test_min_mse_comes_near_to_the_best_of_all_ratios(format):
    x = np.random.default_rng(0).standard_t(3, (12, 96)).astype(np.float32)
    config = ArrayConfig(format=format, range=MinMSE())
    got = squared_errors(x, config)
    ratios = np.linspace(0.01, 1, 500)
    best = np.array([oracles.best_squared_error(row, config, ratios) for row in x])
    assert np.all(got <= 1.015 * best)
    assert got.sum() <= 1.005 * best.sum()


@pytest.mark.parametrize("scale_dtype", [None, "float16"])
@pytest.mark.parametrize("format", [INT4, INT2, NF4], ids=str)
def test_mirrored_ranges_are_the_better_of_x_and_minus_x(format, scale_dtype):
    x = np.random.default_rng(0).standard_t(3, (24, 64)).astype(np.float32)
    plain = ArrayConfig(format=format, range=MinMSE(), scale_dtype=scale_dtype)
    config = dataclasses.replace(plain, range=MinMSE(mirrored=True))
    signs = squared_errors(x, plain), squared_errors(-x, plain)
    np.testing.assert_allclose(squared_errors(x, config), np.minimum(*signs), rtol=1e-5)
    is_negative = np.asarray(quantize(x, config, 1).scale)[:, 0] < 0
    np.testing.assert_array_equal(is_negative, signs[1] < signs[0])
    assert 0 < is_negative.sum() < len(x)


@pytest.mark.parametrize("format", [FP8_E4M3, MXFP4, NVFP4], ids=str)
def test_mirrored_ranges_change_nothing_where_codes_are_symmetric(format):
    x = np.random.default_rng(0).standard_t(3, (8, 64)).astype(np.float32)
    config = ArrayConfig(format=format, range=MinMSE())
    mirrored = dataclasses.replace(config, range=MinMSE(mirrored=True))
    chex.assert_trees_all_equal(quantize(x, mirrored, 1), quantize(x, config, 1))


def test_scales_of_either_sign_are_stored_within_the_range_of_their_dtype():
    scales = jnp.array([1e-9, -1e-9, 0.5, -0.5, 1e6, -1e6, 0])
    smallest = float(jnp.finfo(jnp.float16).smallest_subnormal)
    # Without codes for zero, that of an empty range is as small as possible.
    for format, empty in ((INT4, 1), (IQ4_NL, smallest)):
        np.testing.assert_array_equal(
            store_scale(scales, ArrayConfig(format=format, scale_dtype="float16"), None),
            np.array([smallest, -smallest, 0.5, -0.5, np.nan, np.nan, empty], np.float16),
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_min_mse_shrinks_each_end_of_an_asymmetric_range_on_its_own(sign):
    # Many elements down to -1 and one outlier above: only the upper end is worth shrinking.
    x = (np.random.default_rng(0).random((8, 4096)) * 1.5 - 1).astype(np.float32)
    x[:, 0] = 6
    config = ArrayConfig(format=INT4, symmetric=False, range=MinMSE())
    q = quantize(sign * x, config, axis=1)
    ends = [(end - checks.zero_point_of(q)) * checks.scale_of(q) * sign for end in (-8, 7)]
    low, high = ends[::sign]
    assert np.all((low < -0.85) & (high < 3))


@dataclasses.dataclass(frozen=True)
class Half:
    """Half of the abs-max range: a range of a user's own."""

    def __call__(self, groups, axes, symmetric, error):
        high = jnp.max(jnp.abs(groups), axes, keepdims=True, initial=0) / 2
        assert error(-high, high).shape == high.shape
        return -high, high


def test_any_callable_is_a_range():
    x = cases.gaussian()
    plain = quantize(x, ArrayConfig(), axis=1)
    half = quantize(x, ArrayConfig(range=Half()), axis=1)
    scale = np.asarray(plain.scale)
    np.testing.assert_allclose(half.scale, np.where(scale == 1, 1, scale / 2), rtol=1e-6)
    checks.check_non_finite_marks_its_group(along(1, range=Half()), x)
