"""What has to hold for any model that runs lifted."""

import dataclasses
import re
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant import training
from jaxquant.tree.internal import leaves_with_paths


def _with_groups(scheme):
    weights = dataclasses.replace(scheme.weights, group_size=32)
    return dataclasses.replace(scheme, weights=weights)


# With and without quantized inputs, per channel and in groups; each with the largest relative error
# of the outputs of random models of a few layers.
SCHEMES = {
    "W8A8": (jq.W8A8, 0.04),
    "W4A16": (_with_groups(jq.W4A16), 0.4),
}
NF4 = _with_groups(jq.NF4A16)
STATIC = jq.Scheme(jq.ArrayConfig(), jq.ArrayConfig(per_tensor=True))
INT2 = jq.Scheme(jq.ArrayConfig(format=jq.INT2, group_size=16))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def tokens(count=128, shape=(2, 8)):
    return jnp.asarray(np.random.default_rng(0).integers(1, count, shape).astype(np.int32))


def distance(found: Any, expected: Any) -> float:
    """Relative distance of all floating outputs."""

    def joined(tree):
        leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
        return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in leaves])

    found, expected = joined(found), joined(expected)
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def quantized_paths(tree: Any) -> set[str]:
    paths, leaves, _ = leaves_with_paths(tree)
    return {p for p, x in zip(paths, leaves, strict=True) if isinstance(x, jq.QTensor)}


def check_schemes(
    apply: Callable[..., Any],
    params: Any,
    *args: Any,
    matrices: int,
    looked_up: Collection[str] = (),
    no_groups: Collection[str] = (),
    least_bound: float = 0.0,
) -> None:
    """Quantizes each matrix of a model in each scheme, and compares the lifted model with it.

    Args:
        apply: of (params, *args), unchanged.
        params: arrays.
        args: other arguments.
        matrices: how many matrices, kernels and tables the model has.
        looked_up: paths of tables that are not multiplied.
        no_groups: paths of kernels without a whole group of 32.
        least_bound: raises the bounds on the error, for models in which errors add up.
    """
    uses = jq.uses(apply, params, *args)
    run, lifted = jax.jit(apply), jq.lift(apply)
    exact = run(params, *args)
    for name, (scheme, bound) in SCHEMES.items():
        left = set(no_groups) if scheme.weights.group_size else set()
        with pytest.warns(UserWarning, match="stay in float") if left else nullcontext():
            rules = uses.rules(scheme)
        quantized = jq.tree.quantize(params, rules)
        assert quantized_paths(quantized) == set(uses.contracted) - left, name
        assert len(uses.contracted) == matrices

        explanation = jq.explain(lifted, quantized, *args)
        assert not explanation.dequantized, name
        # Parameters that are joined before their product are named together.
        products = {path for row in explanation for path in row.parameter.split(" + ")}
        assert products == quantized_paths(quantized) - set(looked_up), name

        found = jax.jit(lifted)(quantized, *args)
        assert jax.tree.structure(found) == jax.tree.structure(exact)
        error = distance(found, exact)
        assert 0 < error < max(bound, least_bound * (scheme.inputs is None)), (name, error)
        if scheme.inputs is None:
            expected = run(jq.tree.dequantize(quantized), *args)
            assert distance(found, expected) < 1e-5, name
    check_training(apply, params, *args, paths=set(uses.contracted) - set(looked_up))


PRODUCTS = dataclasses.replace(training.INT8_TRAINING, rounds_stochastically=False)


def check_training(apply: Callable[..., Any], params: Any, *args: Any, paths: set[str]) -> None:
    """Quantizes the product of each of these parameters in training, and compares with float.

    A rule whose parameter does not reach a product is an error.
    """
    rules = {f"re:{re.escape(path)}": PRODUCTS for path in sorted(paths)}
    trained = training.train_products(apply, rules)
    found = {
        path for row in jq.explain(trained, params, *args) for path in row.parameter.split(" + ")
    }
    assert found == paths

    def gradient(fn):
        def loss(params):
            leaves = [x for x in jax.tree.leaves(fn(params, *args)) if x.dtype.kind != "i"]
            return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in leaves)

        return jax.jit(jax.grad(loss, allow_int=True))(params)

    exact, found = gradient(apply), gradient(trained)
    assert 0 < distance(found, exact) < 0.3  # 0.01 to 0.03, and 0.23 in a small MobileNet.
    unchanged = training.train_products(apply, {"*": None})
    jax.tree.map(np.testing.assert_array_equal, gradient(unchanged), exact)


# Rules of an optimizer's state, and how far the loss may be above that of float32 states.
STATES = {"8": (training.STATE_8_BIT, 0.005), "4": (training.STATE_4_BIT, 0.015)}


def check_states(train: Callable[[Any, Any, int], tuple[Any, Any]], jit: Any) -> None:
    """Trains with optimizer states in 8 and 4 bits for 50 steps, and compares with float32.

    Args:
        train: of (optimizer, wrapper of the step, steps); returns the loss after them and the state
            of the optimizer. It runs the loop of a library.
        jit: what compiles a step of this library.
    """
    adam = optax.adam(3e-4)
    before, _ = train(adam, jit, 0)
    for bits, wrapper in (("8", jit), ("4", jit), ("8", lambda step: step)):
        rules, bound = STATES[bits]
        plain, full = train(adam, wrapper, 50)
        found, state = train(training.quantized_state(adam, rules), wrapper, 50)
        assert plain < 0.8 * before
        change = found / plain - 1
        assert change != 0
        assert -0.1 < change < bound, (bits, change)
        assert training.state_bytes(state) < 0.4 * training.state_bytes(full)
