"""Weights of many shapes, quantized by few compiled programs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from jaxquant import (
    FP8,
    INT8,
    MXFP4A16,
    NF4A16,
    NVFP4A16,
    W4A16,
    W4A16_ASYM,
    W8A8,
    ArrayConfig,
    MinMSE,
    quantize,
)
from jaxquant.keras import quantize as quantize_model
from jaxquant.keras.layer import quantize_rows as rows
from jaxquant.keras.layer import weights

CONFIGS: dict[str, ArrayConfig] = {
    "int8": W8A8.weights,
    "int4 g128": W4A16.weights,
    "int4 asymmetric": W4A16_ASYM.weights,
    "e4m3": FP8.weights,
    "nf4": NF4A16.weights,
    "mxfp4": MXFP4A16.weights,
    "a range of codes": ArrayConfig(format=INT8, value_range=(-100, 90)),
    "narrow scales": ArrayConfig(format=INT8, scale_dtype="bfloat16"),
}
# Shapes and contracted axes: convolutions, matrices in the order of the platform, padded groups,
# and more rows than one call has.
SHAPES = [
    ((3, 3, 5, 7), (0, 1, 2)),
    ((1, 1, 32, 40), (0, 1, 2)),
    ((3, 2, 4, 3), (0, 1)),
    ((300, 6), (0,)),
    ((6, 300), (1,)),
    ((5, 7, 4), (0, 2)),
    ((2, 70_000), (0,)),
    ((1,), (0,)),
]


def made(shape, axes, config, dtype="float32"):
    """A weight with a group of zeros and one of tiny numbers, and how to quantize it."""
    x = np.random.default_rng(0).normal(size=shape)
    x[..., 0] = 0
    x[0] *= 1e-12
    config, axis, padded = weights.fit_groups(shape, axes, config)
    like = weights.abstract_tensor(padded, dtype, config, axis, None)
    return jnp.asarray(x, dtype), config, axis, padded, like


def check_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert isinstance(x, np.ndarray)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        stored, wanted_bits = (np.ascontiguousarray(z).view(np.uint8) for z in (x, y))
        np.testing.assert_array_equal(stored, wanted_bits)


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_scales_are_those_of_quantize_bit_for_bit(name, shape, axes, dtype):
    x, config, axis, padded, like = made(shape, axes, CONFIGS[name], dtype)
    assert rows.fits_rows(x, config, like)
    found, noise = rows.quantize_rows(x, config, like)
    filled = jnp.pad(x, [(0, n - m) for n, m in zip(padded, shape, strict=True)])
    wanted = quantize(filled, config, axis).reorder(like.order)
    check_equal(found, wanted)
    exact, values = (np.asarray(y, np.float64) for y in (filled, wanted.dequantize()))
    error = np.linalg.norm(values - exact) / (np.linalg.norm(exact) or 1)
    assert noise == (True, pytest.approx(error, rel=1e-4, abs=1e-6))


def test_one_scale_for_the_whole_weight():
    config = ArrayConfig(format=INT8, per_tensor=True, symmetric=False)
    x, config, axis, _, like = made((6, 30), (0,), config)
    check_equal(rows.quantize_rows(x, config, like)[0], quantize(x, config, axis))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_noise_is_accurate_where_squares_overflow_or_underflow(size):
    x, config, _, _, like = made((32, 4), (0,), CONFIGS["int8"])
    _, noise = rows.quantize_rows(x * size, config, like)
    assert noise.is_finite
    assert 0.001 < noise.relative < 0.02


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_found(value):
    x, config, _, _, like = made((32, 4), (0,), CONFIGS["int8"])
    _, noise = rows.quantize_rows(x.at[3, 2].set(value), config, like)
    assert not noise.is_finite


def test_zeros_have_no_noise():
    x, config, _, _, like = made((32, 4), (0,), CONFIGS["int8"])
    assert rows.quantize_rows(0 * x, config, like)[1] == (True, 0)


def test_weights_that_rows_would_change_are_quantized_as_they_are():
    others = {
        "zeros change the range": ArrayConfig(format=INT8, range=MinMSE()),
        "scales depend on other groups": NVFP4A16.weights,
    }
    for config in others.values():
        x, config, _, _, like = made((32, 4), (0,), config)
        assert not rows.fits_rows(x, config, like)
    x, config, _, _, like = made((2, 2), (0,), CONFIGS["int8"])
    for other in (jax.ShapeDtypeStruct(x.shape, x.dtype), [1.0]):
        assert not rows.fits_rows(other, config, like)
    jax.eval_shape(lambda x: [not_fits(x, config, like)][:0], x)
    shape = (4 ** (len(rows.LENGTHS) + 1), 1)
    x, config, _, _, like = made(shape, (0,), CONFIGS["int8"])
    assert not rows.fits_rows(x, config, like)


def not_fits(x, config, like):
    assert not rows.fits_rows(x, config, like)


def widths_model() -> Any:
    image = y = keras.Input((8, 8, 3))
    for width in range(1, 21):
        y = keras.layers.Conv2D(width, 3, padding="same", bias_initializer="normal")(y)
    return keras.Model(image, y)


def test_twenty_convolutions_of_different_widths_share_a_few_programs():
    model = widths_model()
    by_rows: Any = rows._quantize_rows
    by_shape: Any = weights.quantize_padded
    by_rows.clear_cache()
    before = by_shape._cache_size()
    for mode in ("int8", "int4"):
        quantized, report = quantize_model(model, mode)
        done = [row for row in report.rows if row.scheme]
        assert len(done) == 20
        for row, layer in zip(done, quantized.layers[1:], strict=True):
            exact = np.asarray(model.get_layer(layer.name).kernel, np.float64)
            error = np.linalg.norm(np.asarray(layer.kernel) - exact) / np.linalg.norm(exact)
            assert row.sqnr == pytest.approx(-20 * math.log10(error), abs=1e-3)
    assert by_rows._cache_size() <= 6
    assert by_shape._cache_size() == before
