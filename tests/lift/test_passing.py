"""Parameters that a program passes on as it got them, as frameworks pass state, stay quantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxquant as jq
from jaxquant.jaxprs.passing import passed_on

from . import cases

X = cases.rows()


def layer(x, w):
    return jnp.tanh(x @ w @ w.T)


def rematted(w):
    return jax.checkpoint(lambda x, w: (layer(x, w), w))(X, w)


def scanned(w, **options):
    def step(x, w):
        # As `nnx.scan` over `nnx.remat`: the slices of the state are passed through both.
        return jax.checkpoint(jax.jit(lambda x, w: (layer(x, w), w)))(x, w)

    return lax.scan(step, cases.rows(cases.K // 2), cases.stacked_rows(w), **options)


def carried(w):
    def step(carry, _):
        x, w = jax.checkpoint(lambda x, w: (layer(x, w), w))(*carry)
        return (x, w), None

    return lax.scan(step, (X, w), length=2)[0]


def looped(w):
    def step(carry):
        i, x, w = carry
        return i + 1, *jax.checkpoint(lambda x, w: (layer(x, w), w))(x, w)

    return lax.while_loop(lambda carry: carry[0] < 2, step, (0, X, w))[1:]


def nested(w):
    return lax.scan(lambda x, _: (x, None), carried(w), length=2)[0]


def branched(w):
    return lax.cond(X[0, 0] > 0, lambda w: (X @ w, w), lambda w: (2 * (X @ w), w), w)


def on_platforms(w):
    return lax.platform_dependent(w, cpu=lambda w: (X @ w, w), default=lambda w: (-(X @ w), w))


PASSING = {
    "remat": rematted,
    "scan": scanned,
    "scan in reverse": lambda w: scanned(w, reverse=True),
    "carry": carried,
    "while": looped,
    "nested": nested,
    "cond": branched,
    "platform_dependent": on_platforms,
}


@pytest.mark.slow
@pytest.mark.some_rows(5)
@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("quantized", ["int8", "int4 g32", "nf4 g32 nested"])
def test_a_parameter_that_is_passed_on_stays_quantized(name, quantized):
    fn, q = PASSING[name], cases.parameter(quantized)
    lifted = jax.jit(jq.lift(lambda w: (fn(w)[0], X @ fn(w)[1].reshape(w.shape)), strict=True))
    expected = jax.jit(fn)(q.dequantize())
    found, product = lifted(q)
    np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-4)
    expected = X @ expected[1].reshape(q.shape)
    bound = 1e-4 if q.inputs is None else 0.02
    assert jnp.linalg.norm(product - expected) < bound * jnp.linalg.norm(expected)


def in_a_branch_of_a_loop(w):
    def step(i, carry):
        return lax.cond(carry[0][0, 0] > 9, lambda carry: carry, lambda c: (layer(*c), c[1]), carry)

    return lax.fori_loop(0, 2, step, (X, w))


def in_a_loop_in_a_loop(w):
    step = lambda carry: (layer(*carry), carry[1])  # noqa: E731
    inner = lambda i, carry: lax.while_loop(lambda c: c[0][0, 0] < 9, step, carry)  # noqa: E731
    return lax.fori_loop(0, X[0, 0].astype(int), inner, (X, w))


def copied(w):
    def step(carry, _):
        x, w = lax.optimization_barrier(carry)
        return (layer(x, w), jnp.copy(checkpoint_name(w, "w"))), None

    return lax.scan(step, (X, w), length=2)[0]


def constrained(w):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("a"))
    step = lambda i, w: lax.with_sharding_constraint(w, sharding)  # noqa: E731
    return X, lax.fori_loop(0, 2, step, w)


@pytest.mark.parametrize("fn", [in_a_branch_of_a_loop, in_a_loop_in_a_loop, copied, constrained])
def test_what_a_loop_carries_unchanged_stays_quantized_and_is_returned(fn):
    q = cases.parameter("int4 g32")
    _, same = jax.eval_shape(jq.lift(fn, strict=True), q)
    assert jax.tree.structure(same) == jax.tree.structure(q)


def written(loop, cache, rows):
    """A cache that each step reads and writes one row of."""

    def step(i, carry):
        cache, total = carry
        cache = lax.dynamic_update_slice(cache, rows, (i, 0))
        return cache, total + (rows @ cache.T).sum()

    return loop(step, (cache, jnp.zeros(())))


LOOPS = {
    "scan": lambda step, carry: lax.scan(lambda c, i: (step(i, c), None), carry, jnp.arange(2))[0],
    "while": lambda step, carry: lax.fori_loop(0, jnp.int32(2), step, carry),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_cache_that_a_loop_writes_is_dequantized_and_the_reason_is_given(name):
    cache, rows = cases.parameter("int8"), cases.rows(96)
    fn = functools.partial(written, LOOPS[name])
    found = jax.jit(jq.lift(fn))(cache, rows)
    expected = jax.jit(fn)(cache.dequantize(), rows)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, expected)

    why = "the loop carries it, and returns another array in its place"
    (row,) = jq.explain(jq.lift(fn), cache, rows).dequantized
    assert (row.primitive, row.why, row.times) == (name, why, 1)
    with pytest.raises(ValueError, match=f"got 0 in {name} at .*test_passing.py:.*: {why}"):
        jax.eval_shape(jq.lift(fn, strict=True), cache, rows)


@pytest.mark.parametrize(
    "write",
    [
        lambda cache, rows: lax.dynamic_update_slice(cache, rows, (3, 0)),
        lambda cache, rows: cache.at[jnp.array([3, 1, 2])].set(rows),
    ],
)
def test_a_written_cache_says_that_no_scheme_is_known(write):
    with pytest.raises(ValueError, match=r"got 0 in .*: no scheme says how to quantize the values"):
        jax.eval_shape(jq.lift(write, strict=True), cases.parameter("int8"), cases.rows(96))


def test_an_array_that_a_loop_replaces_by_a_parameter_is_one():
    def fn(w):
        return lax.fori_loop(0, 2, lambda i, x: w, jnp.zeros(w.shape))

    with pytest.raises(ValueError, match="the loop returns it in place of an array that it carr"):
        jax.eval_shape(jq.lift(fn, strict=True), cases.parameter("int8"))


def test_what_changes_place_in_a_loop_is_dequantized():
    def step(carry, _):
        x, a, b = carry
        return (jnp.tanh(x @ a @ b.T), b, a), None

    def fn(a, b):
        return lax.scan(step, (X, a, b), length=3)[0]

    a, b = (
        cases.parameter("int8"),
        jq.quantize(jnp.cos(cases.parameter("int8").dequantize()), jq.ArrayConfig(), 0),
    )
    found = jax.jit(jq.lift(fn, implementation="dequantize"))(a, b)
    expected = jax.jit(fn)(a.dequantize(), b.dequantize())
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), found, expected
    )
    assert {row.primitive for row in jq.explain(jq.lift(fn), a, b).dequantized} == {"scan"}


def test_branches_that_pass_on_different_parameters_dequantize_them():
    def fn(a, b):
        return lax.cond(X[0, 0] > 0, lambda a, b: (a, b), lambda a, b: (b, b), a, b)

    a, b = cases.parameter("int8"), cases.parameter("int4 g32")
    first, second = jax.jit(jq.lift(fn))(a, b)
    chosen = a if X[0, 0] > 0 else b
    np.testing.assert_array_equal(first, jax.jit(jq.dequantize)(chosen))
    assert isinstance(second, jq.QTensor)


def test_inputs_are_followed_through_programs():
    def fn(x, y, z):
        y, x = jax.jit(lambda x, y: (y, x))(x, y)
        _, zs = lax.scan(lambda c, z: (c, (z, z + 1)), x, z)
        return zs[0], x, y, x + 1, zs[1], 3.0

    program = jax.make_jaxpr(fn)(1.0, 2.0, jnp.ones(4))
    assert passed_on(program) == [2, 0, 1, None, None, None]


def test_inputs_are_followed_through_branches_and_loops():
    # JAX itself follows what is not inside of a checkpoint.
    first = jax.checkpoint(lambda x, y: (jnp.sin(x), y, x))
    second = jax.checkpoint(lambda x, y: (jnp.cos(x), y, y))
    step = jax.checkpoint(lambda n, x, y, z: (n + 1, x, z, y))

    def fn(x, y):
        branched = lax.cond(x > 0, first, second, x, y)
        looped = lax.while_loop(lambda c: c[0] < 3, lambda c: step(*c), (0, y, x, y))
        return *branched, *looped

    program = jax.make_jaxpr(fn)(1.0, 2.0)
    assert passed_on(program) == [None, 1, None, None, 1, None, None]
