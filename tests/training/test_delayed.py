"""Delayed scaling against its definition, in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jaxquant import training
from jaxquant.training import FP8_TRAINING, DelayedScaling
from jaxquant.training.amax import amax_of, push_amax

NAMES = ("lhs", "rhs", "gradient")
SHAPES = [(5, 6), (6, 4), (5, 4)]


def cast(x, limit, dtype):
    """x cast to a format and back, by ml_dtypes, with `limit` at the largest of them."""
    largest = float(ml_dtypes.finfo(dtype).max)
    scale = np.float32(limit) / np.float32(largest)
    codes = np.clip(np.asarray(x, np.float32) / scale, -largest, largest).astype(dtype)
    return codes.astype(np.float64) * scale


@pytest.mark.slow
@pytest.mark.parametrize("margin", [0, 1])
def test_ranges_follow_the_history_in_each_step(margin):
    """Growing, shrinking, zero and non-finite operands."""
    random = np.random.default_rng(0)
    scaling, histories = DelayedScaling.init(3, margin), {name: [0.0] * 3 for name in NAMES}
    product = jax.jit(
        lambda x, y, gradient, scaling: [
            *(
                pair := jax.vjp(
                    lambda x, y, s: training.matmul(x, y, config=FP8_TRAINING, scaling=s),
                    x,
                    y,
                    scaling,
                )
            )[:1],
            *pair[1](gradient),
        ]
    )
    sizes = [1.0, 30.0, 0.01, 0.0, 2.0, np.nan, 0.5, np.inf, 0.1, 0.1]
    for step, size in enumerate(sizes):
        operands = {
            name: random.normal(size=shape).astype(np.float32) * factor
            for name, shape, factor in zip(
                NAMES, [(5, 6), (6, 4), (5, 4)], (1, 7, 0.3), strict=True
            )
        }
        for name in NAMES:  # A single element.
            operands[name] *= size if np.isfinite(size) else 1
            operands[name][1, 2] = size if not np.isfinite(size) else operands[name][1, 2]
        *found, seen = product(*operands.values(), scaling)
        if np.isfinite(size):
            values = []
            for name, dtype in zip(NAMES, ["float8_e4m3fn"] * 2 + ["float8_e5m2"], strict=True):
                limit = max(histories[name]) or np.abs(operands[name]).max() or 1
                dtype = getattr(ml_dtypes, dtype)
                values.append(cast(operands[name], limit * 2.0**margin, dtype))
            lhs, rhs, gradient = values
            expected = lhs @ rhs, gradient @ rhs.T, lhs.T @ gradient
            for result, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(
                    result, wanted, rtol=1e-4, atol=1e-5 * size, err_msg=str(step)
                )
        else:
            assert all(np.all(np.isnan(result)) for result in found)
        scaling = training.update_scaling(scaling, seen)
        for name in NAMES:
            amax = np.abs(operands[name]).max()
            histories[name] = [amax if np.isfinite(amax) else 0.0, *histories[name][:-1]]
            np.testing.assert_array_equal(getattr(scaling, name), histories[name])


def test_a_state_used_twice_sums_both_amax():
    x, y = jnp.array([[1.0, -3.0]]), jnp.array([[0.5], [0.25]])

    def twice(scaling):
        products = (training.matmul(a, y, config=FP8_TRAINING, scaling=scaling) for a in (x, 2 * x))
        return sum(jnp.sum(p) for p in products)

    seen = jax.grad(twice)(DelayedScaling.init(2))
    np.testing.assert_array_equal(seen.lhs, [9, 0])
    np.testing.assert_array_equal(seen.rhs, [1, 0])
    np.testing.assert_array_equal(seen.gradient, [2, 0])


def test_stacked_states_are_updated_separately():
    history = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = push_amax(history, jnp.array([7.0, jnp.nan]))
    np.testing.assert_array_equal(found, [[7, 1, 2], [0, 4, 5]])
    stack = DelayedScaling(history, history, history, margin=2)
    seen = DelayedScaling(*([jnp.array([[8.0, 0, 0], [9.0, 0, 0]])] * 3), margin=2)
    moved = training.update_scaling({"w": jnp.ones(2), "s": stack}, {"w": jnp.ones(2), "s": seen})
    np.testing.assert_array_equal(moved["s"].rhs, [[8, 1, 2], [9, 4, 5]])
    np.testing.assert_array_equal(moved["w"], [1, 1])
    assert moved["s"].margin == 2


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_amax_is_inf_if_a_single_element_is_not_finite(value):
    """XLA's CPU backend drops NaN in a maximum of many."""
    x = jnp.zeros(5000, jnp.bfloat16).at[2500].set(value).at[-1].set(7)
    assert jax.jit(amax_of)(x) == jnp.inf
    assert amax_of(x.at[2500].set(-8)) == 8
    assert amax_of(x[:0]) == 0
    assert amax_of(x).dtype == jnp.float32


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax mixes dtypes.
def test_skip_scaling_hides_states_from_the_optimizer():
    params: Any = {"w": jnp.array([3.0, 4.0]), "s": [DelayedScaling.init(2), None]}
    seen = DelayedScaling(*([jnp.array([1e6, 0.0])] * 3))
    gradients = {"w": jnp.array([0.6, 0.8]), "s": [seen, None]}
    plain = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-1, weight_decay=0.1))
    optimizer = optax.chain(training.skip_scaling(plain), optax.scale(2.0))
    state = optimizer.init(params)
    assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(plain.init(params["w"])))
    updates: Any = jax.jit(optimizer.update)(gradients, state, params)[0]
    expected: Any
    expected, _ = plain.update(gradients["w"], plain.init(params["w"]), params["w"])
    np.testing.assert_allclose(updates["w"], 2 * expected, rtol=1e-6)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    moved: Any = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["s"][0].lhs, [0, 0])
    np.testing.assert_array_equal(training.update_scaling(moved, gradients)["s"][0].lhs, [1e6, 0])

    def by_params(updates, state, params=None):
        return jax.tree.map(
            lambda u: u * sum(map(jnp.sum, jax.tree.leaves(params))), updates
        ), state

    alone = training.skip_scaling(optax.GradientTransformation(lambda params: (), by_params))
    seeing: Any = {**params, "s": [seen, None]}
    turned: Any = alone.update(gradients, (), seeing)[0]
    np.testing.assert_allclose(turned["w"], [4.2, 5.6], rtol=1e-6)
    turned = training.skip_scaling(optax.scale(-1.0)).update(gradients, optax.ScaleState())[0]
    np.testing.assert_allclose(turned["w"], [-0.6, -0.8])


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match=r"length must be a positive.*got 0"):
        DelayedScaling.init(0)
    with pytest.raises(ValueError, match=r"contains DelayedScaling; got PyTreeDef.*'w'"):
        training.update_scaling({"w": jnp.ones(2)}, {"w": jnp.ones(2)})
    with pytest.raises(
        ValueError, match=r"optax.GradientTransformation.*pass its .gradient_transf"
    ):
        training.skip_scaling(optax.MultiSteps(optax.sgd(0.1), 2))  # pyright: ignore[reportArgumentType] (the wrong type)
