"""The Pallas kernels for TPUs: what they compute, in interpret mode, and that they compile."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tpu_compiler
from benchmarks.shapes import WEIGHTS
from jaxquant import INT4, ArrayConfig, quantize
from jaxquant.kernels import pallas_tpu

from .. import oracles
from ..ops.products import normal, weight

pytestmark = pytest.mark.usefixtures("quick_compilation")

G128 = ArrayConfig(format=INT4, group_size=128)
G32_ASYM = ArrayConfig(format=INT4, group_size=32, symmetric=False)
PER_COLUMN = ArrayConfig(format=INT4)
# Shapes of the benchmarks, the large ones at an eighth; rows of x; whether sums are scaled.
CASES = {
    "attention": (G128, 37, True),
    "up": (G128, 5, True),
    "down": (PER_COLUMN, 70, True),
    "small": (G32_ASYM, 9, True),
    "encoder": (G32_ASYM, 41, False),
    "odd": (PER_COLUMN, 1, True),
}


def shape_of(name):
    return tuple(n // 8 if n > 1024 else n for n in WEIGHTS[name])


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles along each axis, the last of which are not full."""
    monkeypatch.setattr(pallas_tpu, "_ROWS", 32)
    monkeypatch.setattr(pallas_tpu, "_COLUMNS", 256)
    monkeypatch.setattr(pallas_tpu, "_LENGTH", 256)
    monkeypatch.setattr(pallas_tpu, "_ROW_BYTES", 2**15)


def grouped_dot(x, q, dtype=jnp.float32):
    run = jax.jit(partial(pallas_tpu.grouped_dot, dtype=dtype, interpret=True))
    return run(x, q.codes, q.scale, q.zero_point)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", CASES)
def test_grouped_dot_matches_numpy(small_tiles, name):
    config, rows, scales_sums = CASES[name]
    shape = shape_of(name)
    q, x = weight(config, shape), jnp.asarray(normal(rows, shape[0]), jnp.bfloat16)

    got = np.asarray(grouped_dot(x, q), np.float64)

    values = oracles.dequantize(q)
    if not scales_sums:
        values = np.asarray(jnp.asarray(values, jnp.bfloat16), np.float64)
    x = np.asarray(x, np.float64)
    np.testing.assert_array_less(np.abs(got - x @ values), 2e-6 * np.abs(x) @ np.abs(values))


def test_grouped_dot_of_whole_tiles_rounds_once(monkeypatch):
    q, x = weight(G128, (256, 200)), jnp.asarray(normal(3, 256), jnp.bfloat16)
    got = grouped_dot(x, q, jnp.bfloat16)
    np.testing.assert_array_equal(got, grouped_dot(x, q).astype(jnp.bfloat16))
    # Floats are rounded as they come; int8 is exact in bfloat16.
    codes = np.arange(-128, 128, dtype=np.int8)[None]
    np.testing.assert_allclose(
        grouped_dot(jnp.asarray(codes), q), codes @ oracles.dequantize(q), rtol=1e-5, atol=1e-3
    )


def rows_of_every_kind(dtype):
    x = normal(45, 300, center=0)
    x[1], x[2, 7], x[3, 8], x[4, 9] = 0, np.nan, np.inf, -np.inf
    x[5:8] *= np.array([[1e-42], [1e-36], [1e36]])
    x[8, :3] = [127, 0.5, 1.5]
    x[8, 3:] = 2.5
    return jnp.asarray(x, dtype)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("bounds", [None, (-128, 100)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantize_rows_gives_the_bits_of_quantize(small_tiles, dtype, bounds):
    x = rows_of_every_kind(dtype)
    q = quantize(x, ArrayConfig(value_range=bounds), axis=-1)

    qmin, qmax = bounds or (-127, 127)
    run = partial(pallas_tpu.quantize_rows, qmin=qmin, qmax=qmax, interpret=True)
    codes, scale = jax.jit(run)(x)

    np.testing.assert_array_equal(codes, q.codes)
    np.testing.assert_array_equal(scale, q.scale)
    assert (codes.dtype, scale.dtype) == (jnp.int8, jnp.float32)


@pytest.mark.parametrize(
    "length, groups, reason",
    [
        (384, 24, "groups of 16 are not a multiple of 32"),
        (2**16, 2**11, "more than 1024 groups along a length of 65536"),
        (8200, 1, "no tile divides a length of 8200 with groups of 8200"),
        (2080, 65, "no tile divides a length of 2080 with groups of 32"),
    ],
)
def test_groups_that_no_tile_holds_raise(length, groups, reason):
    assert pallas_tpu.why_unsupported_groups(length, groups) == reason


@pytest.mark.parametrize("shape", WEIGHTS)
def test_the_groups_of_every_benchmark_are_taken(shape):
    length = WEIGHTS[shape][0]
    for group in (32, 128, length):
        assert length % group or pallas_tpu.why_unsupported_groups(length, length // group) is None


def test_the_cost_counts_the_bytes_moved():
    x, w = jnp.zeros((1024, 2048), jnp.bfloat16), jnp.zeros((2048, 2048), jnp.int4)
    jaxpr = jax.make_jaxpr(pallas_tpu.grouped_dot)(x, w, jnp.zeros((16, 2048)))
    (call,) = (e for e in jaxpr.eqns if e.primitive.name == "pallas_call")
    cost = call.params["cost_estimate"]
    # Two tiles of rows, two of columns: everything is read twice, 4 bits a weight.
    assert cost.flops == 2 * 1024 * 2048 * 2048
    read = 2 * (2048 * 2048 // 2 + 4 * 16 * 2048) + 2 * 2 * 1024 * 2048
    assert cost.bytes_accessed == read + 4 * 1024 * 2048


def compiled(chip, function, *arguments):
    """The program for one chip that is not there, as text, and the bytes that it needs besides."""
    program = tpu_compiler.compile_for(chip, function, *arguments)
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None
    assert memory is not None
    return text, memory.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_kernels_compile_and_allocate_no_extra_memory(chip):
    q = jax.eval_shape(lambda: quantize(jnp.zeros((1024, 1500)), G32_ASYM))
    for rows in (5, 100):
        x = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16)
        text, besides = compiled(chip, pallas_tpu.grouped_dot, x, q.codes, q.scale, q.scale)
        assert "s4[1024,1500]" in text
        assert besides == 0
    x = jax.ShapeDtypeStruct((100, 1000), jnp.float32)
    assert compiled(chip, pallas_tpu.quantize_rows, x)[1] == 0
