"""Custom derivatives and checkpoints that JAX traces as primitives of `hijax`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import hijax

import jaxquant as jq
from jaxquant.jaxprs import walk

from . import cases

FLAGS = ("jax_custom_vjp3", "jax_custom_jvp3", "jax_remat3")
NAMES = jax.checkpoint_policies.save_only_these_names("rows")


@pytest.fixture(autouse=True, scope="module")
def hijax_primitives(quick_compilation):
    """Sets all of the flags that this JAX has."""
    before = {flag: getattr(jax.config, flag) for flag in FLAGS if hasattr(jax.config, flag)}
    for flag in before:
        jax.config.update(flag, True)
    yield
    for flag, value in before.items():
        jax.config.update(flag, value)


@jax.custom_vjp
def vjp(x, w):
    return jnp.tanh(x @ w)


@jax.custom_jvp
def jvp(x, w):
    return jnp.tanh(x @ w)


def _forward(x, w):
    out = vjp(x, w)
    return out, (x, w, 1 - out**2)


def _backward(residuals, g):
    x, w, slope = residuals
    return (g * slope) @ w.T, x.T @ (g * slope)


@jvp.defjvp
def _tangent(primals, tangents):
    out = jvp(*primals)
    return out, (tangents[0] @ primals[1] + primals[0] @ tangents[1]) * (1 - out**2)


@jax.custom_jvp
def odd(x):
    """Its derivative is another function's."""
    return x


vjp.defvjp(_forward, _backward)
odd.defjvp(lambda primals, tangents: (odd(*primals), 3 * tangents[0]))


def named(x, w):
    return jnp.sin(checkpoint_name(x @ checkpoint_name(w, "w"), "rows"))


def returned(x, w):
    x, w = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), w))(x, w)
    return x @ w.T


FUNCTIONS = {
    "custom_vjp": vjp,
    "custom_jvp": jvp,
    "custom_jvp of activations": lambda x, w: odd(odd(x) @ w),
    "checkpoint": jax.checkpoint(named, policy=NAMES),
    "custom_vjp in a checkpoint": jax.checkpoint(lambda x, w: jnp.sin(vjp(x, w))),
    "custom_vjp in a loop": lambda x, w: lax.scan(
        lambda x, _: (vjp(x, w) @ w.T, None), x, length=2
    )[0],
    "returned by a checkpoint": returned,
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_stay_quantized_and_have_gradients(name):
    fn, q, x = FUNCTIONS[name], cases.parameter("int4 g32"), cases.rows() / 8
    lifted = jq.lift(fn, strict=True, implementation="dequantize")

    def results(fn, w):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(fn(x, w)))))(x)

    for found, expected in zip(results(lifted, q), results(fn, q.dequantize()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert jq.uses(lambda w, x: fn(x, w), q, x).contracted[""] in [(0,), (1,)]


def test_a_checkpoint_keeps_its_policy_and_its_names():
    lifted = jq.lift(FUNCTIONS["checkpoint"])
    program = jax.make_jaxpr(lifted)(cases.rows(), cases.parameter("int8"))
    found = [site.eqn.params["_prim"] for site in walk(program) if "_prim" in site.eqn.params]
    assert [p.policy for p in found if hasattr(p, "policy")] == [NAMES]
    assert {p.name for p in found if type(p).__name__ == "CheckpointName"} == {"w", "rows"}


def test_a_function_with_its_own_derivative_dequantizes_as_a_whole():
    @jax.custom_vjp
    def fn(w):
        return jnp.exp(w)

    fn.defvjp(lambda w: (fn(w), None), lambda _, g: (3 * g,))
    (row,) = jq.explain(jq.lift(fn), cases.parameter("int8")).dequantized
    assert row.why.startswith("it has its own derivative, and dequantizes 0 in exp at ")


# Renamed in JAX 0.12.
Type: Any = next(
    getattr(hijax, name) for name in ("HiPrim", "VJPHiPrimitive") if hasattr(hijax, name)
)


class Product(Type):
    """A primitive that can be expanded, without a jaxpr of what it computes."""

    def __init__(self, x, w):
        self.in_avals = (x, w)
        self.out_aval = jax.typeof(jnp.zeros((x.shape[0], w.shape[1]), x.dtype))
        # Like the body of a loop, a part of what it computes.
        self.params = {"jaxpr": jax.make_jaxpr(lambda x, w: -(x @ w))(x, w)}
        super().__init__()

    def expand(self, x, w):
        return x @ w


def test_other_primitives_are_expanded():
    def fn(x, w):
        return Product(jax.typeof(x), jax.typeof(w))(x, w)

    q, x = cases.parameter("int8"), cases.rows()
    found = jax.jit(jq.lift(fn, strict=True, implementation="dequantize"))(x, q)
    np.testing.assert_allclose(found, x @ q.dequantize(), rtol=1e-4, atol=1e-4)


def test_primitives_that_cannot_be_expanded_dequantize():
    class Opaque(Product):
        def expand(self, x, w):
            raise NotImplementedError

    def fn(x, w):
        return Opaque(jax.typeof(x), jax.typeof(w))(x, w)

    with pytest.raises(ValueError, match=r"1 in call_hi_primitive at .*: it has no form"):
        jax.eval_shape(jq.lift(fn, strict=True), cases.rows(), cases.parameter("int8"))
