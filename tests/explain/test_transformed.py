"""Rows of functions that are transformed, jitted or in loops, and where they lie."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax.sharding import PartitionSpec as P

from jaxquant import (
    INT4,
    ArrayConfig,
    explain,
    matmul,
)

from ..ops.products import normal, weight
from .operands import (
    SMALL,
    X,
    floats,
    stacked,
    stored,
)

# Of a (5, 64) by (64, 24) product.
OPERATIONS = 2 * 5 * 64 * 24


INPUTS, WEIGHTS, RESULTS = 4 * 5 * 64, 64 * 24 + 4 * 24, 4 * 5 * 24


ALL = INPUTS + WEIGHTS + RESULTS


def product(x, q):
    return jnp.tanh(matmul(x, q))


def total(x, q):
    return jnp.sum(product(x, q))


def in_scans(x, q):
    def inner(total, _):
        return total + product(x, q), None

    def outer(total, _):
        return jax.lax.scan(inner, total, None, length=3)[0], None

    return jax.lax.scan(outer, jnp.zeros((5, 24)), None, length=4)[0]


def in_a_while_loop(x, q):
    return jax.lax.while_loop(lambda out: jnp.max(out) < 1, lambda _: product(x, q), x[:, :24])


def in_branches(x, q):
    return jax.lax.cond(jnp.max(x) > 0, product, lambda x, q: -product(x, q), x, q)


def in_shards(x, q):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P(None), jax.tree.map(lambda _: P(None), q)
    return jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=P(None))(x, q)


def transposed(x, q):
    return jax.linear_transpose(lambda x: matmul(x, q), x)(jnp.zeros((5, 24)))


# Name: (function, x, weights, [(copies, times, bytes, operations) of each row]).
TRANSFORMED = {
    "plain": (product, X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "jit": (jax.jit(jax.jit(product)), X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "vmap of inputs": (
        jax.vmap(product, (0, None)),
        stacked(X),
        SMALL,
        [(3, 1, 3 * INPUTS + WEIGHTS + 3 * RESULTS, 3 * OPERATIONS)],
    ),
    "vmap of weights": (
        jax.vmap(product, (None, 0)),
        X,
        stacked(SMALL),
        [(3, 1, INPUTS + 3 * WEIGHTS + 3 * RESULTS, 3 * OPERATIONS)],
    ),
    "vmap of both": (
        jax.vmap(product),
        stacked(X),
        stacked(SMALL),
        [(3, 1, 3 * ALL, 3 * OPERATIONS)],
    ),
    "vmap twice": (
        jax.vmap(jax.vmap(product, (0, None)), (None, 0)),
        stacked(X),
        stacked(SMALL),
        [(9, 1, 3 * INPUTS + 3 * WEIGHTS + 9 * RESULTS, 9 * OPERATIONS)],
    ),
    "scans": (in_scans, X, SMALL, [(1, 12, 12 * ALL, 12 * OPERATIONS)]),
    "while loop": (in_a_while_loop, floats(5, 64), stored((64, 24)), [(1, None, ALL, OPERATIONS)]),
    "branches": (in_branches, X, SMALL, [(1, 1, ALL, OPERATIONS)] * 2),
    "shards": (in_shards, X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "gradient": (jax.grad(total), X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "gradient of remat": (
        jax.grad(jax.checkpoint(total)),
        X,
        SMALL,
        [(1, 1, ALL, OPERATIONS)] * 2,
    ),
    "hessian": (jax.jacfwd(jax.grad(total)), X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "transposed": (transposed, X, SMALL, []),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_rows_survive_transformations(name):
    function, x, q, wanted = TRANSFORMED[name]
    rows = explain(function, x, q)
    assert [(r.copies, r.times, r.bytes, r.operations) for r in rows] == wanted


def test_what_was_traced_and_compiled_before_has_its_rows_again():
    x, q = jnp.asarray(normal(5, 64)), weight(ArrayConfig(), (64, 24))
    run = jax.jit(product)
    run(x, q).block_until_ready()
    for _ in range(2):
        assert len(explain(run, x, q)) == 1
        assert len(explain(lambda x: run(x, q) + run(2 * x, q), x)) == 2


def test_paths_are_scopes_and_jitted_functions_from_the_outside_in():
    @jax.jit
    def feed_forward(x, q):
        with jax.named_scope("up"):
            return product(x, q)

    def model(x, q):
        with jax.named_scope("layer[red]"):
            hidden = feed_forward(x, q)
        return hidden, jax.vmap(product, (0, None))(x.reshape(5, 1, 64), q)

    first, second = explain(model, X, SMALL)
    assert (first.path, second.path) == ("layer[red]/jit(feed_forward)/up", "vmap()")
    text = str(explain(model, X, SMALL))
    assert "layer[red]/jit(fe" in text


def test_lines_are_those_of_the_caller_also_when_traced_before():
    def one(x, q):
        return product(x, q)

    def other(x, q):
        return matmul(x, q)

    start = other.__code__.co_firstlineno
    for function in (one, other, one):
        (row,) = explain(function, X, SMALL)
        line = start + 1 if function is other else product.__code__.co_firstlineno + 1
        assert row.line == f"test_transformed.py:{line}"
    with jax.disable_jit():
        assert len(explain(one, X, SMALL)) == 1


def test_the_table_shows_each_row_and_how_often_it_runs():
    def model(x, q):
        forced = partial(matmul, implementation="dequantize")
        return (
            in_scans(x, q),
            in_a_while_loop(x, q),
            jax.vmap(forced, (0, None))(x.reshape(5, 1, 64), q),
        )

    found = explain(model, X, SMALL, platform="tpu")
    console = rich.console.Console(width=200, record=True)
    console.print(found)
    text = console.export_text()
    for words in (
        "5x64 by 64x24",
        "float32 by int8 per channel",
        "12 times in a loop",
        "in a loop of unknown length",
        "5 copies by vmap",
        "dequantize, in floating point, as requested",
        "not integer: an operand of float32 does not have codes",
        "not measured",
        "memory",
        f"{12 * ALL / 1e6:.3f}",
        f"{12 * OPERATIONS / 1e6:.2f}",
        "is an estimate",
    ):
        assert words in text
    assert found.table().row_count == 3


@pytest.mark.parametrize(
    "config", [ArrayConfig(), ArrayConfig(format=INT4, group_size=32)], ids=str
)
def test_products_can_still_be_transposed(config):
    q, cotangent = weight(config, (64, 24)), jnp.asarray(normal(5, 24))
    (got,) = jax.linear_transpose(lambda x: matmul(x, q), X)(cotangent)
    np.testing.assert_allclose(got, cotangent @ q.dequantize().T, rtol=1e-4)


def test_a_model_may_hold_functions_and_names_among_its_leaves():
    model = {"activation": jax.nn.gelu, "name": "head", "kernel": stored((64, 24))}

    def apply(model, x):
        return model["activation"](matmul(x, model["kernel"]))

    (row,) = explain(apply, model, X)
    assert row.operation == "dot_general"
