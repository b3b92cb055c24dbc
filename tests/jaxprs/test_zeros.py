"""Which results of a function are zeros."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.jaxprs import zero_results


def test_zeros_are_found_and_nothing_else_is():
    def results(x):
        zeros = jnp.zeros_like(x)
        return {
            "a": zeros,
            "b": jnp.zeros((4, 5), jnp.bfloat16),
            "c": jnp.copy(zeros).astype(jnp.int8),
            "d": jax.jit(jnp.zeros_like)(x),
            "e": jnp.float32(0),
            "f": x,
            "g": jnp.ones_like(x),
            "h": jnp.full(3, np.nan),
            "i": x - x,
            "j": jnp.asarray(np.array([0.0, 1.0], np.float32)),
            "k": jax.jit(lambda x, zero: (zero, x))(x, zeros)[1],
            "l": jax.random.key(0),
            "m": jnp.exp(zeros),
        }

    x = jnp.ones((2, 3))
    for arg in (x, jax.ShapeDtypeStruct(x.shape, x.dtype)):
        found = dict(zip(results(x), zero_results(results, arg), strict=True))
        assert [name for name, is_zero in found.items() if is_zero] == [*"abcde"]


def test_a_jitted_function_returns_zeros_that_it_is_given():
    def results(x):
        return jax.jit(lambda x, zero: (zero, x))(x, jnp.zeros_like(x))

    assert zero_results(results, jnp.ones(3)) == [True, False]
