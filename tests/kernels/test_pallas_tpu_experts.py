"""The Pallas kernel for experts: what it computes, in interpret mode, and that it compiles."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import tpu_compiler
from jaxquant import FP8_E4M3, FP8_E5M2, INT4, ArrayConfig, quantize
from jaxquant.kernels import pallas_tpu, pallas_tpu_experts

from .. import oracles
from ..ops.products import normal
from ..ops.products import ragged_dot as slow_ragged_dot

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXPERTS, LENGTH, COLUMNS = 5, 256, 200
CONFIGS = {
    "int4 g128": ArrayConfig(format=INT4, group_size=128),
    "int4 g32 asymmetric": ArrayConfig(format=INT4, group_size=32, symmetric=False),
    "int8": ArrayConfig(),
    "fp8": ArrayConfig(format=FP8_E4M3),
    "fp8 g64": ArrayConfig(format=FP8_E5M2, group_size=64),
}
# Rows of each expert, of 150: several tiles of 64.
SIZES = {
    "two in a tile": (20, 100, 0, 7, 23),
    "whole tiles": (64, 64, 0, 0, 22),
    "rows of none": (0, 3, 0, 0, 0),
    "all of the last": (0, 0, 0, 0, 150),
    "none": (0, 0, 0, 0, 0),
    "more than there are": (100, 40, 60, 5, 5),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles along each axis, the last of which are not full."""
    monkeypatch.setattr(pallas_tpu_experts, "_ONE_TILE", 32)
    monkeypatch.setattr(pallas_tpu_experts, "_LEAST_ROWS", 64)
    monkeypatch.setattr(pallas_tpu_experts, "_MOST_ROWS", 64)
    monkeypatch.setattr(pallas_tpu, "_COLUMNS", 128)
    monkeypatch.setattr(pallas_tpu, "_LENGTH", 128)


def experts(config):
    return quantize(jnp.asarray(normal(EXPERTS, LENGTH, COLUMNS, seed=1)), config, 1)


def ragged_dot(x, q, sizes, row_scale=None, dtype=jnp.float32):
    run = jax.jit(partial(pallas_tpu_experts.ragged_dot, dtype=dtype, interpret=True))
    return run(x, q.codes, q.scale, q.zero_point, row_scale, jnp.asarray(sizes, jnp.int32))


def kept(sizes, rows):
    """The rows that each expert gets: the first ones take theirs before the others."""
    return np.diff(np.minimum(np.cumsum(sizes), rows), prepend=0)


def assert_ragged(got, x, q, sizes, tolerance=2e-6, rounds=False):
    values, x = oracles.dequantize(q), np.asarray(x, np.float64)
    if rounds:  # Many rows: the scaled weights are rounded to bfloat16.
        values = np.asarray(jnp.asarray(values, jnp.bfloat16), np.float64)
    sizes = kept(sizes, len(x))
    wanted = slow_ragged_dot(x, values, sizes)
    size = slow_ragged_dot(np.abs(x), np.abs(values), sizes)
    np.testing.assert_array_less(
        np.abs(np.asarray(got, np.float64) - wanted), tolerance * size + 1e-30
    )


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_many_rows_match_numpy(name):
    q, x = experts(CONFIGS[name]), jnp.asarray(normal(150, LENGTH), jnp.bfloat16)
    for sizes in SIZES.values():
        rounds = LENGTH // q.scale.shape[1] < 2 * 64
        assert_ragged(ragged_dot(x, q, sizes), x, q, sizes, rounds=rounds)


@pytest.mark.parametrize("rows", [1, 13])
def test_few_rows_are_one_tile(rows):
    q, x = experts(CONFIGS["int4 g128"]), jnp.asarray(normal(rows, LENGTH), jnp.bfloat16)
    sizes = (0, rows // 2, 0, 1, 0)
    assert_ragged(ragged_dot(x, q, sizes), x, q, sizes)
    half = ragged_dot(x, q, sizes, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(half, ragged_dot(x, q, sizes).astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["int4 g128", "int8"])
def test_codes_of_rows_are_exact_before_they_are_scaled(name):
    q, sizes = experts(CONFIGS[name]), SIZES["two in a tile"]
    codes = np.random.default_rng(0).integers(-127, 128, (150, LENGTH)).astype(np.int8)
    scale = np.linspace(0.5, 2, 150, dtype=np.float32)[:, None]
    got = ragged_dot(jnp.asarray(codes), q, sizes, jnp.asarray(scale))
    assert_ragged(got, codes * np.float64(scale), q, sizes)


def test_int8_codes_are_multiplied_as_integers(monkeypatch):
    """Sums above 2^24, which floats do not hold."""
    monkeypatch.setattr(pallas_tpu, "_LENGTH", 2048)
    x = np.full((3, 2048), 127, np.int8)
    w = np.full((1, 2048, 128), 127, np.int8)
    x[:, 0], w[:, 0] = 1, 2
    q = dataclasses.replace(
        quantize(jnp.ones(w.shape), ArrayConfig(), 1),
        codes=jnp.asarray(w),
        scale=jnp.ones((1, 1, 128)),
    )
    total = 2047 * 127**2 + 2
    assert total != int(np.float32(total))
    got = ragged_dot(jnp.asarray(x), q, (3,))
    np.testing.assert_array_equal(got, np.float32(total))


ROWS_OF_INT8 = pallas_tpu_experts.RowCodes(jnp.int8, 127)
ROWS_OF_FP8 = pallas_tpu_experts.RowCodes(jnp.float8_e4m3fn, 448)


@pytest.mark.some_rows(6)
@pytest.mark.parametrize("rows, dtype", [(1, jnp.float32), (13, jnp.bfloat16), (32, jnp.float32)])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("codes", [ROWS_OF_INT8, ROWS_OF_FP8], ids=["int8", "fp8"])
def test_the_first_step_quantizes_rows_as_the_kernel_for_that_does(name, rows, dtype, codes):
    """Bit by bit, for several tiles along both axes, and for rows of zeros and of NaN."""
    stack, x = experts(CONFIGS[name]), jnp.asarray(normal(rows, LENGTH), dtype)
    x = x.at[rows // 3].set(0).at[rows // 2, 7].set(jnp.nan)
    largest, of_rows = codes.largest, codes.dtype
    found, scale = pallas_tpu.quantize_rows(x, -largest, largest, of_rows, interpret=True)
    found = found if of_rows == jnp.int8 else found.astype(jnp.bfloat16)
    weights = stack.codes, stack.scale, stack.zero_point
    run: Any = partial(pallas_tpu_experts.stacked_dot, interpret=True)
    for layer in map(jnp.int32, (0, EXPERTS - 1)):
        wanted = run(found, *weights, scale, layer)
        got = run(x, *weights, None, layer, row_codes=codes)
        np.testing.assert_array_equal(got, wanted)
        assert np.isfinite(np.delete(got, rows // 2, 0)).all()


def test_a_few_rows_that_fit_are_quantized_in_place():
    for rows, length, fits in ((64, 2**14, True), (65, 128, False), (64, 2**14 + 128, False)):
        x: Any = jax.ShapeDtypeStruct((rows, length), jnp.float32)
        assert pallas_tpu_experts.quantizes_in_place(x) == fits


def test_experts_without_rows_and_rows_without_an_expert_are_not_read():
    q, sizes = experts(CONFIGS["int4 g128"]), SIZES["two in a tile"]
    x = normal(160, LENGTH)
    x[150:] = np.nan
    x = jnp.asarray(x, jnp.bfloat16)
    spoiled = dataclasses.replace(q, scale=jnp.asarray(q.scale).at[2].set(jnp.nan))
    got = np.asarray(ragged_dot(x, spoiled, sizes))
    assert_ragged(got[:150], x[:150], q, sizes)
    np.testing.assert_array_equal(got[150:], 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 90), st.integers(1, 40))
def test_steps_visit_each_tile_of_each_expert_once_and_in_order(sizes, rows, tile):
    expert, tiles, starts, count = pallas_tpu_experts.steps(
        jnp.asarray(sizes), rows, tile, len(sizes)
    )
    assert len(expert) == -(-rows // tile) + min(len(sizes), rows) - 1
    until = np.minimum(np.cumsum(sizes), rows)
    wanted = [
        (e, t)
        for e, (start, end) in enumerate(zip([0, *until[:-1]], until, strict=True))
        for t in range(start // tile, -(-end // tile))
        if end > start
    ]
    found = list(zip(expert.tolist(), tiles.tolist(), strict=True))
    assert count.tolist() == [len(wanted)]
    assert found[: len(wanted)] == wanted
    # Those without work stay where the last one was, and within the arrays.
    assert all(step == (wanted[-1] if wanted else found[0]) for step in found[len(wanted) :])
    assert all(0 <= e < len(sizes) and 0 <= t <= (rows - 1) // tile for e, t in found)
    assert starts.tolist() == [0, *until[:-1]]


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_kernel_compiles(chip, monkeypatch):
    monkeypatch.undo()
    for config in CONFIGS.values():
        q = jax.eval_shape(lambda c=config: quantize(jnp.zeros((4, 1024, 768)), c, 1))
        for rows, dtype in ((8, jnp.bfloat16), (1000, jnp.int8)):
            x = jax.ShapeDtypeStruct((rows, 1024), dtype)
            scale = jax.ShapeDtypeStruct((rows, 1), jnp.float32) if dtype == jnp.int8 else None
            sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
            arguments = x, q.codes, q.scale, q.zero_point, scale, sizes
            program = tpu_compiler.compile_for(chip, pallas_tpu_experts.ragged_dot, *arguments)
            assert "ragged_dot" in (program.as_text() or "")
