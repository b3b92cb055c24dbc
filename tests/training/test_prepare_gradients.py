"""Gradients of trees in training, against closed forms, and steps of optax."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant import INT4, W4A16_ASYM, W8A8, W8A16, ArrayConfig, QTensor, Scheme
from jaxquant.training import convert, fake_quantize, init_learned, prepare

from .. import oracles
from ..ops.products import assert_product, normal
from .prepared import (
    GROUPED,
    OPERATIONS,
    W4A4,
    K,
    M,
    N,
    X,
    calibrated,
    learn,
    moved,
    operation_case,
    products,
    weights,
)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_passes_gradients_on(name):
    prepared, x, outputs = operation_case(name)

    def loss(tree):
        return sum(jnp.vdot(y, jnp.cos(jnp.arange(y.size))) for y in map(jnp.ravel, tree.values()))

    def surrogate(tree):
        """The same with float weights, in products of floats if inputs stay floats."""
        values: dict[str, Any] = {
            k: fake_quantize(p.weight, p.config, p.axis, p.learned) for k, p in tree.items()
        }
        served = convert(jax.lax.stop_gradient(tree))
        for name, p in tree.items():
            values[name] = _WithValues(served[name], values[name]) if p.inputs else values[name]
        return loss(outputs(values, x))

    got = jax.jit(jax.grad(lambda tree: loss(outputs(tree, x))))(prepared)
    want = jax.jit(jax.grad(surrogate))(prepared)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.any(b)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WithValues(jq.core.TrainedArray):
    """A quantized weight whose gradient goes to floats that are given."""

    q: QTensor
    weight: jax.Array

    def quantize(self):
        return dataclasses.replace(
            self.q, values=self.weight.transpose(self.q.stored_axes(range(self.q.ndim)))
        )


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("scheme", [W8A8, W8A16, W4A16_ASYM], ids=["W8A8", "W8A16", "W4A16_ASYM"])
def test_weights_get_the_gradient_of_the_float_product_and_inputs_theirs(scheme):
    prepared = prepare(weights({"w": scheme}), {"w": scheme})
    cotangent = normal(M, N, seed=9)

    def loss(tree, x):
        return jnp.vdot(jq.matmul(x, tree["w"]), cotangent)

    of_tree, of_x = jax.jit(jax.grad(loss, (0, 1)))(prepared, X)

    met = X if scheme.inputs is None else jq.quantize(X, ArrayConfig(), axis=-1)
    assert_product(of_tree["w"].weight, "mk,mn->kn", met, cotangent)
    assert_product(of_x, "mn,kn->mk", cotangent, convert(prepared)["w"])


def product_with(cotangent, w):
    return jnp.vdot(jq.matmul(X, w), cotangent)


def test_learned_leaves_get_the_gradient_of_lsq():
    config = ArrayConfig(format=INT4, group_size=32)
    prepared = moved(learn(weights({"w": config}), {"w": config}))
    cotangent = normal(M, N, seed=9)

    got = jax.jit(jax.grad(partial(product_with, cotangent)))(prepared["w"])

    weight, step = (np.asarray(a, np.float64) for a in jax.tree.leaves(prepared["w"]))
    of_value = np.asarray(X, np.float64).T @ cotangent
    steps = oracles.repeat_groups(step, weight.shape)
    _, mask, slope, _ = oracles.straight_through(weight, steps, np.zeros(weight.shape), config)
    assert 0 < mask.mean() < 1
    np.testing.assert_allclose(got.weight, of_value * mask, rtol=1e-4, atol=1e-4)
    want = oracles.sum_blocks(of_value * slope, step.shape) / np.sqrt(32 * 7)
    np.testing.assert_allclose(got.learned.scale, want, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [-2, None])
def test_a_calibrated_scale_of_inputs_is_trained_as_a_step(axis):
    scheme = Scheme(ArrayConfig(), ArrayConfig(format=INT4, per_tensor=True))
    prepared = prepare(weights({"w": scheme}), {"w": scheme})["w"]
    step, cotangent = np.float32(0.4), normal(M, N, seed=9)

    of_weight = jax.jit(jax.grad(partial(product_with, cotangent)))

    def gradient(scale):
        return of_weight(calibrated(prepared, jnp.float32(scale)))

    got = gradient(step)

    steps, zeros = np.full((M, K), step), np.zeros((M, K))
    value, mask, slope, _ = oracles.straight_through(np.asarray(X), steps, zeros, scheme.inputs)
    assert 0 < mask.mean() < 1
    of_inputs = cotangent @ oracles.dequantize(convert({"w": prepared})["w"]).T
    want = np.sum(of_inputs * slope) / np.sqrt(K * 7)
    np.testing.assert_allclose(got.inputs.scale, want, rtol=1e-3)
    np.testing.assert_allclose(got.weight, value.T @ cotangent, rtol=1e-4, atol=1e-3)
    # The sign of a step does not count: training may not drive it into NaN.
    np.testing.assert_allclose(gradient(-step).inputs.scale, -want, rtol=1e-3)
    served = convert([calibrated(prepared, jnp.float32(-step))])[0]
    np.testing.assert_array_equal(served.inputs.scale, step)


def test_a_calibrated_zero_point_that_is_floating_is_trained():
    inputs = ArrayConfig(format=INT4, per_tensor=True, symmetric=False, value_range=(-8, 0))
    scheme = Scheme(ArrayConfig(), inputs)
    prepared = prepare(weights({"w": scheme}), {"w": scheme})["w"]
    tree = calibrated(prepared, jnp.float32(0.3), jnp.float32(-1.7))
    cotangent = normal(M, N, seed=9)

    got = jax.jit(jax.grad(partial(product_with, cotangent)))(tree)

    steps, zeros = np.full((M, K), np.float32(0.3)), np.full((M, K), -2.0)
    _, _, *slopes = oracles.straight_through(np.asarray(X), steps, zeros, inputs)
    of_inputs = cotangent @ oracles.dequantize(convert([prepared])[0]).T
    for gradient, slope in zip((got.inputs.scale, got.inputs.zero_point), slopes, strict=True):
        want = np.sum(of_inputs * slope) / np.sqrt(K * 8)
        np.testing.assert_allclose(gradient, want, rtol=1e-3)


def train(tree, steps=40):
    """Fits a product with optax, and gives the losses and the tree."""
    target = jnp.asarray(normal(M, N, seed=7))
    optimizer, traces = optax.adam(1e-2), []

    def loss(tree):
        return jnp.mean((jax.checkpoint(jq.matmul)(X / 16, tree["w"]) - target) ** 2)

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        traces.append(state)
        tree, moments = state
        value, gradient = jax.value_and_grad(loss)(tree)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(tree, updates), moments), value

    state, losses = (tree, optimizer.init(tree)), []
    for _ in range(steps):
        state, value = step(state)
        losses.append(float(value))
    assert len(traces) == 1
    return state[0], losses, loss


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [W4A4, GROUPED], ids=["W4A4", "W4A16 g8 asymmetric"])
def test_optax_trains_a_prepared_tree_and_the_converted_tree_has_the_same_loss(scheme):
    params = weights({"w": scheme})
    start = init_learned(params, {"w": scheme})
    prepared = jax.tree.map(jnp.array, prepare(params, {"w": scheme}, start))

    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        trained, losses, loss = train(prepared)

    assert losses[-1] < 0.7 * losses[0]
    first, last = (jax.tree.leaves(tree) for tree in (start["w"], trained["w"].learned))
    assert len(first) == 2 - scheme.weights.symmetric
    assert all(np.any(a != b) for a, b in zip(first, last, strict=True))
    served, apply = convert(trained), jax.jit(products)
    np.testing.assert_array_equal(apply(trained, X)["w"], apply(served, X)["w"])
    np.testing.assert_allclose(loss(trained), loss(served), rtol=1e-6)


@pytest.mark.slow
def test_shards_of_a_batch_give_the_gradient_of_the_whole():
    prepared = learn(weights({"w": W8A8}), {"w": W8A8})
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(normal(8, K))

    def gradient(tree, x):
        return jax.grad(lambda tree: jnp.sum(jnp.square(jq.matmul(x, tree["w"]))))(tree)

    spec = jax.sharding.PartitionSpec
    # Leaves that all devices have get the sum of the gradients of all.
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(spec(), spec("batch")), out_specs=spec())
    got, want = jax.jit(sharded)(prepared, x), jax.jit(gradient)(prepared, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
