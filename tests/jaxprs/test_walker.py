"""Walks over programs, and what is known of slices on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.jaxprs import add_slices, is_sliced, walk
from jaxquant.jaxprs.walker import with_replaced

X = jnp.arange(12.0).reshape(4, 3)


def walked(function, *args, platform=None):
    """(name, names of the equations around, times) of each equation."""
    sites = walk(jax.make_jaxpr(function)(*args), platform)
    return [
        (site.eqn.primitive.name, tuple(e.primitive.name for e in site.within), site.times)
        for site in sites
    ]


JIT = ["jit", "sin"]


def test_equations_come_in_order_and_before_those_inside():
    @jax.jit
    def inner(x):
        return jnp.sin(x)

    found = walked(lambda x: jnp.tanh(jax.jit(lambda x: inner(x) + inner(-x))(jnp.cos(x))), X)
    assert [name for name, *_ in found] == ["cos", "jit", *JIT, "neg", *JIT, "add", "tanh"]
    assert [len(within) for _, within, _ in found] == [0, 0, 1, 2, 1, 1, 2, 1, 0]
    assert {times for *_, times in found} == {1}


def test_loops_multiply_and_loops_of_unknown_length_are_none():
    def step(c, _):
        return lax.fori_loop(0, 5, lambda i, c: jnp.sin(c), c), None

    def body(c):
        return lax.scan(lambda c, _: (jnp.sin(c), None), c, None, length=2)[0]

    found = walked(lambda x: lax.scan(step, x, None, length=3), X)
    assert ("sin", ("scan", "scan"), 15) in found
    found = walked(lambda x: lax.while_loop(lambda c: c[0, 0] < 9, body, x), X)
    assert ("sin", ("while", "scan"), None) in found
    assert ("lt", ("while",), None) in found


def test_only_the_branch_of_the_platform_is_walked():
    def run(x):
        chosen = lax.platform_dependent(x, tpu=jnp.sin, default=jnp.cos)
        return lax.cond(x[0, 0] > 0, jnp.tan, jnp.exp, chosen)

    names = {
        platform: {name for name, *_ in walked(run, X, platform=platform)} & set(CURVES)
        for platform in ("tpu", "cpu", None)
    }
    assert names == {
        "tpu": {"sin", "tan", "exp"},
        "cpu": {"cos", "tan", "exp"},
        None: {"sin", "cos", "tan", "exp"},
    }


CURVES = ("sin", "cos", "tan", "exp")


@pytest.mark.parametrize("flag", ["jax_custom_jvp3", "jax_custom_vjp3", "jax_remat3"])
def test_primitives_with_types_of_their_own_are_walked(flag):
    if not hasattr(jax.config, flag):
        pytest.skip("this JAX does not have them")

    @jax.custom_jvp
    def a(x):
        return jnp.sin(x)

    a.defjvps(lambda tangent, out, x: tangent)

    @jax.custom_vjp
    def b(x):
        return jnp.cos(a(x))

    b.defvjp(lambda x: (b(x), x), lambda x, cotangent: (cotangent,))
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        names = [name for name, *_ in walked(jax.checkpoint(lambda x: jnp.tan(b(x))), X)]
    finally:
        jax.config.update(flag, before)
    assert [name for name in names if name in CURVES] == ["sin", "cos", "tan"]


def test_a_program_runs_with_its_outermost_equations_replaced():
    constant = jnp.arange(12.0).reshape(4, 3)

    def run(x):
        return {"sum": jnp.sin(x) + constant, "inner": jax.jit(lambda x: lax.sin(x))(x)}

    other = jax.make_jaxpr(jnp.cos)(X).jaxpr.eqns[0].primitive

    def replace(eqn):
        return eqn.replace(primitive=other) if eqn.primitive.name == "sin" else eqn

    inner, total = with_replaced(jax.make_jaxpr(run)(X), replace)(X)
    np.testing.assert_allclose(total, np.cos(X) + constant, rtol=1e-6)
    np.testing.assert_allclose(inner, np.sin(X), rtol=1e-6)


NARROW = jnp.ones((4, 8, 6), jnp.int4)


def slices_in(function, *args):
    """Of each `convert_element_type` of the argument's dtype, whether its operand is a slice."""
    sliced, found = frozenset(), []
    for site in walk(jax.make_jaxpr(function)(*args)):
        eqn = site.eqn
        dtypes = [getattr(v.aval, "dtype", None) for v in eqn.invars]
        if eqn.primitive.name == "convert_element_type" and dtypes == [args[0].dtype]:
            found.append(is_sliced(eqn.invars, sliced))
        sliced = add_slices(site, sliced)
    return found


def use(codes):
    return codes.astype(jnp.float32).sum()


def in_a_scan(codes):
    return lax.scan(lambda c, part: (c + use(part), None), jnp.float32(0), codes)[0]


def in_a_while_loop(codes):
    """The slice is a constant of the condition, and the whole one of the body."""
    part = codes[0]
    return lax.while_loop(lambda c: c < use(part), lambda c: c + use(codes), jnp.float32(0))


jitted = jax.jit(use)
# Name: (function, whether each use is of a slice).
USES = {
    "whole": (use, [False]),
    "index": (lambda codes: use(codes[1]), [True]),
    "slice, made larger": (lambda codes: use(jnp.concatenate([codes[0]] * 9)), [True]),
    "reshape": (lambda codes: use(codes.reshape(8, -1)), [False]),
    "scan": (in_a_scan, [True]),
    "closed over in a loop": (
        lambda codes: lax.fori_loop(0, 3, lambda _, c: c + use(codes), jnp.float32(0)),
        [False],
    ),
    "carried": (
        lambda codes: lax.fori_loop(0, 3, lambda _, c: (c[0], c[1] + use(c[0])), (codes[0], 0.0)),
        [True],
    ),
    "while_loop": (in_a_while_loop, [True, False]),
    "cond": (
        lambda codes: lax.cond(codes[0, 0, 0] > 0, use, lambda c: -use(c), codes[0]),
        [True] * 2,
    ),
    "jit": (lambda codes: jitted(codes[0]), [True]),
    "checkpoint": (lambda codes: jax.checkpoint(use)(codes[0]), [True]),
    "a jitted function of both": (
        lambda codes: jitted(codes[:2]) + jitted(jnp.ones((2, 8, 6), jnp.int4)),
        [True, False],
    ),
    "a scan inside of a jitted function": (lambda codes: jax.jit(in_a_scan)(codes), [True]),
}


def taken_in_a_loop(codes):
    return lax.fori_loop(0, 4, lambda i, c: c + use(codes[i]), jnp.float32(0))


# The same for float8, of which XLA converts no more than the slice outside of loops.
FLOATS = {
    "index": (lambda codes: use(codes[1]), [False]),
    "scan": (in_a_scan, [True]),
    "scan, turned": (lambda codes: lax.scan(lambda c, x: (c + use(x.T), None), 0.0, codes), [True]),
    "taken in a loop": (taken_in_a_loop, [True]),
    "closed over in a loop": USES["closed over in a loop"],
    "index before a loop": (lambda codes: USES["closed over in a loop"][0](codes[1]), [False]),
}


@pytest.mark.parametrize("name", FLOATS)
def test_slices_of_narrow_floats_are_followed_in_loops(name):
    function, wanted = FLOATS[name]
    assert slices_in(function, NARROW.astype(jnp.float8_e4m3fn)) == wanted


@pytest.mark.parametrize("name", USES)
def test_slices_of_narrow_arrays_are_followed(name):
    function, wanted = USES[name]
    with jax.numpy_dtype_promotion("standard"):
        assert slices_in(function, NARROW) == wanted
