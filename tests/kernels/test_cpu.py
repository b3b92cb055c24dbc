"""The native CPU kernels, where they were compiled."""

import concurrent.futures
import ctypes
import itertools
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import ArrayConfig, quantize
from jaxquant.kernels import cpu
from jaxquant.kernels.cpu import library

needs_native = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"
)

# Those of this processor; the kernels are tested by each.
INSTRUCTIONS = cpu.instruction_sets() or (None,)
by_all_instructions = pytest.mark.parametrize("instructions", INSTRUCTIONS)
# Rows, contracted elements, columns. The last two have rows enough for panels, and parts of them.
SHAPES = [(1, 64, 5), (3, 100, 7), (5, 1003, 33), (9, 256, 130), (4, 1, 3), (2, 65, 1)]
SHAPES += [(17, 1003, 70), (40, 4163, 130)]
EMPTY = [(0, 4, 3), (3, 0, 2), (2, 7, 0), (20, 0, 3)]
# Rows, contracted elements, columns, elements per group.
GROUPS = [(1, 128, 5, 128), (3, 256, 7, 32), (5, 1024, 33, 64), (9, 512, 130, 256)]
GROUPS += [(2, 384, 9, 384), (6, 256, 67, 128), (0, 128, 3, 32), (4, 128, 0, 64)]
GROUPS += [(5, 256, 6, 16), (3, 128, 4, 8), (2, 0, 5, 32)]
GROUPS += [(16, 128, 3, 32), (33, 4480, 65, 128), (19, 4480, 64, 4480), (22, 384, 190, 16)]
# Rows that end within a block or a byte, and groups that lie across blocks.
GROUPS += [(1, 576, 37, 32), (5, 576, 9, 192), (18, 576, 70, 96), (3, 288, 6, 48), (4, 200, 5, 40)]
GROUPS += [(2, 100, 7, 100), (17, 4166, 66, 4166), (3, 7, 1, 7), (19, 1003, 5, 1003), (1, 1, 3, 1)]
GROUPS += [(2, 24, 1, 8), (21, 312, 67, 104)]
SIGNED = np.array([*range(8), *range(-8, 0)], np.float32)


def int8(*shape, seed=0):
    """Codes with the ends of the range among them."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.2, -128, rng.integers(-128, 128, shape)).astype(np.int8)


def floats(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.3, 1, shape).astype(np.float32)


def assert_near(found, wanted, magnitudes):
    """Within the rounding of float32 sums, in units of the sums of `magnitudes`."""
    error = np.abs(np.asarray(found, np.float64) - wanted)
    assert np.all(error <= 2e-6 * magnitudes + 1e-30)


@needs_native
@by_all_instructions
@pytest.mark.parametrize("rows, length, columns", SHAPES + EMPTY, ids=str)
def test_products_of_int8_codes_are_those_of_numpy_int64(rows, length, columns, instructions):
    x, w = int8(rows, length), int8(columns, length, seed=1)
    found = jax.jit(partial(cpu.int8_dot, instructions=instructions))(x, w)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, x.astype(np.int64) @ w.astype(np.int64).T)


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize("rows, length, columns", SHAPES + EMPTY, ids=str)
@by_all_instructions
def test_products_of_floats_by_int8_codes_match_numpy(rows, length, columns, instructions):
    dtype = jnp.bfloat16 if rows == 3 else jnp.float32
    x, w = floats(rows, length).astype(dtype), int8(columns, length, seed=1)
    scale = np.random.default_rng(2).uniform(0.5, 2, (columns, 1)).astype(np.float32)
    found = jax.jit(partial(cpu.widen_dot, instructions=instructions))(x, w, scale, None)
    exact, weights = np.asarray(x, np.float64), w.astype(np.float64) * scale
    assert_near(found, exact @ weights.T, np.abs(exact) @ np.abs(weights.T))


def grouped(length, columns, group, has_zero, bits=4):
    """Codes, scales, zero points, and the weights they stand for."""
    rng = np.random.default_rng(2)
    least = -(2 ** (bits - 1))
    codes = rng.integers(least, -least, (columns, length)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (columns, length // group)).astype(np.float32)
    zero = rng.integers(least, -least, scale.shape).astype(np.int8) if has_zero else None
    less = np.zeros(scale.shape) if zero is None else zero.astype(np.float64)
    repeated = (np.repeat(x.astype(np.float64), group, 1) for x in (less, scale))
    less, step = repeated
    stored = jnp.asarray(codes.astype(f"int{bits}"))
    zero = None if zero is None else jnp.asarray(zero)
    return stored, jnp.asarray(scale), zero, (codes - less) * step


def round_to_bfloat16(x):
    return np.asarray(x).astype(jnp.bfloat16)


def in_both_dtypes(product, *args):
    """float32 and bfloat16 results, by one program."""
    dtypes = (jnp.float32, jnp.bfloat16)
    found = jax.jit(lambda *args: [product(*args, dtype=dtype) for dtype in dtypes])(*args)
    assert tuple(x.dtype for x in found) == dtypes
    return found


@needs_native
@pytest.mark.parametrize("rows, length, columns", SHAPES + EMPTY[:1] + EMPTY[2:], ids=str)
@by_all_instructions
def test_scales_of_rows_then_columns_are_folded_into_the_product(
    rows, length, columns, instructions
):
    x, w = int8(rows, length), int8(columns, length, seed=1)
    row, column = floats(rows, seed=2), floats(columns, seed=3)
    # Rounded twice and in this order: large sums show another one.
    sums = (x.astype(np.int64) @ w.astype(np.int64).T).astype(np.float32)
    wanted = (sums * row[:, None]) * column
    product = partial(cpu.scaled_int8_dot, instructions=instructions)
    found, narrow = in_both_dtypes(product, x, w, row, column)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(narrow, round_to_bfloat16(wanted))


@needs_native
@pytest.mark.parametrize("rows", [1, 20])
@by_all_instructions
def test_ties_are_rounded_to_even_in_bfloat16(rows, instructions):
    x = jnp.asarray(np.full((rows, 3), [127, 127, 1], np.int8))
    w = jnp.asarray(np.array([[1, 1, 3], [1, 1, 5], [-1, -1, -3]], np.int8))
    ones = jnp.asarray(np.ones(rows, np.float32)), jnp.asarray(np.ones(3, np.float32))
    found = cpu.scaled_int8_dot(x, w, *ones, jnp.bfloat16, instructions)
    # Of 257, 259 and -257, of which bfloat16 represents every other integer.
    np.testing.assert_array_equal(found, np.full((rows, 3), [256, 260, -256]))


@needs_native
@pytest.mark.parametrize("rows, group", [(3, 32), (20, 128), (9, 4480)])
@by_all_instructions
def test_scales_of_rows_are_folded_into_products_by_int4(rows, group, instructions):
    codes, scale, zero, _ = grouped(4480, 67, group, True)
    x, row = jnp.asarray(int8(rows, 4480)), floats(rows, seed=2)
    product = partial(cpu.grouped_dot, instructions=instructions)
    wanted = np.asarray(product(x, codes, scale, zero)) * row[:, None]
    found, narrow = in_both_dtypes(product, x, codes, scale, zero, row)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(narrow, round_to_bfloat16(wanted))


@needs_native
@pytest.mark.parametrize("rows", [1, 20])
@by_all_instructions
def test_nan_and_subnormal_results_equal_those_of_xla(rows, instructions):
    x, w = jnp.asarray(int8(rows, 64)), jnp.asarray(int8(18, 64, seed=1))
    # The last NaN has all its bits set: rounded as a number it would become -0.
    nan = np.uint32(0x7FFFFFFF).view(np.float32)
    column = jnp.asarray(np.array([np.nan, -np.nan, np.inf, 1e-38, 1e-43, nan] * 3, np.float32))
    row = jnp.full(rows, 1e-4)
    xla = jax.jit(lambda acc, row, column: acc.astype(jnp.float32) * row * column)
    wanted = xla(cpu.int8_dot(x, w), row[:, None], column[None])
    for dtype in (jnp.float32, jnp.bfloat16):
        found = cpu.scaled_int8_dot(x, w, row, column, dtype, instructions)
        as_xla_does = np.asarray(wanted.astype(dtype), np.float32)
        np.testing.assert_array_equal(np.asarray(found, np.float32), as_xla_does)


def rows_of_every_kind(count, length, dtype):
    """Any magnitude, ties, subnormals, zeros, and what is no number."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(count, length)) * 2.0 ** rng.uniform(-149, 120, (count, 1))
    x[0], x[1] = 0, np.arange(length) % 255 / 2 - 63.5
    x[1, 0] = 127
    x[2] = rng.uniform(0.2, 1.1, length) * 2.0**-126
    # A subnormal of half the least scale and more is zero all the same.
    x[3] = rng.uniform(0.4, 3, length) * 2.0**-126
    x[3, 0] = 130 * 2.0**-126
    x[4] = rng.uniform(-1, 1, length) * np.finfo(np.float32).max
    for row, value in ((5, np.nan), (6, np.inf), (7, -np.inf), (8, -np.nan)):
        x[row, row % length] = value
    with np.errstate(all="ignore"):
        return jnp.asarray(x.astype(np.float32).astype(dtype))


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize("bounds", [(-127, 127), (-128, 100), (-100, 127), (-1, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantized_rows_have_the_bits_of_quantize(dtype, bounds):
    for length in (1, 200):
        x = rows_of_every_kind(60, length, dtype)
        wanted = quantize(x, ArrayConfig(value_range=bounds), axis=-1)
        for instructions in INSTRUCTIONS:
            codes, scale = cpu.quantize_rows(x, *bounds, instructions=instructions)
            assert (codes.dtype, scale.dtype) == (jnp.int8, jnp.float32)
            np.testing.assert_array_equal(codes, wanted.codes)
            np.testing.assert_array_equal(scale, wanted.scale)


@needs_native
def test_rows_are_quantized_along_any_axes_and_on_several_threads():
    config = ArrayConfig()
    several = [jnp.asarray(floats(*shape)) for shape in ((200,), (0, 5), (3, 0), (2, 3, 100))]
    # Threads of the pool may treat subnormals in another way than the one that calls.
    for x in (*several, rows_of_every_kind(300, 1000, "float32")):
        codes, scale = jax.jit(cpu.quantize_rows)(x)
        wanted = quantize(x, config, axis=-1)
        np.testing.assert_array_equal(codes, wanted.codes)
        np.testing.assert_array_equal(scale, wanted.scale)
    x = jnp.asarray(floats(4, 3, 100))
    wanted = quantize(x, config, axis=-1)
    for axis in (0, 1):
        run = jax.jit(jax.vmap(cpu.quantize_rows, axis, axis))
        assert run.lower(x).as_text().count("@jaxquant_quantize_rows") == 1
        np.testing.assert_array_equal(run(x)[0], wanted.codes)
        np.testing.assert_array_equal(run(x)[1], wanted.scale)


@pytest.mark.some_rows(4)
@needs_native
@pytest.mark.parametrize("rows, length, columns, group", GROUPS, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@by_all_instructions
def test_products_by_groups_match_numpy(rows, length, columns, group, bits, instructions):
    codes, scale, zero, with_zeros = grouped(length, columns, group, True, bits)
    without = grouped(length, columns, group, False, bits)[-1]
    kernels = [(cpu.grouped_dot, int8(rows, length))]
    if bits == 4:
        kernels += [(partial(cpu.lookup_dot, table=jnp.asarray(SIGNED)), floats(rows, length))]
    elif cpu.why_unsupported_groups(length, length // group, is_widened=True) is None:
        kernels += [(cpu.widen_dot, floats(rows, length))]

    @jax.jit
    def products(inputs, codes, scale, *zeros):
        return [
            [
                kernel(x, codes, scale, zero, instructions=instructions)
                for (kernel, _), x in zip(kernels, inputs, strict=True)
            ]
            for zero in zeros
        ]

    inputs = [x for _, x in kernels]
    for found, weights in zip(
        products(inputs, codes, scale, None, zero), (without, with_zeros), strict=True
    ):
        for got, x in zip(found, inputs, strict=True):
            exact = x.astype(np.float64)
            assert_near(got, exact @ weights.T, np.abs(exact) @ np.abs(weights.T))


def cancelling(length, group):
    """Activations (20, K) and codes (20, K) whose products cancel within each group."""
    x, w = int8(20, length), np.random.default_rng(3).integers(-6, 7, (20, length)).astype(np.int8)
    half = (20, length // group, 2, group // 2)
    x.reshape(half)[:, :, 1] = x.reshape(half)[:, :, 0]
    w.reshape(half)[:, :, 1] = -w.reshape(half)[:, :, 0]
    return x, w


@pytest.mark.some_rows(2)
@needs_native
@by_all_instructions
@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("group", [8, 128, 4096])
def test_int4_products_that_cancel_stay_within_the_stated_bound(group, rows, instructions):
    x, w = cancelling(4096, group)
    scale = np.random.default_rng(4).uniform(0.5, 2, (20, 4096 // group)).astype(np.float32)
    x, codes = x[:rows], jnp.asarray(w).astype(jnp.int4)
    operands = jnp.asarray(x), codes, jnp.asarray(scale)
    found = cpu.grouped_dot(*operands, None, instructions=instructions)
    weights = w * np.repeat(scale, group, 1).astype(np.float64)
    bound = (4096 / 32 + 4096 / group + 8) * 2.0**-24 * (np.abs(x) * 1.0 @ np.abs(weights).T)
    assert np.all(np.abs(found - x @ weights.T) <= bound)


@needs_native
@by_all_instructions
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_int4_products_of_8_neighbors_are_exact(rows, instructions):
    x, w = cancelling(1024, 8)
    scale = np.full((20, 128), 1e30, np.float32)
    # Groups of 8 that cancel add exactly 0, whatever their scale; one does not cancel.
    scale[:, 77] = 0.3
    w[:, 77 * 8] += 1
    operands = jnp.asarray(x[:rows]), jnp.asarray(w).astype(jnp.int4), jnp.asarray(scale)
    found = cpu.grouped_dot(*operands, None, instructions=instructions)
    exact = x[:rows, 77 * 8, None] * np.float32(0.3)
    np.testing.assert_array_equal(found, np.broadcast_to(exact, (rows, 20)))


@needs_native
@by_all_instructions
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("x, w", [(-128, 7), (127, 7), (-128, -8), (127, -8)])
def test_the_largest_int4_products_are_exact(rows, x, w, instructions):
    left = jnp.asarray(np.full((rows, 4096), x, np.int8))
    right = jnp.asarray(np.full((5, 4096), w, np.int8)).astype(jnp.int4)
    for groups in (1, 128):
        scale = jnp.asarray(np.ones((5, groups), np.float32))
        found = cpu.grouped_dot(left, right, scale, None, instructions=instructions)
        np.testing.assert_array_equal(found, 4096 * x * w)


@needs_native
@by_all_instructions
@pytest.mark.parametrize("rows", [3, 18])
def test_a_table_may_hold_any_sixteen_values(rows, instructions):
    table = floats(16, seed=3)
    codes, scale, _, _ = grouped(128, 5, 32, False)
    x = floats(rows, 128)
    as_array = jnp.asarray(table)
    found = cpu.lookup_dot(jnp.asarray(x), codes, scale, None, as_array, instructions)
    bits = np.asarray(codes).astype(np.int8).view(np.uint8) & 15
    weights = table.astype(np.float64)[bits] * np.repeat(np.asarray(scale, np.float64), 32, 1)
    assert_near(found, x.astype(np.float64) @ weights.T, np.abs(x) @ np.abs(weights.T))


@needs_native
@pytest.mark.parametrize("rows", [6, 20])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_row(bad, rows):
    x = floats(rows, 256)
    x[4, 77] = bad
    codes, scale, zero, _ = grouped(256, 67, 32, True)
    for found in (
        cpu.lookup_dot(jnp.asarray(x), codes, scale, zero, jnp.asarray(SIGNED + 0.5)),
        cpu.widen_dot(jnp.asarray(x), jnp.asarray(int8(67, 256) | 1), scale[:, :1], None),
        cpu.widen_dot(jnp.asarray(x), jnp.asarray(int8(67, 256)), scale, jnp.float32(zero) + 0.5),
    ):
        assert not np.isfinite(np.asarray(found)[4]).any()
        assert np.isfinite(np.delete(np.asarray(found), 4, 0)).all()


@needs_native
@by_all_instructions
@pytest.mark.parametrize("rows", [3, 20])
def test_nan_and_inf_scales_stay_in_their_column(rows, instructions):
    codes, scale, zero, _ = grouped(256, 67, 32, True)
    scale = np.array(scale)
    scale[65, 3] = np.nan
    scale = jnp.asarray(scale)
    table = jnp.asarray(SIGNED)
    for found in (
        cpu.grouped_dot(
            jnp.asarray(int8(rows, 256)), codes, scale, zero, instructions=instructions
        ),
        cpu.lookup_dot(jnp.asarray(floats(rows, 256)), codes, scale, zero, table, instructions),
    ):
        assert np.isnan(np.asarray(found)[:, 65]).all()
        assert np.isfinite(np.delete(np.asarray(found), 65, 1)).all()


@needs_native
@by_all_instructions
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("x, w", [(-128, -128), (-128, 127), (127, -128)])
def test_the_longest_sums_stay_within_int32(rows, x, w, instructions):
    length = 131071
    left, right = (jnp.asarray(np.full((n, length), c, np.int8)) for n, c in ((rows, x), (5, w)))
    np.testing.assert_array_equal(cpu.int8_dot(left, right, instructions), length * x * w)


@needs_native
def test_many_calls_at_once_wait_for_none_another():
    # Each waits within a thread of the pool that the others need.
    weights = [jnp.asarray(int8(512, 2048, seed=i)) for i in range(8)]
    x = jnp.asarray(int8(4, 2048))
    product = jax.jit(lambda x, ws: sum(cpu.int8_dot(x, w).sum() for w in ws))
    wanted = sum(np.sum(np.asarray(x, np.int64) @ np.asarray(w, np.int64).T) for w in weights)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: int(product(x, weights)), range(64)))
    assert found == [int(np.int32(wanted))] * 64


@pytest.mark.slow
@needs_native
def test_vmap_over_either_side_is_a_loop():
    x, w = jnp.asarray(int8(3, 5, 100)), jnp.asarray(int8(3, 7, 100, seed=1))
    for axes in ((0, 0), (0, None), (None, 0)):
        args = [a if axis == 0 else a[1] for a, axis in zip((x, w), axes, strict=True)]
        found = jax.jit(jax.vmap(cpu.int8_dot, axes))(*args)
        for i in range(3):
            one = [a if axis is None else a[i] for a, axis in zip(args, axes, strict=True)]
            np.testing.assert_array_equal(found[i], cpu.int8_dot(one[0], one[1]))


# Widths of all kinds, axes first, between and last, and more bytes than one thread copies.
SLICED = [("int4", (3, 5, 4), 0), ("uint2", (2, 3, 1, 4), 1), ("float4_e2m1fn", (2, 2, 3, 2), 2)]
SLICED += [("int8", (4, 3), 0), ("float32", (2, 3), 0), ("int4", (2, 1 << 19), 0)]
SLICED += [("int4", (0, 3, 4), 1), ("int4", (3, 0), 0)]


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize("dtype, shape, axis", SLICED, ids=str)
def test_slices_are_those_of_numpy(dtype, shape, axis):
    values = np.random.default_rng(0).integers(0, 4, shape).astype(np.int8)
    stack = jnp.asarray(values - (dtype[0] == "i")).astype(dtype)
    take = jax.jit(partial(cpu.take_slice, axis=axis))
    last = shape[axis] - 1
    # From -1 down it counts from the end; outside it is the nearest one within.
    for index, place in ((0, 0), (last, last), (-1, last), (-last, 1), (-7, 0), (99, last)):
        got = take(stack, jnp.int32(index))
        wanted = np.take(np.asarray(stack), place, axis)
        assert got.dtype == stack.dtype
        np.testing.assert_array_equal(np.asarray(got), wanted)


@pytest.mark.slow
@needs_native
def test_slices_are_batched_over_stacks_indices_or_both():
    stacks = jnp.asarray(int8(2, 3, 4, 6) % 8).astype(jnp.int4)
    indices = jnp.asarray([2, 0], jnp.int32)
    for axes in ((0, None), (None, 0), (0, 0)):
        args = [a if axis == 0 else a[1] for a, axis in zip((stacks, indices), axes, strict=True)]
        along = [jax.vmap(partial(cpu.take_slice, axis=axis), axes) for axis in (0, 1)]
        got = jax.jit(lambda *args, along=along: [take(*args) for take in along])(*args)
        for axis, i in itertools.product((0, 1), (0, 1)):
            stack, index = (a if b is None else a[i] for a, b in zip(args, axes, strict=True))
            np.testing.assert_array_equal(got[axis][i], np.take(np.asarray(stack), index, axis))


@pytest.mark.parametrize("length, groups, size", [(256, 64, 4), (100, 5, 20), (1003, 17, 59)])
def test_groups_that_do_not_fit_are_named(length, groups, size):
    reason = f"groups of {size} along {length} elements are not multiples of 8"
    assert cpu.why_unsupported_groups(length, groups) == reason


def test_floats_by_8_bits_need_groups_of_16():
    reason = "groups of 24 along 72 elements are not multiples of 16"
    assert cpu.why_unsupported_groups(72, 3, is_widened=True) == reason
    assert cpu.why_unsupported_groups(72, 3) is None
    assert cpu.why_unsupported_groups(96, 3, is_widened=True) is None


@pytest.mark.parametrize(
    "length, groups", [(128, 1), (100, 1), (7, 1), (576, 18), (576, 6), (0, 0)]
)
def test_groups_that_fit(length, groups):
    assert cpu.why_unsupported_groups(length, groups) is None


def test_unavailable_says_why(monkeypatch, tmp_path):
    load = library._loaded.__wrapped__
    monkeypatch.setattr(library, "_PATH", tmp_path / "_cpu.so")
    assert "they need a C++ compiler" in str(load()[0])
    (tmp_path / "_cpu.so").write_text("not a library")
    assert "_cpu.so cannot be loaded" in str(load()[0])

    class OldProcessor:
        def __init__(self, path):
            self.jaxquant_has = lambda number: 0
            self.jaxquant_jaxlib = (0, 10, 2).__getitem__

    monkeypatch.setattr(ctypes, "CDLL", OldProcessor)
    assert load() == ("this processor supports none of AMX, AVX512-VNNI, AVX2, NEON", ())

    class OldLibrary(OldProcessor):
        def __init__(self, path):
            super().__init__(path)
            self.jaxquant_has = lambda number: 1

    monkeypatch.setattr(ctypes, "CDLL", OldLibrary)
    reason = "_cpu.so was compiled from other sources: install the package again"
    assert load() == (reason, ())
    sources = mock.Mock(return_value=1)
    monkeypatch.setattr(OldLibrary, "jaxquant_sources", sources, raising=False)
    assert load() == (reason, ())


@pytest.mark.parametrize("built_with, is_newer", [((99, 0, 0), True), (library.JAXLIB, False)])
def test_kernels_of_a_newer_jaxlib_are_not_registered(monkeypatch, tmp_path, built_with, is_newer):
    class Library:
        def __init__(self, path):
            self.jaxquant_has = lambda number: 1
            self.jaxquant_jaxlib = built_with.__getitem__

        def __getattr__(self, name):
            raise LookupError(name)

    (tmp_path / "_cpu.so").touch()
    monkeypatch.setattr(library, "_PATH", tmp_path / "_cpu.so")
    monkeypatch.setattr(ctypes, "CDLL", Library)
    if is_newer:
        reason, found = library._loaded.__wrapped__()
        assert not found
        here = ".".join(map(str, library.JAXLIB))
        assert f"built for jaxlib 99.0.0 or later, and this is {here}" in str(reason)
    else:
        with pytest.raises(LookupError, match="jaxquant_sources"):
            library._loaded.__wrapped__()


@needs_native
def test_the_kernels_say_which_jaxlib_they_were_built_with():
    built = ctypes.CDLL(str(library._PATH))
    assert (0, 10, 2) <= tuple(built.jaxquant_jaxlib(i) for i in range(3)) <= library.JAXLIB


@needs_native
def test_the_environment_leaves_out_instruction_sets(monkeypatch):
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *args, **options: None)
    load, everything = library._loaded.__wrapped__, cpu.instruction_sets()
    for best in cpu.instruction_sets():
        monkeypatch.setenv("JAXQUANT_CPU_INSTRUCTIONS", best)
        assert load() == (None, everything[everything.index(best) :])
    monkeypatch.setenv("JAXQUANT_CPU_INSTRUCTIONS", "")
    assert load() == (None, everything)
    monkeypatch.setenv("JAXQUANT_CPU_INSTRUCTIONS", "none")
    assert load() == ("JAXQUANT_CPU_INSTRUCTIONS is none", ())
    monkeypatch.setenv("JAXQUANT_CPU_INSTRUCTIONS", "avx2")
    with pytest.raises(ValueError, match=r"\(AMX, AVX512-VNNI, AVX2, NEON\) or none; got 'avx2'"):
        load()
