"""The Pallas kernel for attention: what it computes, in interpret mode, and that it compiles."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tpu_compiler
from jaxquant import ArrayConfig, kv
from jaxquant.kernels import pallas_tpu_attention

from ..ops.products import normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

# More heads of all sequences than a tile of scales has rows.
LAYERS, BATCH, HEADS, SIZE = 2, 3, 4, 16
STORES = {"int8": ArrayConfig(), "bfloat16": jnp.bfloat16, "float32": jnp.float32}
# (positions, tokens of each sequence, tokens that attend, query heads): blocks of 128, the last one
# of which is not full; sequences that are full, nearly empty, and that fill a block.
CASES = {
    "one token": (300, (300, 1, 128), 1, 8),
    "three tokens": (300, (256, 3, 129), 3, 8),
    "one block": (40, (40, 1, 17), 1, 4),
    "many rows": (300, (299, 9, 200), 9, 16),
    "a prompt": (300, (150, 150, 150), 150, 4),
}


run: Any = partial(pallas_tpu_attention.attend, interpret=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    small = {"_POSITIONS": 128, "_POSITIONS_OF_MANY_ROWS": 64, "_ROWS": 16, "_FEW_ROWS": 8}
    for name, value in small.items():
        monkeypatch.setattr(pallas_tpu_attention, name, value)


def filled(store, positions, lengths, size=SIZE):
    """A cache whose last layer holds tokens, with large values behind the last of each sequence.

    Also the lengths of all layers.
    """
    cache = kv.init(BATCH, HEADS, positions, size, store=store, layers=LAYERS)
    keys, values = (normal(BATCH, positions, HEADS, size, seed=i) for i in (1, 2))
    for x in (keys, values):
        for row, length in zip(x, lengths, strict=True):
            row[length:] = 1e4
    cache = kv.append(cache, keys, values, layer=LAYERS - 1)
    return cache, jnp.asarray([[0] * len(lengths)] * (LAYERS - 1) + [lengths], jnp.int32)


def rounded(x):
    """To bfloat16, as one pass of the matrix units does."""
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


def numbers(stored, scale, dtype):
    if stored.dtype != dtype:
        stored = jax.lax.bitcast_convert_type(stored, dtype)
    found = rounded(stored[-1])
    return found if scale is None else found * np.asarray(scale[-1], np.float64)[..., None]


def slow_attention(query, cache, starts):
    """Token by token and head by head, in float64."""
    keys = numbers(cache.keys, cache.key_scale, cache.dtype)
    values = numbers(cache.values, cache.value_scale, cache.dtype)
    out, query = np.zeros(query.shape), rounded(query)
    for b, t, n in np.ndindex(query.shape[:3]):
        head, seen = n // (query.shape[2] // HEADS), starts[b] + t + 1
        scores = keys[b, head, :seen] @ query[b, t, n]
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ values[b, head, :seen] / weights.sum()
    return out


def arrays(cache) -> Any:
    scales = tuple(x for x in (cache.key_scale, cache.value_scale) if x is not None)
    return (cache.keys, cache.values), scales, cache.dtype


@pytest.mark.some_rows(5)
@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("case", CASES)
def test_tokens_attend_to_all_before_them_and_no_others(case, name):
    positions, lengths, tokens, heads = CASES[case]
    cache, lengths = filled(STORES[name], positions, lengths)
    query, starts = normal(BATCH, tokens, heads, SIZE, seed=3) / 4, np.asarray(lengths[-1]) - tokens
    given = jnp.asarray(query), *arrays(cache), lengths

    # bfloat16 has 8 bits.
    wanted = slow_attention(query, cache, starts)
    for layer in (LAYERS - 1, -1):
        found = run(*given, None, jnp.int32(layer))
        np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["int8", "bfloat16"])
@pytest.mark.parametrize("case", ["three tokens", "many rows"])
def test_heads_that_fill_tiles_lie_beside_each_other(case, name):
    """Of one tile of rows; in the dtype that the next product wants."""
    positions, lengths, tokens, heads = CASES[case]
    cache, lengths = filled(STORES[name], positions, lengths, size=128)
    query, starts = normal(BATCH, tokens, heads, 128, seed=3) / 8, np.asarray(lengths[-1]) - tokens
    given = jnp.asarray(query), *arrays(cache), lengths, None, jnp.int32(LAYERS - 1)

    found = run(*given)
    narrow = run(*given, dtype_of_result=jnp.bfloat16)

    wanted = slow_attention(query, cache, starts)
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2)
    np.testing.assert_array_equal(narrow, found.astype(jnp.bfloat16))
    of_layer = run(*given[:-3], lengths[-1:], *given[-2:])
    np.testing.assert_array_equal(of_layer, found)


def test_layers_are_counted_from_either_end():
    """Refs of TPUs have no negative indices, unlike those of interpret mode."""
    own = [int(pallas_tpu_attention._own(jnp.array([layer]), 3)) for layer in (0, 2, -1, -3)]
    assert own == [0, 2, 2, 0]
    # A stack of what belongs to one layer.
    assert pallas_tpu_attention._own(jnp.array([2]), 1) == 0


def test_results_that_do_not_fit_are_written_head_by_head(monkeypatch):
    cache, lengths = filled(STORES["int8"], 300, (300, 1, 128), size=128)
    query = jnp.asarray(normal(BATCH, 1, 8, 128, seed=3)) / 8
    given = query, *arrays(cache), lengths, None, jnp.int32(-1)
    wanted = run(*given, dtype_of_result=jnp.bfloat16)
    for most, is_joined in ((query.size, True), (query.size - 1, False)):
        monkeypatch.setattr(pallas_tpu_attention, "_MOST_JOINED", most)
        again = partial(run, dtype_of_result=jnp.bfloat16)
        text = str(jax.make_jaxpr(lambda query, again=again: again(query, *given[1:]))(query))
        assert ("bf16[3,1024]" in text) == is_joined
        np.testing.assert_array_equal(again(*given), wanted)


def test_padded_tokens_are_not_counted_and_sequences_beyond_the_capacity_are_nan():
    cache, lengths = filled(STORES["int8"], 300, (300, 9, 200))
    query, counts = normal(BATCH, 3, 8, SIZE, seed=3) / 4, jnp.array([3, 1, 2])
    stored, scales, dtype = arrays(cache)
    scales = tuple(x[-1:] for x in scales)  # Those of one layer alone.
    given = jnp.asarray(query), stored, scales, dtype

    found = run(*given, lengths, counts, jnp.int32(-1))

    wanted = slow_attention(query, cache, np.asarray(lengths[-1] - counts))
    for b, count in enumerate(counts):
        np.testing.assert_allclose(found[b, :count], wanted[b, :count], rtol=2e-2, atol=2e-2)
    full = run(*given, lengths.at[-1, 1].set(301), counts, jnp.int32(-1))
    assert np.isnan(full[1]).all()
    np.testing.assert_array_equal(full[::2], found[::2])


def test_vmap_runs_it_for_each_cache():
    pairs = [filled(STORES["int8"], 300, lengths) for lengths in ((300, 1, 128), (7, 8, 9))]
    caches, lengths = zip(*pairs, strict=True)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    query = jnp.asarray(normal(2, BATCH, 1, 8, SIZE, seed=3))

    def one(query, cache, lengths):
        return run(query, *arrays(cache), lengths, None, jnp.int32(-1))

    found = jax.vmap(one)(query, both, jnp.stack(lengths))

    for i, cache in enumerate(caches):
        wanted = one(query[i], cache, lengths[i])
        np.testing.assert_allclose(found[i], wanted, rtol=1e-3, atol=1e-3)


# Heads of floats that are shorter than 128 would be copied into another layout.
STEPS = [("v5e", "int8", 64, 1), ("v6e", "bfloat16", 64, 1), ("v6e", "bfloat16", 128, 3)]


@pytest.mark.some_rows(1)
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("chip, name, size, heads", STEPS)
def test_it_is_compiled_for_steps_of_decoding_and_prompts(chip, name, size, heads, monkeypatch):
    monkeypatch.undo()
    cache = jax.eval_shape(partial(kv.init, 2, heads, 9000, size, store=STORES[name], layers=2))
    layer = jax.ShapeDtypeStruct((), jnp.int32)

    def run(query, cache, layer):
        return kv.attend(query, cache, layer=layer)

    is_kernel = size == 128 or name == "int8"
    for tokens, most in ((1, 4), (2, 3), (300, 4)):
        # Lengths of all layers, or of one.
        monkeypatch.setattr(pallas_tpu_attention, "MOST_LENGTHS", most)
        query = jax.ShapeDtypeStruct((2, tokens, 9, size), jnp.float32)
        compiled = tpu_compiler.compile_for(chip, run, query, cache, layer)
        assert ("tpu_custom_call" in (compiled.as_text() or "")) == is_kernel
        # A slice of the layer would be copied for the kernel.
        if is_kernel and tokens <= 2:
            memory: Any = compiled.memory_analysis()
            assert memory.temp_size_in_bytes < cache.keys.size // 4
