"""Casts to float8 with delayed scaling, against ml_dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant import training
from jaxquant.training import fake_cast

E4M3 = ml_dtypes.float8_e4m3fn
E5M2 = ml_dtypes.float8_e5m2


def rounded(x, scale, dtype):
    """x cast to a format and back, by ml_dtypes."""
    largest = float(ml_dtypes.finfo(dtype).max)
    codes = np.clip(np.asarray(x, np.float32) / np.float32(scale), -largest, largest).astype(dtype)
    return codes.astype(np.float32) * np.float32(scale)


def scaling(scale=1.0, history=()):
    return jnp.float32(scale), jnp.zeros(8).at[: len(history)].set(jnp.array(history))


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_an_empty_history_falls_back_to_the_scale_of_the_array(size):
    x = size * np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    found = fake_cast.cast_operand(x, *scaling())
    wanted = rounded(x, np.abs(x).max() / np.float32(448), E4M3)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert np.linalg.norm(found - x) < 0.04 * np.linalg.norm(x)


@pytest.mark.slow
def test_the_stored_scale_is_used_and_casts_saturate():
    x = jnp.array([0.3, -500.0, 1.0, 2.0])
    found = fake_cast.cast_operand(x, *scaling(0.5, [3.0]))
    np.testing.assert_array_equal(found, rounded(x, 0.5, E4M3))
    assert found[1] == -224
    broken = fake_cast.cast_operand(jnp.array([np.nan, np.inf, 1.0]), *scaling(0.5, [3.0]))
    np.testing.assert_array_equal(jnp.isfinite(broken), [False, False, True])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_slots_return_the_next_scale_and_history(dtype):
    x = jnp.array([0.25, -7.0], dtype)
    scale, history = scaling(0.125, [3.0, 9.0])
    _, pull = jax.vjp(fake_cast.cast_operand, x, scale, history)
    gradient, next_scale, next_history = pull(jnp.array([2.0, 5.0], dtype))
    assert gradient.dtype == x.dtype
    np.testing.assert_array_equal(gradient, jnp.array([2.0, 5.0], dtype))
    np.testing.assert_array_equal(next_history, [7, 3, 9, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(next_scale, 9 / 448, rtol=1e-6)
    full = (scale, jnp.arange(8.0, 0, -1))
    assert jax.vjp(fake_cast.cast_operand, x, *full)[1](x)[2].tolist() == [7, 8, 7, 6, 5, 4, 3, 2]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_zero_and_non_finite_arrays_leave_the_scale_unchanged(value):
    # Among many finite elements: there a maximum on XLA's CPU backend drops NaN.
    x = jnp.full(5000, value).at[:2500].set(0)
    x = x if value == 0 else x.at[-1].set(7)
    scale, history = fake_cast.next_scaling(x, *scaling(0.125), fake_cast.FORWARD)
    assert float(scale) == 0.125
    assert not np.any(history)


@pytest.mark.slow
def test_gradients_are_cast_to_e5m2():
    y = jnp.arange(4.0)
    upstream = jnp.array([1e-6, 3.3e-6, -7e-6, 0.0])
    found, pull = jax.vjp(fake_cast.cast_gradient, y, *scaling())
    np.testing.assert_array_equal(found, y)
    gradient, next_scale, next_history = pull(upstream)
    step = np.float32(7e-6) / np.float32(57344)
    np.testing.assert_allclose(gradient, rounded(upstream, step, E5M2), rtol=1e-6)
    np.testing.assert_allclose(next_scale, step, rtol=1e-6)
    assert next_history[0] == np.float32(7e-6)


def test_jit_compiles_once():
    compiled: Any = jax.jit(jax.grad(lambda *x: fake_cast.cast_operand(*x).sum(), (0, 1, 2)))
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (4, 5))
        compiled(x, *scaling(1.0, [float(seed)]))
    assert compiled._cache_size() == 1


@pytest.mark.slow
def test_both_forms_of_delayed_scaling_compute_the_same():
    """`DelayedScaling` holds histories only, Keras also a scale: products agree in each step."""
    random = np.random.default_rng(0)
    state = training.DelayedScaling.init(3)
    pairs = {"lhs": scaling(), "rhs": scaling()}
    pairs = {name: (scale, history[:3]) for name, (scale, history) in pairs.items()}
    for size in (1.0, 30.0, 0.01, 0.0, 2.0):
        lhs, rhs = (
            jnp.asarray(random.normal(size=s) * size, jnp.float32) for s in ((5, 6), (6, 4))
        )

        def product(lhs, rhs, state):
            return training.matmul(lhs, rhs, config=training.FP8_TRAINING, scaling=state)

        out, pull = jax.vjp(product, lhs, rhs, state)
        casts = [fake_cast.cast_operand(x, *pairs[n]) for n, x in (("lhs", lhs), ("rhs", rhs))]
        np.testing.assert_allclose(out, casts[0] @ casts[1], rtol=1e-5, atol=1e-5 * size**2)
        state = state.update(pull(out)[2])
        for name, x in (("lhs", lhs), ("rhs", rhs)):
            pairs[name] = fake_cast.next_scaling(x, *pairs[name], fake_cast.FORWARD)
            np.testing.assert_array_equal(pairs[name][1], getattr(state, name))
