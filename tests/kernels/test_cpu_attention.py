"""The native attention kernel against a loop in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import pack_int4
from jaxquant.kernels import cpu

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"),
    pytest.mark.usefixtures("quick_compilation"),
]

by_all_instructions = pytest.mark.parametrize("instructions", cpu.instruction_sets() or (None,))
# Sequences, tokens, key heads, query heads for each, positions, elements, where tokens start. With
# several blocks of positions and chunks of rows, odd lengths, heads of one to five queries, and
# few heads with positions for several threads.
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, (0,)),
    "decode": (3, 1, 2, 3, 200, 64, (0, 63, 199)),
    "prompt": (1, 150, 1, 3, 150, 80, (0,)),
    "odd": (2, 7, 3, 5, 77, 33, (70, 3)),
    "beyond": (2, 3, 1, 2, 9, 4, (8, 20)),
    "wide": (1, 2, 1, 4, 65, 256, (62,)),
    "long": (2, 2, 1, 3, 1300, 24, (1298, 300)),
}
DTYPES = ["float32", "bfloat16", "int8", "int4", "float8_e4m3fn", "uint8"]


def drawn(shape, dtype, layers=1):
    """Arguments of the kernel, and keys and values as floats."""
    batch, tokens, heads, group, positions, size, starts = shape
    rng = np.random.default_rng(0)
    query = rng.normal(size=(batch, tokens, heads * group, size)).astype(np.float32)
    stored, floats = [], []
    for _ in range(2):
        whole = rng.normal(size=(layers, batch, heads, positions, size))
        if dtype in ("int8", "int4", "uint8"):
            whole = np.clip(np.round(whole * 3), 0 if dtype == "uint8" else -8, 7)
        numbers = jnp.asarray(whole, jnp.float32).astype("int8" if dtype == "int4" else dtype)
        floats.append(np.asarray(numbers, np.float64))
        is_bits = dtype in ("bfloat16", "float8_e4m3fn")
        bits = f"uint{8 * numbers.dtype.itemsize}"
        packed = jax.lax.bitcast_convert_type(numbers, bits) if is_bits else numbers
        stored.append(pack_int4(numbers, axis=-1) if dtype == "int4" else packed)
    scales = [None, None]
    if dtype not in ("float32", "bfloat16"):
        scales = [
            rng.uniform(0.1, 0.5, (batch, heads, positions)).astype(np.float32) for _ in range(2)
        ]
    return (query, *stored, *scales, np.array(starts, np.int32)), floats


def attended(query, keys, values, key_scale, value_scale, starts):
    """Softmax of products with keys, times values, one query at a time."""
    out = np.empty(query.shape)
    batch, tokens, heads, _ = query.shape
    group = heads // keys.shape[1]
    for b, t, n in np.ndindex(batch, tokens, heads):
        seen, h = slice(0, starts[b] + t + 1), n // group
        scores = keys[b, h, seen] @ query[b, t, n].astype(np.float64)
        scores = scores if key_scale is None else scores * key_scale[b, h, seen]
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        weights = weights if value_scale is None else weights * value_scale[b, h, seen]
        out[b, t, n] = weights @ values[b, h, seen]
    return out


def attend(arguments, dtype, layer=0, instructions=None):
    call = jax.jit(partial(cpu.attend, dtype=jnp.dtype(dtype), instructions=instructions))
    names = ("query", "keys", "values", "key_scale", "value_scale", "starts")
    return np.asarray(call(**dict(zip(names, arguments, strict=True)), layer=jnp.int32(layer)))


@by_all_instructions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_attention_is_the_loop(name, dtype, instructions):
    arguments, (keys, values) = drawn(SHAPES[name], dtype)
    query, *_, key_scale, value_scale, starts = arguments
    want = attended(query, keys[0], values[0], key_scale, value_scale, starts)
    found = attend(arguments, dtype, instructions=instructions)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


@by_all_instructions
@pytest.mark.parametrize(("layer", "wanted"), [(1, 1), (-1, 2), (7, 2), (-9, 0)])
def test_one_layer_is_read(layer, wanted, instructions):
    arguments, (keys, values) = drawn(SHAPES["odd"], "int4", layers=3)
    query, *_, key_scale, value_scale, starts = arguments
    want = attended(query, keys[wanted], values[wanted], key_scale, value_scale, starts)
    found = attend(arguments, "int4", layer, instructions)
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=1e-5)


@by_all_instructions
def test_large_and_small_scores_neither_overflow_nor_vanish(instructions):
    arguments, (keys, values) = drawn(SHAPES["decode"], "float32")
    for factor in (1e-30, 30.0, 1e4, 1e30):
        scaled = (arguments[0] * np.float32(factor), *arguments[1:])
        want = attended(scaled[0], keys[0], values[0], None, None, arguments[-1])
        found = attend(scaled, "float32", instructions=instructions)
        # Scores are rounded: by 2^-24 of 64 products.
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-3 if factor < 1e4 else 5)
        assert np.isfinite(found).all()


@by_all_instructions
@pytest.mark.parametrize("place", [0, 70, slice(0, 64)], ids=["first", "later", "first block"])
@pytest.mark.parametrize("value", [np.nan, np.uint32(0x7FC00FFF).view(np.float32), np.inf, -np.inf])
def test_nan_and_inf_are_those_of_the_formula(value, place, instructions):
    """Scores of -Inf have no weight, also if they come first."""
    arguments, (_, values) = drawn(SHAPES["decode"], "float32")
    query, stored, *others = arguments
    changed = np.array(stored)
    changed[0, 2, 1, place] = value
    query = np.abs(query)  # So that scores have the sign of the value.
    with np.errstate(invalid="ignore"):
        want = attended(query, changed[0].astype(np.float64), values[0], None, None, others[-1])
    found = attend((query, changed, *others), "float32", instructions=instructions)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(want))
    assert np.isnan(want).any() == (value != -np.inf)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


@by_all_instructions
def test_values_that_are_not_seen_do_not_count(instructions):
    arguments, _ = drawn((1, 4, 1, 2, 90, 16, (60,)), "float32")
    query, keys, values, *others = arguments
    changed = [np.array(x) for x in (keys, values)]
    for x in changed:
        x[0, 0, 0, 64:] = 1e30
    same = attend(arguments, "float32", instructions=instructions)
    found = attend((query, *changed, *others), "float32", instructions=instructions)
    np.testing.assert_array_equal(found, same)
