"""The Pallas kernels for GPUs: what they compute, in interpret mode, and what becomes of them."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.shapes import WEIGHTS
from jaxquant import INT4, ArrayConfig
from jaxquant.kernels import pallas_gpu

from .. import oracles
from ..ops.products import normal, weight
from ..triton import lowered_for_gpu

pytestmark = pytest.mark.usefixtures("quick_compilation")


def int4(**options):
    return ArrayConfig(format=INT4, **options)


# Dtype of x, rows, (K, N), config, programs among which sums are split.
CASES = {
    "one row, split": ("bfloat16", 1, (2048, 200), int4(group_size=128), 4),
    "32 columns of zero points": ("float32", 9, (384, 32), int4(group_size=32, symmetric=False), 3),
    "float16": ("float16", 64, (192, 70), int4(group_size=64, symmetric=False), 1),
    "two tiles of rows": ("bfloat16", 70, (96, 33), int4(), 1),
    "short groups": ("bfloat16", 17, (80, 65), int4(group_size=16), 1),
}


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", CASES)
def test_grouped_dot_matches_numpy(name):
    dtype, rows, shape, config, splits = CASES[name]
    q, x = weight(config, shape).reorder((-1, -2)), jnp.asarray(normal(rows, shape[0]), dtype)

    run = jax.jit(partial(pallas_gpu.grouped_dot, interpret=True))
    got = np.asarray(run(x, q.codes, q.scale, q.zero_point), np.float64)

    values, x = oracles.dequantize(q), np.asarray(x, np.float64)
    assert got.shape == (rows, shape[1])
    np.testing.assert_array_less(np.abs(got - x @ values), 2e-6 * np.abs(x) @ np.abs(values))
    program = str(jax.make_jaxpr(pallas_gpu.grouped_dot)(jnp.asarray(x), q.codes, q.scale))
    assert f"f32[{splits},{rows},{shape[1]}]" in program


@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
def test_the_kernel_takes_the_codes_as_they_lie(wide):
    q = weight(int4(group_size=64, symmetric=False), (192, 33)).reorder((-1, -2))
    with jax.enable_x64(wide):
        x = jnp.zeros((5, 192), jnp.bfloat16)
        text = lowered_for_gpu(pallas_gpu.grouped_dot, x, q.codes, q.scale, q.zero_point)
    (line,) = (line for line in text.splitlines() if "gpu.triton" in line)
    assert "tensor<33x3x64xi4>" in line
    # A reshape is free; a conversion of all codes would be a pass over the memory.
    codes = ("tensor<33x192xi4>", "tensor<33x3x64xi4>")
    (reshape,) = (line for line in text.splitlines() if any(f"({c}" in line for c in codes))
    assert "stablehlo.reshape" in reshape


@pytest.mark.parametrize("length, groups, size", [(120, 5, 24), (1000, 1, 1000), (35, 1, 35)])
def test_groups_that_no_step_divides_raise(length, groups, size):
    reason = f"groups of {size} are not a multiple of 16"
    assert pallas_gpu.why_unsupported_groups(length, groups) == reason


@pytest.mark.parametrize("shape", sorted(set(WEIGHTS) - {"odd"}))
def test_the_groups_of_the_benchmarks_are_taken(shape):
    length = WEIGHTS[shape][0]
    for group in (32, 128, length):
        assert pallas_gpu.why_unsupported_groups(length, length // group) is None


@pytest.mark.parametrize("missing", range(2))
def test_without_triton_the_reason_is_said(monkeypatch, missing):
    assert pallas_gpu.why_unsupported_platform() is None
    modules = list(pallas_gpu._TRITON)
    modules[missing] += "_of_another_release"
    monkeypatch.setattr(pallas_gpu, "_TRITON", modules)
    why = pallas_gpu.why_unsupported_platform.__wrapped__()
    assert why == "this JAX does not include Triton"


def test_sizes_beyond_the_offsets_of_the_kernels_raise():
    assert pallas_gpu.why_unsupported_sizes(8, 2**31 - 1) is None
    reason = "offsets in arrays of 2147483648 elements may overflow int32"
    assert pallas_gpu.why_unsupported_sizes(2**31, 8) == reason


def codes_and_scales(rows, length, columns, dtype=jnp.int8):
    """Operands of `scaled_dot`, with the outermost codes among them."""
    random = np.random.default_rng(0)
    limits = {"int8": (-128, 127), "float8_e4m3fn": (-448, 448)}[np.dtype(dtype).name]
    x, w = (random.uniform(-0.25, 1, (n, length)) * limits[1] for n in (rows, columns))
    x[0, :2] = w[-1, -2:] = limits[-length:]
    scales = [np.exp2(random.uniform(-9, 0, n)).astype(np.float32) for n in (rows, columns)]
    return *(jnp.asarray(codes, dtype) for codes in (x, w)), *scales


def scaled(*operands, dtype: jax.typing.DTypeLike = jnp.float32):
    return jax.jit(partial(pallas_gpu.scaled_dot, dtype=dtype, interpret=True))(*operands)


# Rows, K, N, dtype of the result.
SCALED = {
    "one row": (1, 70, 33, "float32"),
    "sums beyond 24 bits": (17, 8192, 40, "float32"),
    "one code": (16, 1, 5, "float16"),
    "many rows": (65, 130, 129, "bfloat16"),
}


def assert_exact(got, x, w, row_scale, column_scale):
    """Sums as integers, then one rounding to float32 and one for each scale."""
    sums = np.asarray(x, np.int64) @ np.asarray(w, np.int64).T
    want = sums.astype(np.float32) * row_scale[:, None] * column_scale[None, :]
    np.testing.assert_array_equal(got, want.astype(got.dtype), strict=True)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", SCALED)
def test_scaled_dot_of_int8_is_exact(name):
    *sizes, dtype = SCALED[name]
    operands = codes_and_scales(*sizes)
    assert_exact(np.asarray(scaled(*operands, dtype=dtype)), *operands)


@pytest.mark.slow
def test_tiles_of_rows_that_run_together_cover_all_rows(monkeypatch):
    tiles = dataclasses.replace(pallas_gpu._FOR_MANY, most_rows=16, columns=32)
    monkeypatch.setattr(pallas_gpu, "_FOR_MANY", tiles)
    monkeypatch.setattr(pallas_gpu, "_TILES_TOGETHER", 2)
    # Five tiles, two at a time; a sixth has no rows.
    operands = codes_and_scales(75, 96, 70)
    assert_exact(np.asarray(scaled(*operands)), *operands)


def test_scaled_dot_of_float8_matches_numpy_and_nan_stays_in_its_row():
    *operands, row_scale, column_scale = codes_and_scales(5, 37, 20, jnp.float8_e4m3fn)
    x, w = (np.array(codes, np.float64) for codes in operands)
    x[3, 1] = np.nan
    got = scaled(jnp.asarray(x, jnp.float8_e4m3fn), operands[1], row_scale, column_scale)
    scale = row_scale.astype(np.float64)[:, None] * column_scale
    want, size = x @ w.T * scale, np.abs(x) @ np.abs(w).T * scale
    kept = [0, 1, 2, 4]
    np.testing.assert_array_less(np.abs(got - want)[kept], 1e-6 * size[kept])
    assert np.isnan(got[3]).all()


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("dtype", pallas_gpu.SUMS, ids=str)
@pytest.mark.parametrize("rows", [8, 300])
def test_codes_reach_the_kernel_as_they_are_and_sums_stay_inside(rows, dtype):
    operands = codes_and_scales(rows, 200, 90, dtype)
    with jax.enable_x64(rows == 8):
        product = partial(pallas_gpu.scaled_dot, dtype=jnp.bfloat16)
        text, program = lowered_for_gpu(product, *operands), jax.make_jaxpr(product)(*operands)
    (line,) = (line for line in text.splitlines() if "gpu.triton" in line)
    name = {"int8": "i8", "float8_e4m3fn": "f8E4M3FN"}[dtype.name]
    assert f"(tensor<{rows}x200x{name}>, tensor<90x200x{name}>, " in line
    assert f"-> tensor<{rows}x90xbf16>" in line
    # No fewer than tensor cores multiply.
    assert f"[{16 if rows == 8 else 128},128] <- " in str(program)
    assert f"tensor<{rows}x90x{'i32' if dtype == jnp.int8 else 'f32'}>" not in text
