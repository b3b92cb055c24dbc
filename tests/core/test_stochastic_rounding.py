"""Rounding with a random key: of the two codes around a value one at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    FORMATS,
    FP8_E5M2,
    INT2,
    INT4,
    INT8,
    MXFP4,
    MXFP8,
    NF4,
    NVFP4,
    ArrayConfig,
    Percentile,
    QTensor,
    quantize,
    quantize_with_range,
)

from .. import checks, oracles

pytestmark = pytest.mark.usefixtures("quick_compilation")

DRAWS = 1024
# Each format but those that are rounded as another: to integers, or to floats.
ALIKE = (INT8, INT4, INT2, FP8_E5M2, MXFP8, MXFP4)
CONFIGS = {str(f): ArrayConfig(format=f) for f in FORMATS.values() if f not in ALIKE} | {
    "int4 asymmetric": ArrayConfig(format=INT4, group_size=32, symmetric=False),
    "int8 percentile": ArrayConfig(format=INT8, range=Percentile(90)),
}


def rows():
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    x[1] *= 1e-6
    x[:, 5], x[2, :32] = 0, 0
    x[0, :3] = [1e-4, -1e-4, 0.9]
    return x


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "name, dtype", [(n, "bfloat16" if n == "int4 asymmetric" else "float32") for n in CONFIGS]
)
def test_the_mean_of_many_draws_is_the_value_and_each_is_a_neighbour(name, dtype):
    config, x = CONFIGS[name], jnp.asarray(rows(), dtype)
    keys = jax.random.split(jax.random.key(0), DRAWS)

    draws = jax.jit(jax.vmap(lambda key: quantize(x, config, 1, key)))(keys)

    one = jax.tree.map(lambda leaf: leaf[0], draws)
    scale, zero = (
        oracles.repeat_groups(f(one), x.shape) for f in (checks.scale_of, checks.zero_point_of)
    )
    points = checks.points_of(config)
    wanted = np.clip(np.asarray(x).astype(np.float64) / scale + zero, points[0], points[-1])
    above = np.clip(np.searchsorted(points, wanted, "right"), 1, len(points) - 1)
    low, high = points[above - 1], points[above]
    got = oracles.code_values(draws.codes, config.format)
    # A value within float32 rounding of a code may lie on its other side.
    is_code = np.minimum(wanted - low, high - wanted) < 1e-5 * (1 + np.abs(wanted))
    nearest = np.where(wanted - low < high - wanted, low, high)
    assert np.all((got == low) | (got == high) | is_code)
    assert np.all(np.abs(got - nearest) <= np.where(is_code, high - low, np.inf))
    chance = (wanted - low) / (high - low)
    deviation = (high - low) * np.sqrt(chance * (1 - chance) / DRAWS)
    assert np.all(np.abs(got.mean(0) - wanted) < 5 * deviation + 1e-4 * (high - low))
    values = np.asarray(jax.vmap(lambda q: q.dequantize())(draws)).astype(np.float64)
    np.testing.assert_array_equal(values[:, np.asarray(x) == 0], 0)


@pytest.mark.slow
def test_the_scale_is_that_of_rounding_to_nearest_and_keys_differ():
    config, x = CONFIGS["int4 asymmetric"], rows()
    nearest = quantize(x, config, axis=1)
    first, second = (quantize(x, config, 1, jax.random.key(i)) for i in range(2))
    for q in (first, second):
        np.testing.assert_array_equal(q.scale, nearest.scale)
        np.testing.assert_array_equal(q.zero_point, nearest.zero_point)
    assert np.any(checks.codes_of(first) != checks.codes_of(second))
    again = quantize(x, config, 1, jax.random.key(0))
    checks.assert_equal_quantized(again, first)


@pytest.mark.parametrize("format", [INT8, NF4], ids=str)
def test_exact_codes_are_unchanged_in_millions_of_draws(format):
    # Added to noise just below 1, 127 would round to 128 once in 2^18 draws.
    book = format.codebook or (127.0, -127.0, 90.0, -1.0)
    x = jnp.asarray(np.resize(np.asarray(book, np.float32), (2**20, 1)))
    config = ArrayConfig(format=format, per_tensor=True)

    codes = jax.jit(lambda x: quantize(x, config, key=jax.random.key(1)).codes)(x)

    values = oracles.code_values(codes, format)
    np.testing.assert_array_equal(values.astype(np.float32), x)


def test_nan_fills_its_group_and_clipped_values_stay_at_the_end():
    x = rows()
    x[0, 7], x[1, 9] = np.nan, np.inf
    values = np.asarray(quantize(x, ArrayConfig(), 1, jax.random.key(0)).dequantize())
    np.testing.assert_array_equal(np.isnan(values).all(1), [True, True, False])

    config = CONFIGS["int8 percentile"]
    codes = checks.codes_of(quantize(rows(), config, 1, jax.random.key(0)))
    scale = checks.scale_of(quantize(rows(), config, axis=1))
    is_beyond = rows() > 127.01 * scale
    assert is_beyond.any()
    np.testing.assert_array_equal(codes[is_beyond], 127)


def test_keys_share_one_compilation():
    config, traces = ArrayConfig(), []

    @jax.jit
    def f(x, key):
        traces.append(x)
        return quantize(x, config, key=key)

    for seed in range(3):
        f(jnp.ones((8, 3)), jax.random.key(seed))
    assert len(traces) == 1


NARROW = {
    "mxfp4": ArrayConfig(format=MXFP4),
    "mxfp8": ArrayConfig(format=MXFP8),
    "nvfp4": ArrayConfig(format=NVFP4),
    "bfloat16": ArrayConfig(format=INT4, group_size=32, scale_dtype="bfloat16"),
    "float16": ArrayConfig(format=INT8, group_size=32, scale_dtype="float16"),
    "float8_e4m3fn": ArrayConfig(format=NF4, group_size=32, scale_dtype="float8_e4m3fn"),
}


def next_below(scale):
    """The stored scales that are one step smaller, in float64."""
    if isinstance(scale, QTensor):
        below = next_below(scale.codes) * np.asarray(scale.scale, np.float64)
        return np.where(np.asarray(scale.codes, np.float32) > 2.0**-9, below, 0)
    values = np.asarray(scale)
    if "e8m0" in scale.dtype.name:
        return values.astype(np.float64) / 2
    return np.nextafter(values, np.zeros_like(values)).astype(np.float64)


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("name", NARROW)
def test_stored_scales_are_rounded_up_so_that_nothing_is_clipped(name):
    """Rounded to nearest, scales clip the largest elements of their groups: the mean shrinks."""
    config, random = NARROW[name], np.random.default_rng(0)
    x = random.normal(size=(64, 128)) * 10 ** random.uniform(-1, 1, (64, 1))
    x = x.astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 64)
    draws = jax.jit(jax.vmap(lambda key: quantize(x, config, 1, key)))(keys)

    one = jax.tree.map(lambda leaf: leaf[0], draws)
    scale, end = checks.scale_of(one), config.symmetric_qmax
    largest = np.abs(x).reshape(*scale.shape, -1).max(-1)
    assert np.all(largest <= end * scale * (1 + 1e-6))
    assert np.all(largest > end * next_below(one.scale) * (1 - 1e-6))
    assert np.any(largest > end * checks.scale_of(quantize(x, config, 1)) * (1 + 1e-4))
    mean = np.asarray(jax.vmap(QTensor.dequantize)(draws), np.float64).mean(0)
    assert abs(np.sum(mean * x) / np.sum(x.astype(np.float64) ** 2) - 1) < 1e-3
    given = jnp.asarray(largest, jnp.float32)
    checks.assert_equal_quantized(quantize_with_range(x, -given, given, config, 1, keys[0]), one)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_scales_of_tiny_elements_are_rounded_up_too(dtype):
    """The step between bfloat16 numbers below 1.5e-36 is subnormal, and flushed to zero."""
    x = np.linspace(-1, 0.9, 64, dtype=np.float32) * np.float32(1e-35)
    config = ArrayConfig(format=INT8, scale_dtype=dtype)
    q = quantize(x, config, 0, jax.random.key(0))
    scale = checks.scale_of(q)
    # The smallest number of float16 is 6e-8.
    assert np.all(scale <= max(1.2 * 1e-35 / 127, 6.1e-8 * (dtype == "float16")))
    assert np.all(127 * scale * (1 + 1e-6) >= 1e-35)
    assert np.all(np.abs(q.dequantize() - x) <= scale)


def test_zero_points_clip_by_at_most_half_a_step():
    """They are integers: the range may begin half a step below the smallest code."""
    x = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    config = ArrayConfig(format=INT4, symmetric=False)
    draws = jax.vmap(lambda key: quantize(x, config, 1, key).dequantize())(
        jax.random.split(jax.random.key(0), 1024)
    )
    scale = np.asarray(quantize(x, config, 1).scale)
    bias = (np.asarray(draws, np.float64).mean(0) - x) / scale
    is_end = np.abs(x - (x.max(1) + x.min(1))[:, None] / 2) > 7 * scale
    # A mean of 1024 draws deviates by 1/64 of a step.
    assert np.max(np.abs(bias[~is_end])) < 6 / 64
    assert 0.3 < np.max(np.abs(bias[is_end])) < 0.5 + 6 / 64
