"""Key-value caches against a loop in NumPy over sequences, tokens and heads."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import kv
from jaxquant.jaxprs import walk

from .. import oracles
from .products import normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Odd sizes: B sequences, H key heads, N query heads, D elements, S positions.
B, H, N, D, S = 3, 2, 6, 5, 11
INT8, INT4 = jq.ArrayConfig(format=jq.INT8), jq.ArrayConfig(format=jq.INT4)
FP8 = jq.ArrayConfig(format=jq.FP8_E4M3, scale_dtype="bfloat16")
STORES = {
    "float32": jnp.float32,
    "bfloat16": jnp.bfloat16,
    "int8": INT8,
    "int4": INT4,
    "int4-half": jq.ArrayConfig(format=jq.INT4, scale_dtype="float16"),
    "fp8": FP8,
}
# Tokens that are appended together, and how many of them each sequence has.
STEPS = ((4, (4, 2, 3)), (1, (1, 1, 1)), (4, (0, 4, 1)), (1, (1, 1, 1)))
SIZES = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / D, "int4": 3 / D + 4 / D}


def as_read(x, store):
    """What a cache holds of one key or value (D,)."""
    if not isinstance(store, jq.ArrayConfig):
        return np.asarray(jnp.asarray(x).astype(store), np.float64)
    codes, scale, zero_point = oracles.abs_max_quantize(x[None], store, 1)
    values = oracles.code_values(codes, store.format)
    return ((values - zero_point) * scale)[0]


def attended(query, keys, values):
    """One query (D,) over lists of keys and values."""
    scores = np.array([query @ k for k in keys]) / np.sqrt(len(query))
    weights = np.exp(scores - scores.max())
    return weights / weights.sum() @ np.array(values)


class Sequences:
    """The keys and values so far of each sequence and head."""

    def __init__(self, store):
        self.store = store
        self.tokens = {(b, h): ([], []) for b in range(B) for h in range(H)}

    def step(self, query, keys, values, counts):
        """What each query gets; NaN for padding."""
        out = np.full(query.shape, np.nan)
        for b, count in enumerate(counts):
            for t in range(count):
                for h in range(H):
                    for new, old in zip((keys, values), self.tokens[b, h], strict=True):
                        old.append(as_read(new[b, t, h], self.store))
                for n in range(N):
                    out[b, t, n] = attended(query[b, t, n], *self.tokens[b, n // (N // H)])
        return out


def drawn(count, seed=0):
    sizes = (N, H, H)
    return [normal(B, count, heads, D, seed=3 * seed + i) for i, heads in enumerate(sizes)]


def assert_close(found, want, tolerance=1e-5):
    is_real = np.isfinite(want)
    assert is_real.any()
    assert np.isfinite(np.asarray(found, np.float64)).all()  # Padding is finite, too.
    error = np.abs(np.asarray(found, np.float64) - want)[is_real]
    assert error.max() <= tolerance * np.abs(want[is_real]).max(), error.max()


append: Any = jax.jit(kv.append)
attend: Any = jax.jit(kv.attend)


def in_steps(store, append=append, attend=attend, dtype: Any = np.float32, layer=None, cache=None):
    cache = kv.init(B, H, S, D, store=store) if cache is None else cache
    sequences = Sequences(store)
    for seed, (count, counts) in enumerate(STEPS):
        query, keys, values = (np.asarray(x, dtype) for x in drawn(count, seed))
        cache = append(cache, keys, values, jnp.array(counts), layer=layer)
        found = attend(query, cache, jnp.array(counts), layer=layer)
        assert found.dtype == dtype
        query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
        yield cache, found, sequences.step(query, keys, values, counts)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4-half", "fp8"])
def test_batches_of_different_lengths_equal_the_loop(name):
    store = STORES[name]
    steps = list(in_steps(store))
    for _, found, want in steps:
        assert_close(found, want, 1e-2 if store is FP8 else 1e-5)
    cache, *_ = steps[-1]
    assert cache.lengths.tolist() == [6, 8, 6]


@pytest.mark.slow
def test_eager_calls_compute_the_same():
    for _, found, want in itertools.islice(in_steps(INT8, kv.append, kv.attend), 2):
        assert_close(found, want)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("store", [jnp.bfloat16, INT8], ids=["bfloat16", "int8"])
def test_queries_in_bfloat16(store):
    for _, found, want in in_steps(store, dtype=jnp.dtype(jnp.bfloat16)):
        assert_close(found, want, 0.03)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("store", [jnp.float32, INT4], ids=["float32", "int4"])
def test_one_layer_of_several_is_used_alone(store):
    empty = kv.init(B, H, S, D, store=store, layers=3)
    steps = list(in_steps(store, layer=jnp.int32(1), cache=empty))
    for _, found, want in steps:
        assert_close(found, want)
    cache, *_ = steps[-1]
    np.testing.assert_array_equal(cache.lengths, [[0, 0, 0], [6, 8, 6], [0, 0, 0]])
    for i in (0, 2):
        assert not np.asarray(cache.keys[i]).any()


@pytest.mark.slow
def test_all_tokens_are_appended_without_counts():
    query, keys, values = drawn(4)
    cache = kv.append(kv.init(B, H, S, D, store=jnp.float32), keys, values)
    assert cache.lengths.tolist() == [4] * B
    want = Sequences(jnp.float32).step(query, keys, values, (4,) * B)
    assert_close(kv.attend(query, cache), want)
    scaled = kv.attend(3 * query, cache, scale=1 / (3 * np.sqrt(D)))
    np.testing.assert_allclose(scaled, kv.attend(query, cache), rtol=1e-5, atol=1e-6)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("store", [jnp.bfloat16, INT4], ids=["bfloat16", "int4"])
def test_vmap_is_a_loop(store):
    query, keys, values = (np.stack([a, b]) for a, b in zip(drawn(4), drawn(4, 1), strict=True))
    counts = jnp.array([[4, 1, 2], [3, 4, 0]])

    def run(query, keys, values, counts):
        cache = kv.append(kv.init(B, H, S, D, store=store), keys, values, counts)
        return kv.attend(query, cache, counts), cache.lengths

    run = jax.jit(run)
    found, lengths = jax.vmap(run)(query, keys, values, counts)
    np.testing.assert_array_equal(lengths, counts)
    for i in range(2):
        want, _ = run(query[i], keys[i], values[i], counts[i])
        np.testing.assert_allclose(found[i], want, rtol=1e-5, atol=1e-5)


def test_caches_that_a_kernel_writes_on_tpus_are_the_same_on_cpu_and_have_gradients():
    keys = jnp.asarray(normal(2, 3, 1, 1, 128))  # Of two batches of three sequences.
    counts = jnp.array([[1, 0, 1], [1, 1, 1]])

    def first(keys, counts):
        cache = kv.append(kv.init(3, 1, 128, 128, store=jnp.float32), keys, 2 * keys, counts)
        return cache.keys[:, 0, 0], cache.values[:, 0, 0]

    found = jax.vmap(jax.jit(first))(keys, counts)

    want = jnp.where(counts[..., None] > 0, keys[..., 0, 0, :], 0)
    np.testing.assert_array_equal(found[0], want)
    np.testing.assert_array_equal(found[1], 2 * want)
    gradient = jax.grad(lambda k: jnp.sum(first(k, counts[0])[1] ** 2))(keys[0])
    np.testing.assert_allclose(gradient[:, 0, 0], 8 * want[0], rtol=1e-6)


@pytest.mark.parametrize("name", SIZES)
def test_a_cache_takes_the_bytes_of_its_codes_and_scales(name):
    cache = kv.init(B, H, S, D, store=STORES[name], layers=7)
    assert cache.nbytes == round(2 * 7 * B * H * S * D * SIZES[name])
    assert (cache.capacity, cache.size) == (S, D)
    assert str(cache) == f"Cache({name}, (7, {B}, {H}, {S}) by {D})"


@pytest.mark.some_rows(1)
@pytest.mark.parametrize(("store", "bound"), [(INT8, 1 / 254), (INT4, 1 / 14)], ids=["8", "4"])
def test_codes_are_within_half_a_step(store, bound):
    keys = normal(B, 1, H, D)
    values = np.broadcast_to(np.eye(D, dtype=np.float32)[:, None, None, :], (D, 1, H, D))
    # With one token, attention returns its value.
    cache = append(kv.init(B, H, S, D, store=store), keys, keys)
    found = attend(np.zeros((B, 1, N, D), np.float32), cache)
    error = np.abs(np.asarray(found) - np.repeat(keys, N // H, 2)).max(-1)
    assert (error <= 1.001 * bound * np.abs(keys).max(-1).repeat(N // H, 2)).all()
    assert error.max() > 0
    unit = append(kv.init(D, H, S, D, store=store), values, values)
    found = attend(np.zeros((D, 1, H, D), np.float32), unit)
    np.testing.assert_allclose(found, values, rtol=1e-6)


def test_no_floats_as_large_as_the_cache_are_scaled():
    """Scales multiply scores and weights: the only floats of the cache's size are its codes."""
    cache = kv.init(B, H, S, D, store=INT8)
    query, *_ = drawn(1)
    jaxpr = jax.make_jaxpr(lambda q, c: kv.attend(q, c))(query, cache)
    results = [(site.eqn.primitive.name, site.eqn.outvars[0].aval) for site in walk(jaxpr, "tpu")]
    large = [name for name, aval in results if getattr(aval, "shape", None) == (B, H, S, D)]
    assert large == ["convert_element_type"] * 2


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("store", [jnp.bfloat16, INT4, FP8], ids=["bfloat16", "int4", "fp8"])
def test_a_token_that_does_not_fit_is_an_error_or_nan(store):
    _, keys, values = drawn(S - 2)
    cache = append(kv.init(B, H, S, D, store=store), keys, values)
    query, keys, values = drawn(3)
    with pytest.raises(ValueError, match=r"has 11 positions; got tokens up to position 11 \(leng"):
        kv.append(cache, keys, values)
    counts = jnp.array([2, 3, 1])
    full = append(cache, keys, values, counts)
    assert full.lengths.tolist() == [S, S + 1, S - 1]
    found = np.asarray(attend(query, full, counts))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()
    # It stays an error, and the other sequences are not harmed.
    again = append(full, keys, values, jnp.array([0, 0, 1]))
    found = np.asarray(attend(query, again, jnp.array([0, 0, 1])))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("store", [jnp.float64, INT8], ids=["float64", "int8"])
def test_arrays_of_64_bits_are_rounded_without_warnings(store):
    query, keys, values = drawn(2)
    wide = [np.asarray(x, np.float64) for x in (query, keys, values)]
    cache = kv.init(B, H, S, D, store=store)
    found = kv.attend(wide[0], kv.append(cache, *wide[1:]))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, kv.attend(query, kv.append(cache, keys, values)))


def test_no_tokens_give_no_outputs():
    query, keys, values = (x[:, :0] for x in drawn(1))
    cache = kv.append(kv.init(B, H, S, D), keys, values)
    assert cache.lengths.tolist() == [0] * B
    assert kv.attend(query, cache).shape == (B, 0, N, D)


def test_nan_stays_in_its_sequence_and_head():
    query, keys, values = drawn(2)
    values[1, 0, 1, 3] = np.nan
    cache = kv.append(kv.init(B, H, S, D, store=INT8), keys, values)
    is_nan = np.isnan(kv.attend(query, cache)).any((1, 3))
    np.testing.assert_array_equal(is_nan, [[False] * N, [False] * 3 + [True] * 3, [False] * N])


def test_loops_compile_once():
    step: Any = jax.jit(lambda c, k: kv.append(c, k, k))
    cache = kv.init(B, H, S, D, store=INT8)
    for seed in range(3):
        cache = step(cache, drawn(1, seed)[1])
    assert step._cache_size() == 1


CACHE = kv.init(B, H, S, D)
LAYERS = kv.init(B, H, S, D, layers=2)
KEYS = np.zeros((B, 2, H, D), np.float32)
QUERY = np.zeros((B, 2, N, D), np.float32)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: kv.init(0, H, S, D), r"must be positive; got \(0, 2, 11, 5\)"),
        (lambda: kv.init(B, H, S, D, store=jnp.int8), "or an ArrayConfig; got int8. For integers"),
        (lambda: kv.init(B, H, S, D, store=jnp.float4_e2m1fn), "8 bits or more.* got float4_e2m1"),
        (lambda: kv.append(LAYERS, KEYS, KEYS, layer=2), "one of the 2 of the cache; got 2"),
        (lambda: kv.attend(QUERY, LAYERS, layer=-3), "one of the 2 of the cache; got -3"),
        (
            lambda: kv.append(CACHE, KEYS, KEYS, jnp.array([0, 3, 2])),
            r"counts must be 0 to 2, .* got \[0, 3, 2\]",
        ),
        (lambda: kv.append(CACHE, KEYS, KEYS, jnp.array([0, -1, 2])), r"got \[0, -1, 2\]"),
        (
            lambda: kv.init(B, H, S, D, store=jq.ArrayConfig(symmetric=False)),
            "symmetric config of int8, int4 or float8 .* got ArrayConfig.*symmetric=False",
        ),
        (
            lambda: kv.init(B, H, S, D, store=jq.ArrayConfig(format=jq.NF4)),
            "one float scale per token and head; got ArrayConfig.*nf4",
        ),
        (
            lambda: kv.init(B, H, S, D, store=jq.ArrayConfig(group_size=5)),
            "one float scale per token and head; got ArrayConfig.*group_size=5",
        ),
        (
            lambda: kv.init(B, H, S, D, store=jq.ArrayConfig(scale_dtype="float8_e4m3fn")),
            "one float scale per token and head; got ArrayConfig.*e4m3",
        ),
        (
            lambda: kv.init(B, H, S, D, store=jq.ArrayConfig(format=jq.INT2)),
            "one float scale per token and head; got ArrayConfig.*int2",
        ),
        (lambda: kv.append(CACHE, KEYS, KEYS[:, :1]), r"got \(3, 2, 2, 5\) and \(3, 1, 2, 5\)"),
        (lambda: kv.append(CACHE, KEYS[0], KEYS[0]), r"3 sequences of 2 heads of 5; got \(2, 2,"),
        (lambda: kv.append(CACHE, KEYS, KEYS, layer=0), "None for a cache of one layer; got 0"),
        (
            lambda: kv.append(LAYERS, KEYS, KEYS),
            "layer must be the index of a layer; got None for Cache",
        ),
        (lambda: kv.append(CACHE, KEYS, KEYS, jnp.ones(2, int)), r"3 integers.* got int32 \(2,\)"),
        (lambda: kv.append(CACHE, KEYS, KEYS, jnp.ones(3)), r"3 integers.* got float32 \(3,\)"),
        (
            lambda: jax.eval_shape(kv.append, CACHE, *[np.zeros((B, S + 1, H, D))] * 2),
            "has 11 positions; got 12 tokens at once. Make a longer cache",
        ),
        (lambda: kv.attend(QUERY[:, :, :5], CACHE), r"multiple of 2 heads; got \(3, 2, 5, 5\)"),
        (lambda: kv.attend(QUERY[:2], CACHE), r"with 3 sequences, .* got \(2, 2, 6, 5\)"),
        (lambda: kv.attend(QUERY, CACHE, layer=1), "None for a cache of one layer; got 1"),
        (lambda: kv.attend(QUERY, CACHE, jnp.ones((3, 1), int)), r"got int32 \(3, 1\)"),
    ],
)
def test_errors_say_what_to_do(call, text):
    with pytest.raises(ValueError, match=text):
        call()
