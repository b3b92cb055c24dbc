"""Weights in training, and operations with them, for the tests of prepared trees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant import INT2, INT4, SCHEMES, W8A8, ArrayConfig, Inputs, Rule, Scheme
from jaxquant.training import init_learned, prepare

from ..ops.products import normal

M, K, N = 5, 128, 24
W4A4 = Scheme(ArrayConfig(format=INT4), ArrayConfig(format=INT4))
_SCHEMES: dict[str, Scheme] = {
    **SCHEMES,
    "INT2 g32": Scheme(ArrayConfig(format=INT2, group_size=32)),
    "W4A4": W4A4,
    "per tensor": Scheme(ArrayConfig(per_tensor=True), ArrayConfig(per_tensor=True)),
    "bfloat16 scales": Scheme(ArrayConfig(format=INT4, scale_dtype="bfloat16")),
}
BLOCKS = ArrayConfig(group_size=(32, 8))
ALL = [*(Rule(n, s) for n, s in _SCHEMES.items()), Rule("blocks", BLOCKS, axis=(-2, -1))]
GROUPED = Scheme(ArrayConfig(format=INT4, group_size=8, symmetric=False))
X = jnp.asarray(normal(M, K))


def weights(rules, dtype="float32", shape=(K, N)):
    """A weight for each rule, under its pattern."""
    names = [rule.pattern if isinstance(rule, Rule) else rule for rule in rules]
    return {name: jnp.asarray(normal(*shape, seed=i), dtype) for i, name in enumerate(names)}


def moved(tree, seed=0):
    """The tree as after some training: every float in it has changed."""
    leaves, treedef = jax.tree.flatten(tree)
    random = np.random.default_rng(seed)
    factors = [random.uniform(0.7, 1.1, x.shape).astype(x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, _multiplied(leaves, factors))


@jax.jit
def _multiplied(leaves, factors):
    return [x * f for x, f in zip(leaves, factors, strict=True)]


def learn(params, rules):
    return prepare(params, rules, init_learned(params, rules, None))


def products(tree, x):
    return {name: jq.matmul(x, w) for name, w in tree.items()}


def assert_equal_trees(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def calibrated(prepared, scale, zero_point=None):
    inputs = Inputs(prepared.inputs.config, scale, zero_point)
    return dataclasses.replace(prepared, inputs=inputs)


def einsum(x, w):
    return jq.einsum("mk,hkn->mhn", x, w)


def embed(x, w):
    return jq.take(w, jnp.array([3, 0, 3, 7]), axis=0)


def convolve(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jq.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=numbers)


def ragged(x, w):
    return jq.ragged_dot(x, w, jnp.array([2, 0, 3], jnp.int32))


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(jq.matmul(x, w)), None), x, w)[0]


# (operation, shapes of inputs and weight, schemes with their axes)
OPERATIONS: dict[str, Any] = {
    "einsum": (einsum, (M, 32), (3, 32, 8), ((W8A8, -2), (GROUPED, -2))),
    "take": (embed, (M, 8), (16, 32), ((ArrayConfig(), -1), (ArrayConfig(group_size=8), 1))),
    "conv": (convolve, (2, 5, 6, 4), (3, 3, 4, 8), ((W8A8, (0, 1, 2)), (ArrayConfig(), (0, 1, 2)))),
    "ragged_dot": (ragged, (M, 32), (3, 32, 8), ((W8A8, -2), (GROUPED, -2))),
    "scan": (scanned, (M, 32), (3, 32, 32), ((W8A8, -2), (ArrayConfig(format=INT4), 1))),
}


def operation_case(name):
    """A tree after some training, inputs, and what the operation gives for each weight of it."""
    operation, shape, weight_shape, schemes = OPERATIONS[name]
    rules = [Rule(str(i), scheme, axis) for i, (scheme, axis) in enumerate(schemes)]
    prepared = moved(learn(weights(rules, shape=weight_shape), rules))

    def outputs(tree, x):
        return {name: operation(x, w) for name, w in tree.items()}

    return prepared, jnp.asarray(normal(*shape)), outputs
