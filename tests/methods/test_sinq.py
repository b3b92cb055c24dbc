from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import INT4, NF4, NVFP4, ArrayConfig, MinMSE, quantize
from jaxquant.methods import SINQ, Transform

from . import inputs

GROUPS = ArrayConfig(format=INT4, group_size=12)
CASES = {
    "int4-g12": (GROUPS, 1),
    "int4-asym_row": (ArrayConfig(format=INT4, symmetric=False, range=MinMSE()), 1),
    "nf4-g36": (ArrayConfig(format=NF4, group_size=36), 1),
    "int4-blocks": (ArrayConfig(format=INT4, group_size=(5, 18)), (0, 1)),
    "int4-tensor": (ArrayConfig(format=INT4, per_tensor=True), 1),
    "int4-nested": (ArrayConfig(format=INT4, group_size=12, scale_dtype="float8_e4m3fn"), 1),
}
# Lets every tile keep the whole of its factors.
ANY_ERROR = SINQ(tolerance=1e6)


def matrix(seed=0, shape=(15, 36), spread=0.7):
    random = np.random.default_rng(seed)
    x = random.normal(size=shape) * np.exp(spread * random.normal(size=shape[1]))
    return (x * np.exp(spread * random.normal(size=(shape[0], 1)))).astype(np.float32)


def blocks_of(config, axis, shape) -> Any:
    if config.per_tensor:
        return shape
    if axis == (0, 1):
        return config.group_size
    return 1, config.group_size or shape[1]


def deviations(tile, rows):
    """Of blocks of rows, and of columns."""
    of_rows = [np.std(tile[i : i + rows]) for i in range(0, len(tile), rows)]
    return np.array(of_rows), np.array([np.std(column) for column in tile.T])


def imbalance(tile, rows):
    both = np.concatenate(deviations(tile, rows))
    return both.max() / both.min()


def oracle(weight, rows, columns):
    """Algorithm 1 tile by tile, in float64: the factors of all columns."""
    factors = []
    for start in range(0, weight.shape[1], columns):
        tile = weight[:, start : start + columns].astype(np.float64)
        tile = tile / np.sqrt(np.mean(tile**2))
        of_rows, of_columns = np.zeros(len(tile) // rows), np.zeros(columns)
        target = min(d.min() for d in deviations(tile, rows))
        best, least = of_columns, np.inf
        for _ in range(17):
            balanced = tile / np.exp(of_columns) / np.exp(np.repeat(of_rows, rows))[:, None]
            if imbalance(balanced, rows) >= least:
                break
            best, least = of_columns, imbalance(balanced, rows)
            r, c = (np.log(np.clip(d / target, 0.7, 2)) for d in deviations(balanced, rows))
            of_rows = np.clip(of_rows + r, -0.3, 10)
            of_columns = np.clip(of_columns + c, -0.3, 10)
        factors.append(np.exp(best - best.mean()))
    return np.concatenate(factors)


def error(weight, multiplier, config, axis):
    decoded = quantize(jnp.asarray(weight / np.asarray(multiplier)), config, axis).dequantize()
    return np.square(np.asarray(decoded, np.float64) * np.asarray(multiplier) - weight)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_factors_match_the_oracle_and_keep_the_product(case):
    config, axis = case
    weight = matrix()
    expected = oracle(weight, *blocks_of(config, axis, weight.shape))

    changed = inputs.transform(ANY_ERROR, jnp.asarray(weight), {}, config, axis)

    assert np.ptp(expected) > 1
    np.testing.assert_allclose(changed.multiplier, expected, rtol=2e-4)
    np.testing.assert_allclose(changed.weight * changed.multiplier[None], weight, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_tile_keeps_the_largest_exponent_with_an_allowed_error(case):
    config, axis = case
    weight = matrix(1)
    _, columns = blocks_of(config, axis, weight.shape)
    factors = np.asarray(
        inputs.transform(ANY_ERROR, jnp.asarray(weight), {}, config, axis).multiplier
    )
    is_nested = config.scale_dtype is not None
    expected = np.ones_like(factors)
    for exponent in (0.25, 0.5, 0.75, 1):
        plain, tried = (error(weight, factors**p, config, axis) for p in (0, exponent))
        tiles = [slice(i, i + columns) for i in range(0, weight.shape[1], columns)]
        for tile in [slice(None)] if is_nested else tiles:
            if tried[:, tile].sum() <= plain[:, tile].sum():
                expected[tile] = factors[tile] ** exponent

    found = inputs.transform(SINQ(tolerance=0), jnp.asarray(weight), {}, config, axis).multiplier

    assert (expected != 1).any()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 3), st.sampled_from([0.0, 0.05]))
def test_neither_imbalance_nor_error_rise(seed, spread, tolerance):
    weight = matrix(seed, (8, 24), spread)
    for config in (GROUPS, ArrayConfig(format=NVFP4)):
        padded = np.pad(weight, ((0, 0), (0, 8))) if config.format is NVFP4 else weight
        changed = inputs.transform(SINQ(tolerance=tolerance), jnp.asarray(padded), {}, config, 1)
        errors = [error(padded, m, config, 1).sum() for m in (changed.multiplier, 1.0)]
        assert errors[0] <= (1 + tolerance) * errors[1] * (1 + 1e-4)
    balanced = inputs.transform(ANY_ERROR, jnp.asarray(weight), {}, GROUPS, 1).weight
    # The scales of the groups absorb the factors of the rows.
    for start in (0, 12):
        before, after = weight[:, start : start + 12], np.asarray(balanced[:, start : start + 12])
        assert least_imbalance(after) <= imbalance(before, 1) * (1 + 1e-4)


def least_imbalance(tile):
    """The imbalance after the best of many divisions of rows alone."""
    rows = np.ones((len(tile), 1))
    tried = []
    for _ in range(30):
        tried.append(imbalance(tile / rows, 1))
        rows = rows * np.clip(np.std(tile / rows, 1, keepdims=True) / np.std(tile), 0.5, 2)
    return min(tried)


@pytest.mark.slow
def test_under_jit_and_vmap():
    stack = jnp.stack([jnp.asarray(matrix(seed)) for seed in range(3)])

    def balance(weight):
        return inputs.transform(SINQ(), weight, {}, GROUPS, 1)[:2]

    mapped = jax.jit(jax.vmap(balance))(stack)
    for i, weight in enumerate(stack):
        for found, expected in zip(mapped, balance(weight), strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=1e-5)


@pytest.mark.slow
def test_columns_and_tiles_without_spread_keep_their_factor():
    weight = matrix()
    weight[:, 5] = 0
    weight[:, 12:24] = 0
    multiplier = np.asarray(
        inputs.transform(ANY_ERROR, jnp.asarray(weight), {}, GROUPS, 1).multiplier
    )
    changed = inputs.transform(ANY_ERROR, jnp.asarray(weight), {}, GROUPS, 1)
    np.testing.assert_array_equal(multiplier[12:24], 1)
    np.testing.assert_array_equal(changed.weight[:, 5], 0)
    assert np.isfinite(multiplier).all()
    assert np.ptp(multiplier[:12]) > 0.1
    single = inputs.transform(SINQ(), jnp.ones((1, 12)), {}, GROUPS, 1)
    np.testing.assert_array_equal(single.multiplier, 1)


@pytest.mark.slow
def test_nan_stays_in_its_tile():
    weight = matrix()
    expected = inputs.transform(SINQ(), jnp.asarray(weight), {}, GROUPS, 1)
    weight[3, 2] = np.nan
    found = inputs.transform(SINQ(), jnp.asarray(weight), {}, GROUPS, 1)
    np.testing.assert_array_equal(np.isnan(found.weight), np.isnan(weight))
    np.testing.assert_array_equal(found.multiplier[:12], 1)
    np.testing.assert_array_equal(found.multiplier[12:], expected.multiplier[12:])


def test_scales_of_weights_do_not_matter():
    weight = jnp.asarray(matrix())
    expected = inputs.transform(SINQ(), weight, {}, GROUPS, 1).multiplier
    for scale in (2.0**-60, 2.0**60):
        found = inputs.transform(SINQ(), weight * scale, {}, GROUPS, 1).multiplier
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_it_keeps_the_dtype_of_the_weight():
    changed = inputs.transform(SINQ(), jnp.asarray(matrix(), jnp.bfloat16), {}, GROUPS, 1)
    assert changed.weight.dtype == changed.multiplier.dtype == jnp.bfloat16


def test_it_is_a_transform_without_statistics():
    assert isinstance(SINQ(), Transform)
    assert SINQ().statistics == ()
    assert hash(SINQ()) == hash(SINQ(16))


def test_negative_settings_raise():
    with pytest.raises(ValueError, match="iterations must be a nonnegative int; got -1"):
        SINQ(iterations=-1)
    with pytest.raises(ValueError, match=r"tolerance must not be negative; got -0.1"):
        SINQ(tolerance=-0.1)
