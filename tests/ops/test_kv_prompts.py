"""Prompts are written into a cache as slices, as TPUs do it, beside a loop over the tokens."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from benchmarks import tpu_compiler
from jaxquant.ops import kv
from jaxquant.ops.kv import writing

B, H, D, S, LAYERS = 4, 2, 6, 13, 3
STORES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "int8": jq.ArrayConfig(),
    "int4": jq.ArrayConfig(format=jq.INT4, scale_dtype="bfloat16"),
    "fp8": jq.ArrayConfig(format=jq.FP8_E4M3),
}
each_store = pytest.mark.parametrize("store", STORES.values(), ids=list(STORES))


@pytest.fixture
def sliced(monkeypatch):
    """`kv.append` as it is on TPUs."""
    monkeypatch.setattr(writing, "_slice_on_tpu", writing._slice)


def drawn(count, batch=B):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((batch, count, H, D)).astype(np.float32) for _ in range(2))


def filled(store, starts, layers: int | None):
    """A cache with something in all positions, of which each sequence has the first ones."""
    cache = kv.init(len(starts), H, S, D, store=store, layers=layers)
    rng = np.random.default_rng(1)

    def fill(x):
        return jnp.asarray(rng.integers(-7, 8, x.shape), jnp.float32).astype(x.dtype)

    lengths = jnp.broadcast_to(jnp.asarray(starts, jnp.int32), cache.lengths.shape)
    return dataclasses.replace(jax.tree.map(fill, cache), lengths=lengths)


def in_floats(x):
    return np.asarray(x).astype(np.float32)


def assert_written(cache, before, new, counts, layer):
    """Tokens are where they belong, as one token alone is stored, and all else is as before."""
    starts = np.asarray(before.lengths if layer is None else before.lengths[layer])
    for name in ("keys", "values", "key_scale", "value_scale"):
        wanted = getattr(before, name)
        if wanted is None:
            continue
        wanted = in_floats(wanted).copy()
        at = wanted if layer is None else wanted[layer]
        for b, start in enumerate(starts):
            for t in range(counts[b]):
                if start + t < S:
                    alone = kv.init(1, H, 1, D, store=before.config or before.dtype)
                    alone = kv.append(alone, *(x[b : b + 1, t : t + 1] for x in new))
                    at[b, :, start + t] = in_floats(getattr(alone, name))[0, :, 0]
        np.testing.assert_array_equal(in_floats(getattr(cache, name)), wanted, name)


@pytest.mark.usefixtures("sliced")
@pytest.mark.some_rows(4)
@pytest.mark.parametrize("layer", [None, 1], ids=["alone", "in a stack"])
@pytest.mark.parametrize("counts", [None, (10, 0, 3, 9)], ids=["all", "some"])
@pytest.mark.parametrize("starts", [(0, 1, 2, 3), (3, 4, 9, 13)], ids=["with room", "at the end"])
@each_store
def test_tokens_are_written_and_nothing_else(store, starts, counts, layer):
    before = filled(store, starts, None if layer is None else LAYERS)
    new = [*drawn(10)]

    @jax.jit
    def append(cache, keys, values):
        given = {} if counts is None else {"counts": jnp.asarray(counts)}
        return kv.append(cache, keys, values, layer=layer, **given)

    found = append(before, *new)
    assert_written(found, before, new, counts or (10,) * B, layer)


@pytest.mark.usefixtures("sliced")
def test_vmap_and_gradients():
    caches = jax.vmap(lambda _: kv.init(B, H, S, D, store=jnp.float32))(jnp.arange(2))
    keys, values = (jnp.stack([x, 2 * x]) for x in drawn(10))

    def loss(keys, values):
        found = jax.vmap(kv.append)(caches, keys, values)
        return sum(jnp.sum(jnp.sin(x)) for x in (found.keys, found.values))

    found = jax.jit(jax.grad(loss, (0, 1)))(keys, values)
    for got, x in zip(found, (keys, values), strict=True):
        np.testing.assert_allclose(got, jnp.cos(x), rtol=1e-6)


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("batch", [1, 3])
def test_tpus_write_prompts_in_place(batch):
    """A scatter copied the tokens of all layers."""
    sharding = jax.sharding.SingleDeviceSharding(tpu_compiler.device("v5e"))
    cache = jax.eval_shape(partial(kv.init, batch, 8, 1024, 128, store=jq.ArrayConfig(), layers=9))
    tokens = jax.ShapeDtypeStruct((batch, 32, 8, 128), jnp.bfloat16)
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (cache, tokens)
    )
    run = jax.jit(lambda cache, x: kv.append(cache, x, x, layer=2), donate_argnums=0)
    compiled = run.lower(*given).compile()
    moved = tpu_compiler.estimate("v5e", compiled)
    assert moved.hbm_bytes < cache.keys.size / 4
    assert moved.temporary_bytes < cache.keys.size / 4


@each_store
@pytest.mark.parametrize("layers", [None, LAYERS])
def test_indices_of_64_bits_change_nothing(store, layers, monkeypatch):
    """Of tokens for the kernel, and of prompts; in programs for TPUs and in slices."""
    layer = None if layers is None else np.int64(1)
    found = []
    for is_wide in (False, True):
        with jax.enable_x64(is_wide):
            before = filled(store, [0, 2, 1, 3], layers)
            append = jax.jit(partial(kv.append, layer=layer))
            one = append(before, *(x[:, :1] for x in drawn(10)))
            found.append((one, append(before, *drawn(10), counts=np.array([10, 9, 3, 0]))))
            lowered = append.trace(before, *drawn(10)).lower(lowering_platforms=("tpu",))
            assert "stablehlo.dynamic_update_slice" in lowered.as_text()
    jax.tree.map(np.testing.assert_array_equal, *found)
    monkeypatch.setattr(writing, "_slice_on_tpu", writing._slice)
    with jax.enable_x64(True):
        sliced = jax.jit(partial(kv.append, layer=layer))(
            filled(store, [0, 2, 1, 3], layers), *drawn(10), counts=np.array([10, 9, 3, 0])
        )
    jax.tree.map(np.testing.assert_array_equal, sliced, found[0][1])
