"""Which program computes attention over a cache, and that all of them agree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxquant as jq
from jaxquant import kv
from jaxquant.kernels import cpu

from .products import normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

# More rows than a chunk of the kernel, and more positions than a block.
B, T, H, N, D, S = 2, 50, 2, 6, 20, 150
STORES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "float16": jnp.float16,
    "int8": jq.ArrayConfig(format=jq.INT8),
    "int4": jq.ArrayConfig(format=jq.INT4, scale_dtype="bfloat16"),
    "fp8": jq.ArrayConfig(format=jq.FP8_E5M2),
}
CALL = "jaxquant_attend"
needs_native = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"
)


def filled(store, layers=None):
    layer = None if layers is None else layers - 1
    cache = kv.init(B, H, S, D, store=store, layers=layers)
    for seed in range(2):
        keys, values = (normal(B, T, H, D, seed=2 * seed + i) for i in range(2))
        cache = kv.append(cache, keys, values, jnp.array([T, T - 7 * seed]), layer=layer)
    return cache


QUERY = normal(B, T, N, D, seed=9)
COUNTS = jnp.array([T, T - 7])


def run(query, cache, layer=None):
    return kv.attend(query, cache, COUNTS, layer=layer)


@pytest.fixture
def by_xla(monkeypatch):
    """A function that calls another one without native kernels."""

    def call(function, *args):
        with monkeypatch.context() as changed:
            changed.setattr(cpu, "unavailable", lambda: "it is left out")
            return function(*args)

    return call


@needs_native
@pytest.mark.parametrize("name", STORES)
def test_the_kernel_computes_what_xla_does(name, by_xla):
    cache = filled(STORES[name])
    program: Any = jax.jit(run).lower(QUERY, cache)
    assert (CALL in program.as_text()) == (name != "float16")
    found, eager = program.compile()(QUERY, cache), run(QUERY, cache)
    want = by_xla(jax.jit(lambda q, c: run(q, c)), QUERY, cache)
    for result in (found, eager):
        np.testing.assert_allclose(result, want, rtol=1e-5, atol=1e-5)


@needs_native
def test_queries_in_float64_and_other_programs_are_left_to_xla():
    cache = filled(jnp.float32)
    exported = export.export(jax.jit(run))(QUERY, cache)
    assert CALL not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(QUERY, cache), run(QUERY, cache), rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(QUERY, jax.NamedSharding(mesh, jax.P("data")))
    program: Any = jax.jit(run).lower(split, cache)
    assert CALL not in program.as_text()
    np.testing.assert_allclose(
        program.compile()(split, cache), run(QUERY, cache), rtol=1e-5, atol=1e-5
    )
    with jax.enable_x64(True):
        wide = run(QUERY.astype(np.float64), cache)
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, run(QUERY, cache), rtol=1e-5, atol=1e-5)


@needs_native
def test_each_device_runs_the_kernel_inside_shard_map():
    cache = filled(jnp.bfloat16)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")

    def part(query, cache):
        return kv.attend(query, cache)

    whole: Any = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(rows, rows), out_specs=rows))
    assert CALL in whole.lower(QUERY, cache).as_text()
    np.testing.assert_allclose(whole(QUERY, cache), kv.attend(QUERY, cache), rtol=1e-5, atol=1e-5)


# How sequences and heads are divided.
PARTS = [((None, "a"), "bfloat16"), (("a",), "int4"), ((("b", "a"),), "int8"), (("b", "a"), "int8")]


@needs_native
@pytest.mark.parametrize("spec, name", PARTS, ids=str)
def test_each_device_keeps_and_reads_the_heads_that_types_say_it_has(spec, name):
    batch, heads, layers = 4, 2, 2
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    whole = kv.init(batch, heads, S, D, store=STORES[name], layers=layers)
    keys, values = (normal(batch, T, heads, D, seed=i) for i in range(2))
    query, counts = normal(batch, T, N, D, seed=9), jnp.array([T, T - 7, 1, 0])

    def step(cache, keys, values, query):
        cache = kv.append(cache, keys, values, counts, layer=1)
        return cache, kv.attend(query, cache, counts, layer=1)

    def place(x, *spec):
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    parts = jax.tree.map(lambda x: place(x, None, *spec) if x.ndim > 2 else x, whole)
    given = parts, place(keys), place(values, "b"), place(query, None, None, "a")
    program: Any = jax.jit(step).lower(*given)
    text = program.compile().as_text()
    assert CALL in program.as_text()
    assert not any(f"[{layers},{batch},{heads},{S}" in line for line in text.splitlines())
    cache, out = jax.jit(step)(*given)
    # The cache stays where it is.
    assert jax.typeof(cache.keys).sharding.spec[1 : 1 + len(spec)] == spec
    wanted_cache, wanted = jax.jit(step)(whole, keys, values, query)
    jax.tree.map(np.testing.assert_array_equal, cache, wanted_cache)
    is_own = np.arange(T)[None] < np.asarray(counts)[:, None]
    np.testing.assert_array_equal(np.asarray(out)[is_own], np.asarray(wanted)[is_own])


@pytest.mark.parametrize(
    "spec", [(None, None, "a"), (None, None, None, "b"), ("a", "b", None, "c")]
)
def test_xla_divides_caches_that_are_sharded_in_other_ways(spec):
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    whole = kv.init(2, 2, 16, 8, store=STORES["int8"])
    keys, query = normal(2, 5, 2, 8), normal(2, 5, 4, 8, seed=9)

    @jax.jit
    def step(cache):
        cache = kv.append(cache, keys, keys)
        return cache, kv.attend(query, cache)

    def place(x):
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec[: x.ndim])))

    parts = jax.tree.map(lambda x: place(x) if x.ndim > 2 else x, whole)
    cache, out = step(parts)
    assert jax.typeof(cache.keys).sharding.spec == jax.typeof(parts.keys).sharding.spec
    wanted_cache, wanted = step(whole)
    jax.tree.map(np.testing.assert_array_equal, cache, wanted_cache)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)


def test_layers_in_a_loop_read_their_own():
    cache, plain = filled(jnp.bfloat16, layers=3), filled(jnp.bfloat16)

    @jax.jit
    def loop(query, cache):
        return jax.lax.map(lambda layer: run(query, cache, layer), jnp.arange(3))

    np.testing.assert_array_equal(loop(QUERY, cache)[2], run(QUERY, plain))


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_derivatives_are_those_of_the_formula(name, by_xla):
    cache = filled(STORES[name])

    def loss(query, cache):
        return jnp.sum(jnp.square(run(query, cache)))

    gradient = jax.grad(loss, allow_int=True, argnums=(0, 1))
    found = jax.jit(gradient)(QUERY, cache)
    want = by_xla(jax.jit(lambda *args: gradient(*args)), QUERY, cache)
    assert np.abs(found[0]).max() > 0
    of_floats = (found[1].keys, found[1].values) if name == "float32" else ()
    assert all(np.abs(x).max() > 0 for x in of_floats)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    for x, y in pairs:
        if x.dtype == jnp.float32:
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
