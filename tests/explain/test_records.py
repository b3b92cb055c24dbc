"""Only a function that is being explained contains markers."""

import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    ArrayConfig,
    Inputs,
    conv_general_dilated,
    dot_general,
    einsum,
    explain,
    matmul,
    quantize,
    ragged_dot,
    scan,
    take,
)
from jaxquant.jaxprs import marker_p

from ..ops.products import normal, weight, with_inputs

X = normal(5, 64)
Q = with_inputs(weight(ArrayConfig(), (64, 24)), Inputs(ArrayConfig()))
STACK = jax.vmap(lambda w: quantize(w, ArrayConfig()))(normal(3, 64, 64))
convolve = partial(conv_general_dilated, window_strides=(1, 1), padding="SAME")
# Name: (function, arguments, how many products it holds).
OPERATIONS = {
    "dot_general": (lambda x, q: dot_general(x, q, (((1,), (0,)), ((), ()))), (X, Q), 1),
    "matmul": (matmul, (X, Q), 1),
    "matmul, forced": (partial(matmul, implementation="dequantize"), (X, Q), 1),
    "einsum": (partial(einsum, "mk,kn->nm"), (X, Q), 1),
    "conv_general_dilated": (
        convolve,
        (normal(1, 4, 5, 7), quantize(normal(6, 4, 3, 3), ArrayConfig(), axis=(1, 2, 3))),
        1,
    ),
    "ragged_dot": (ragged_dot, (X, quantize(normal(2, 64, 6), ArrayConfig(), axis=1), [2, 3]), 1),
    "take": (lambda q: take(q, jnp.arange(3), 0), (Q,), 0),
    "scan": (
        lambda x, layers: scan(lambda x, q: (matmul(x, q), None), x, layers)[0],
        (X, STACK),
        1,
    ),
    "gradient": (jax.grad(lambda x, q: matmul(x, q).sum()), (X, Q), 1),
}


def has_markers(function, arguments):
    return marker_p.name in str(jax.make_jaxpr(function)(*arguments))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("is_explained_first", [True, False])
@pytest.mark.parametrize("name", OPERATIONS)
def test_programs_have_no_markers_unless_they_are_explained(name, is_explained_first):
    function, arguments, count = OPERATIONS[name]
    arguments = jax.tree.map(jnp.asarray, arguments)
    run = jax.jit(lambda *args: function(*args))
    if is_explained_first:
        assert len(explain(run, *arguments)) == count
    assert not has_markers(run, arguments)
    run(*arguments)
    assert len(explain(run, *arguments)) == count
    assert not has_markers(run, arguments)
    assert not has_markers(function, arguments)
    assert len(explain(run, *arguments)) == count


def test_a_program_traced_while_another_thread_explains_has_no_markers():
    run = jax.jit(matmul)
    is_traced, seen = threading.Event(), []

    def slow(x, q):
        thread = threading.Thread(target=lambda: seen.append(has_markers(run, (X, Q))))
        thread.start()
        thread.join()
        is_traced.set()
        return run(x, q)

    assert len(explain(slow, X, Q)) == 1
    assert is_traced.is_set()
    assert seen == [False]


def test_a_function_that_raises_leaves_no_markers_behind():
    def fails(x, q):
        matmul(x, q)
        raise RuntimeError("not today")

    with pytest.raises(RuntimeError, match="not today"):
        explain(fails, X, Q)
    assert not has_markers(jax.jit(lambda x, q: matmul(x, q)), (X, Q))


def test_results_are_the_same_within_and_without():
    run = jax.jit(matmul)
    before = run(X, Q)
    explain(run, X, Q)
    np.testing.assert_array_equal(run(X, Q), before)
