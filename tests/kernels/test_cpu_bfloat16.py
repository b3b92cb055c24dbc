"""The native kernels that multiply floats, by bfloat16 rows: AMX rounds weights to bfloat16."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.kernels import cpu

from .test_cpu import SIGNED, assert_near, by_all_instructions, floats, grouped, needs_native

# The last ends within a tile, and a row of 4 bits within a byte; the second needs two panels.
LENGTHS = [(192, 96), (2144, 32), (101, 101)]


def kernel_of(bits, instructions):
    kernel = partial(cpu.widen_dot, instructions=instructions)
    if bits == 4:
        table = jnp.asarray(SIGNED)
        kernel = partial(cpu.lookup_dot, table=table, instructions=instructions)
    return kernel


@needs_native
@by_all_instructions
@pytest.mark.parametrize("rows", [15, 16, 50])
@pytest.mark.parametrize("length, group", LENGTHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_rows_match_numpy(bits, length, group, rows, instructions):
    codes, scale, zero, weights = grouped(length, 67, group, True, bits)
    if instructions == "AMX" and rows >= 16:
        weights = weights.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
    x = jnp.asarray(floats(rows, length)).astype(jnp.bfloat16)
    found = kernel_of(bits, instructions)(x, codes, scale, zero)
    assert found.dtype == jnp.float32
    exact = np.asarray(x, np.float64)
    assert_near(found, exact @ weights.T, np.abs(exact) @ np.abs(weights.T))


@needs_native
@by_all_instructions
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("bits", [4, 8])
def test_nan_and_inf_stay_in_their_row_and_column(bits, bad, instructions):
    codes, scale, _, _ = grouped(101, 35, 101, False, bits)
    x = np.asarray(floats(40, 101))
    x[20, 77] = bad
    scale = scale.at[33].set(bad)
    rows = jnp.asarray(x).astype(jnp.bfloat16)
    found = np.isfinite(kernel_of(bits, instructions)(rows, codes, scale, None))
    wanted = np.ones((40, 35), bool)
    wanted[20], wanted[:, 33] = False, False
    np.testing.assert_array_equal(found, wanted)


@needs_native
@by_all_instructions
@pytest.mark.parametrize("rows, length, columns", [(20, 0, 3), (0, 8, 3), (20, 8, 0)])
def test_empty_products(rows, length, columns, instructions):
    codes = jnp.zeros((columns, length), jnp.int8)
    x, scale = jnp.ones((rows, length), jnp.bfloat16), jnp.ones((columns, 1))
    found = cpu.widen_dot(x, codes, scale, None, instructions)
    np.testing.assert_array_equal(found, np.zeros((rows, columns)))
