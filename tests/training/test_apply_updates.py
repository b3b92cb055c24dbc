"""Parameters in 16 bits, updated with stochastic rounding."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from jaxquant.training import apply_updates

KEY = jax.random.key(0)
NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
each_dtype = pytest.mark.parametrize("dtype", NARROW)


@each_dtype
def test_each_parameter_is_a_neighbour_of_the_exact_sum_and_their_mean_is_the_sum(dtype):
    random = np.random.default_rng(0)
    scale = 10.0 ** random.uniform(-4, 2, 64)
    params = jnp.asarray(random.normal(size=64) * scale, dtype)
    updates = jnp.asarray(random.normal(size=64) * scale / 100, jnp.float32)
    draws = jax.jit(jax.vmap(lambda key: apply_updates(params, updates, key)))(
        jax.random.split(KEY, 4096)
    )
    assert draws.dtype == dtype
    exact = np.asarray(params, np.float64) + np.asarray(updates, np.float64)
    nearest = exact.astype(NARROW[dtype])
    ends = [np.nextafter(nearest, np.array(e, NARROW[dtype])) for e in (-np.inf, np.inf)]
    low, high = (e.astype(np.float64) for e in ends)
    near = nearest.astype(np.float64)
    low, high = np.where(near > exact, low, near), np.where(near > exact, near, high)
    found = np.asarray(draws, np.float64)
    assert np.all((found == low) | (found == high))
    deviation = (high - low) / np.sqrt(4 * 4096)
    assert np.all(np.abs(found.mean(0) - exact) < 5 * deviation)


def test_many_small_updates_add_up():
    params = jnp.ones((64, 64), jnp.bfloat16)
    update = jnp.full((64, 64), 1e-4)

    def step(params, key):
        return apply_updates(params, update, key), None

    found = jax.lax.scan(step, params, jax.random.split(KEY, 1000))[0]
    assert abs(np.asarray(found, np.float32).mean() - 1.1) < 2e-3
    assert np.all(params + update.astype(jnp.bfloat16) == 1)


def test_numbers_of_the_dtype_are_kept():
    values = [0.0, -0.0, 1.0, -3.25, 2e-36, -1e-35, np.nan, np.inf, -np.inf, 3e38]
    params = jnp.asarray(values, jnp.bfloat16)
    for seed in range(8):
        found = apply_updates(params, jnp.zeros(len(values)), jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(params, np.float32))


def test_tiny_numbers_stay_finite_and_unbiased():
    params = jnp.full(4096, 1e-37, jnp.bfloat16)
    found = apply_updates(params, jnp.full(4096, 3e-38), KEY)
    assert abs(np.asarray(found, np.float64).mean() / 1.3e-37 - 1) < 0.01


def test_other_parameters_are_those_of_optax():
    params = {"a": jnp.ones(3), "b": jnp.arange(3), "c": None}
    updates = {"a": jnp.full(3, 1e-3), "b": jnp.ones(3, jnp.int32), "c": None}
    found, expected = apply_updates(params, updates, KEY), optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params)
    kept = jnp.ones(2, jnp.bfloat16)
    assert apply_updates({"w": kept}, {"w": None}, KEY)["w"] is kept


def test_keys_and_places_decide():
    params = dict.fromkeys("ab", jnp.ones(512, jnp.bfloat16))
    updates = dict.fromkeys("ab", jnp.full(512, 1e-3))
    first, second = (apply_updates(params, updates, jax.random.key(i)) for i in range(2))
    assert np.any(first["a"] != first["b"])
    assert np.any(first["a"] != second["a"])


def test_an_adam_without_float32_weights_learns_as_one_with_them():
    """Rounded to nearest, bfloat16 weights stop where updates are too small for them."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(256, 32)), jnp.float32)
    y = x @ jnp.asarray(random.normal(size=(32, 4)), jnp.float32)
    adam = optax.adam(1e-3)

    def loss(w):
        return jnp.mean((x @ w.astype(jnp.float32) - y) ** 2)

    def train(dtype, apply):
        def step(carry, key):
            w, state = carry
            gradient = jax.grad(loss)(w).astype(jnp.float32)
            updates, state = adam.update(gradient, state)
            return (apply(w, updates, key), state), None

        w = jnp.zeros((32, 4), dtype)
        state = adam.init(w.astype(jnp.float32))
        run = jax.jit(lambda c: jax.lax.scan(step, c, jax.random.split(KEY, 1000))[0][0])
        return float(loss(run((w, state))))

    def nearest(w, updates, key):
        return (w.astype(jnp.float32) + updates).astype(w.dtype)

    with jax.numpy_dtype_promotion("standard"):
        plain = train(jnp.float32, nearest)
        stochastic = train(jnp.bfloat16, apply_updates)
        rounded = train(jnp.bfloat16, nearest)
    assert abs(stochastic - plain) < 0.05 * plain
    assert rounded > 2 * plain
