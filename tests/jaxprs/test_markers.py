"""Markers are left only in what a thread traces within `marking`."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.jaxprs import mark, marker_p, marking

X = jnp.arange(6.0).reshape(2, 3)


def double(x):
    out = 2 * x
    return mark(out, x, x, lambda: "a record")


def count(function, *args):
    """How many markers are in the trace of a function, inner jaxprs included."""
    return str(jax.make_jaxpr(function)(*args)).count(f"{marker_p.name}[")


@pytest.mark.parametrize("is_first", [True, False])
def test_jitted_functions_have_markers_within_the_context_and_nowhere_else(is_first):
    inner = jax.jit(lambda x: double(x))
    loop = jax.jit(lambda x: jax.lax.scan(lambda x, _: (inner(x), None), x, length=3)[0])
    functions = (inner, loop, jax.jit(jax.checkpoint(inner)), jax.vmap(inner))
    for wanted in (is_first, not is_first, is_first):
        for function in functions:
            if wanted:
                with marking():
                    assert count(function, X) == 1
            else:
                assert count(function, X) == 0
                np.testing.assert_array_equal(inner(X), 2 * X)


def test_a_trace_that_fails_leaves_the_context():
    with pytest.raises(ZeroDivisionError), marking():
        jax.make_jaxpr(lambda x: double(x) / (1 // 0))(X)
    assert count(double, X) == 0


def test_contexts_nest():
    with marking():
        with marking():
            assert count(double, X) == 1
        assert count(double, X) == 1
    assert count(double, X) == 0


def test_the_context_is_that_of_one_thread():
    function = jax.jit(double)
    is_inside, is_done = threading.Event(), threading.Event()
    found = []

    def mark_meanwhile():
        with marking():
            is_inside.set()
            is_done.wait(60)
            found.append(count(function, X))

    thread = threading.Thread(target=mark_meanwhile)
    thread.start()
    assert is_inside.wait(60)
    outside = count(function, X)
    is_done.set()
    thread.join()
    assert (outside, found) == (0, [1])


def test_vmap_counts_copies_of_the_result_and_of_each_operand():
    def product(a, b):
        return mark(a * b, a, b, lambda: None)

    for axes, copies in (((0, 0), (2, 2, 2)), ((0, None), (2, 2, 1)), ((None, 0), (2, 1, 2))):
        args = [X[0] if axis is None else X for axis in axes]
        with marking():
            jaxpr = jax.make_jaxpr(jax.vmap(product, axes))(*args)
        (marker,) = (eqn for eqn in jaxpr.eqns if eqn.primitive is marker_p)
        assert marker.params["copies"] == copies


def test_a_marker_is_the_identity_and_leaves_nothing_in_the_compiled_program():
    def lowered(function):
        def run(x):
            return function(x + 1)

        return jax.jit(run).lower(X).as_text()

    with marking():
        marked = lowered(lambda x: mark(x, x, x, lambda: None))
        np.testing.assert_array_equal(double(X), 2 * X)
    assert marked == lowered(lambda x: x)
