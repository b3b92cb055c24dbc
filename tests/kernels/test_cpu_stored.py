"""Products of the native kernels by weights as they are stored: scales of 16 bits, and stacks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.kernels import cpu

from .test_cpu import SIGNED, by_all_instructions, floats, int8, needs_native

pytestmark = needs_native
HALVES = [jnp.float16, jnp.bfloat16]
LAYERS = 3
# Contracted elements, columns, and elements per group: blocks of one, two, four and eight groups,
# rows that end within a block, and groups that lie across blocks.
MATRICES = [(576, 37, 32), (1024, 9, 128), (192, 70, 64), (128, 4, 16), (576, 9, 96), (200, 6, 40)]
# With 2048 groups in a row, the scales of few columns fill the cache.
MATRICES += [(16384, 5, 8), (64, 300, 64)]


def scales(columns, groups, dtype):
    """Scales, among them the largest, infinite, negative, zero and subnormal ones, and NaN."""
    found = np.random.default_rng(3).uniform(0.5, 2, (columns, groups)).astype(np.float32)
    limits = jnp.finfo(dtype)
    special = [limits.max, np.inf, -np.inf, np.nan, -1.5, 0.0, limits.smallest_subnormal]
    special += [3 * limits.smallest_subnormal, -limits.smallest_normal]
    with np.errstate(all="ignore"):
        found[: len(special), 0] = np.asarray(special, np.float32)[:columns]
        return jnp.asarray(found.astype(dtype))


def kernels(rows, length, group, bits):
    """The kernels for such groups, as functions of codes, scales and zero points."""
    x = jnp.asarray(floats(rows, length))
    found = [partial(cpu.grouped_dot, jnp.asarray(int8(rows, length)))]
    if bits == 4:
        table = jnp.asarray(SIGNED)
        return [*found, lambda w, scale, zero, **o: cpu.lookup_dot(x, w, scale, zero, table, **o)]
    if cpu.why_unsupported_groups(length, length // group, is_widened=True) is None:
        found.append(partial(cpu.widen_dot, x))
    return found


def codes(length, columns, bits, layers=None):
    shape = (columns, length) if layers is None else (layers, columns, length)
    drawn = np.random.default_rng(1).integers(-8, 8, shape)
    return jnp.asarray(drawn, jnp.int8).astype(jnp.int4 if bits == 4 else jnp.int8)


@pytest.mark.some_rows(2)
@by_all_instructions
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("length, columns, group", MATRICES, ids=str)
def test_scales_of_16_bits_give_the_bits_of_float32(
    length, columns, group, bits, dtype, instructions
):
    w, stored = codes(length, columns, bits), scales(columns, length // group, dtype)
    zero = jnp.asarray(np.random.default_rng(5).integers(-3, 3, stored.shape), jnp.float32)
    for rows in (1, 2, 7, 8):
        for product in kernels(rows, length, group, bits):
            run = jax.jit(partial(product, instructions=instructions))
            for zeros in (None, zero):
                found, wanted = run(w, stored, zeros), run(w, stored.astype(jnp.float32), zeros)
                np.testing.assert_array_equal(found, wanted)


def test_scales_of_few_rows_are_not_converted_by_xla():
    w, stored = codes(128, 16, 4), scales(16, 4, jnp.float16)
    for rows, is_converted in ((1, False), (7, False), (8, True)):
        x = jnp.asarray(int8(rows, 128))
        text = jax.jit(cpu.grouped_dot).lower(x, w, stored, None).as_text()
        assert ("stablehlo.convert" in text) == is_converted


def layers_of(bits, dtype):
    """Codes and scales of three matrices (48, 192)."""
    rng = np.random.default_rng(7)
    scale = jnp.asarray(rng.uniform(0.5, 2, (LAYERS, 48, 6)), dtype)
    return codes(192, 48, bits, LAYERS), scale


def in_stack(stack, index):
    layer = jnp.clip(index, 0, LAYERS - 1)
    return cpu.InStack(stack[layer], stack, jnp.asarray(index, jnp.int32))


@pytest.mark.some_rows(2)
@by_all_instructions
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_matrix_in_a_stack_is_its_slice(bits, dtype, instructions):
    w, scale = layers_of(bits, dtype)
    for rows in (1, 3, 17):
        for product in kernels(rows, 192, 32, bits):
            run = jax.jit(partial(product, instructions=instructions))
            # Indices beyond the stack are those of its ends.
            for index, layer in ((-1, 0), (0, 0), (1, 1), (2, 2), (3, 2)):
                wanted = run(w[layer], scale[layer], None)
                for scales in (scale[layer], in_stack(scale, index)):
                    found = run(in_stack(w, index), scales, None)
                    np.testing.assert_array_equal(found, wanted)


def test_int8_products_by_a_matrix_in_a_stack():
    w, _ = layers_of(8, jnp.float32)
    x, row = jnp.asarray(int8(5, 192)), jnp.ones(5)
    product = jax.jit(cpu.scaled_int8_dot)
    for layer in range(LAYERS):
        wanted = product(x, w[layer], row, jnp.arange(48.0))
        found = product(x, in_stack(w, layer), row, jnp.arange(48.0))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("batched", ["inputs", "index", "weights", "all"])
def test_vmap_of_stacks(batched):
    w, scale = layers_of(4, jnp.float16)
    x = jnp.asarray(int8(2, 3, 192)[:, None])
    index = jnp.asarray([2, 1], jnp.int32)
    both = jnp.stack([w, w[::-1]]), jnp.stack([scale, scale[::-1]])

    def product(x, index, w, scale):
        return cpu.grouped_dot(x, in_stack(w, index), in_stack(scale, index), None)

    args = {"inputs": (x[:, 0],), "index": (index,), "weights": both}
    axes = {name: 0 if batched in (name, "all") else None for name in args}
    given = [args[n] if axes[n] == 0 else tuple(a[0] for a in args[n]) for n in args]
    given = [a for part in given for a in part]
    run = jax.jit(jax.vmap(product, (axes["inputs"], axes["index"], *[axes["weights"]] * 2)))
    found = run(*given)
    pick = lambda name, i: i if axes[name] == 0 else 0  # noqa: E731
    for i in range(2):
        layer = int(index[pick("index", i)])
        weights = [part[pick("weights", i)][layer] for part in both]
        own, step = weights
        wanted = cpu.grouped_dot(x[pick("inputs", i), 0], own, step, None)
        np.testing.assert_array_equal(found[i], wanted)
