"""Parameters that a program passes on as it got them, as frameworks pass state, stay quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.jaxprs import passed_on

from . import cases

pytestmark = pytest.mark.usefixtures("quick_compilation")
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
