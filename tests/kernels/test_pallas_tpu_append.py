"""The Pallas kernel that appends to a cache: what it writes, in interpret mode, and in place."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tpu_compiler
from jaxquant import ArrayConfig, kv
from jaxquant.kernels import pallas_tpu_append

pytestmark = pytest.mark.usefixtures("quick_compilation")

LAYERS, HEADS, POSITIONS, SIZE = 2, 2, 256, 128
# Where the tokens of each sequence begin: in a tile, at its end, in the last tile, and beyond.
STARTS = (5, 31, 127, 249, 255, 256)
run: Any = partial(pallas_tpu_append.append, interpret=True)


def as_codes(x):
    scale = jnp.max(jnp.abs(x), -1, keepdims=True)
    return jnp.round(100 * x / scale).astype(jnp.int8), scale


def as_bfloat16(x):
    return (jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16),)


# Dtypes of what is stored, and how it is made.
STORES = {
    "int8": (("int8", "float32"), as_codes),
    "bfloat16": (("uint16",), as_bfloat16),
    "float32": (("float32",), lambda x: (x,)),
}


def case(name, tokens):
    """Arrays of a cache, and what is appended; every other sequence has a token less."""
    rng, batch = np.random.default_rng(0), len(STARTS)
    lead, last = (LAYERS, batch, HEADS, POSITIONS), [(SIZE,), ()]
    stored = tuple(
        jnp.asarray(rng.integers(0, 100, (*lead, *shape)), dtype)
        for dtype, shape in zip(STORES[name][0], last, strict=False)
        for _ in range(2)
    )
    new = [jnp.asarray(rng.normal(size=(batch, tokens, HEADS, SIZE)), jnp.float32) for _ in "kv"]
    counts = jnp.array([tokens, tokens - 1] * (batch // 2), jnp.int32)
    return stored, new, jnp.array(STARTS, jnp.int32), counts


def slow_append(stored, new, starts, counts, layer):
    """Token by token, of what is stored of them."""
    found = np.array(stored)
    for b, start in enumerate(np.asarray(starts)):
        for t in range(int(counts[b])):
            if start + t < POSITIONS:
                found[layer, b, :, start + t] = new[b, t]
    return found


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("tokens", [1, 2, pallas_tpu_append.MOST_TOKENS])
@pytest.mark.parametrize("name", STORES)
def test_tokens_are_written_behind_those_of_each_sequence(name, tokens):
    stored, new, starts, counts = case(name, tokens)
    encode = STORES[name][1]
    assert pallas_tpu_append.is_supported(stored, tokens)
    codes, *scales = zip(*map(encode, new), strict=True)
    wanted = *codes, *(x[..., 0] for pair in scales for x in pair)
    for layer, given in ((1, counts), (-1, None), (0, counts)):
        found = run(stored, new, encode, starts, given, jnp.int32(layer))
        written = jnp.full(len(STARTS), tokens) if given is None else counts
        for x, before, after in zip(found, stored, wanted, strict=True):
            assert x.dtype == before.dtype
            np.testing.assert_array_equal(x, slow_append(before, after, starts, written, layer))


@pytest.mark.parametrize("name", STORES)
def test_tokens_in_bfloat16_are_stored_as_in_float32(name):
    stored, new, starts, counts = case(name, 2)
    halves = [x.astype(jnp.bfloat16) for x in new]
    found, wanted = (
        run(stored, tokens, STORES[name][1], starts, counts, jnp.int32(1))
        for tokens in (halves, [x.astype(jnp.float32) for x in halves])
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert not all(np.array_equal(x, y) for x, y in zip(found, stored, strict=True))


def test_vmap_appends_to_each_cache():
    twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), case("int8", 1))

    def one(stored, new, starts, counts):
        return run(stored, new, as_codes, starts, counts, jnp.int32(1))

    found = jax.vmap(one)(*twice)

    for i in range(2):
        wanted = one(*jax.tree.map(lambda x, i=i: x[i], twice))
        jax.tree.map(
            np.testing.assert_array_equal, jax.tree.map(lambda x, i=i: x[i], found), wanted
        )


# (sequences, heads, positions, elements), tokens.
UNSUPPORTED = {
    "many tokens": ((4, 1, 256, 128), 9),
    "no token": ((4, 1, 256, 128), 0),
    "short heads": ((4, 1, 256, 64), 1),
    "an odd number of heads": ((4, 3, 256, 128), 1),
    "positions that are no multiple of a tile": ((4, 1, 200, 128), 1),
    "fewer than two tiles": ((4, 1, 128, 128), 2),
    "many sequences": ((2048, 1, 256, 128), 1),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_other_caches_are_left_to_xla(name):
    shape, tokens = UNSUPPORTED[name]
    cache = jax.eval_shape(partial(kv.init, *shape, store=ArrayConfig(), layers=2))
    stored = cache.keys, cache.values, cache.key_scale, cache.value_scale
    assert not pallas_tpu_append.is_supported(stored, tokens)


@pytest.mark.some_rows(1)
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    "chip, store, heads, layers",
    [("v5e", "int8", 2, 3), ("v6e", "int8", 8, None), ("v6e", "bfloat16", 3, 3)],
)
def test_a_step_of_decoding_changes_a_cache_in_place(chip, store, heads, layers):
    store = ArrayConfig() if store == "int8" else jnp.bfloat16
    cache = jax.eval_shape(partial(kv.init, 8, heads, 1024, 128, store=store, layers=layers))
    token = jax.ShapeDtypeStruct((8, 1, heads, 128), jnp.float32)
    layer = None if layers is None else jax.ShapeDtypeStruct((), jnp.int32)

    @partial(jax.jit, donate_argnums=0)
    def step(cache, token, layer):
        cache = kv.append(cache, token, token, layer=layer)
        return cache, kv.attend(token, cache, layer=layer)

    place = jax.sharding.SingleDeviceSharding(tpu_compiler.device(chip))
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (cache, token, layer)
    )
    compiled = step.lower(*given).compile()

    text = compiled.as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    assert "scatter" not in text
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2**17
