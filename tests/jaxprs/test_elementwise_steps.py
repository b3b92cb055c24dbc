"""Updates that the native kernel computes step by step, beside those of XLA, by operation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant import training
from jaxquant.kernels import cpu

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"
)
SHAPE = (64, 96)

# (gradient, moving average) -> what replaces the moving average.
OPERATIONS: dict[str, Any] = {
    "sum": lambda g, m: g + m,
    "average": lambda g, m: 0.9 * m + (1 - 0.9) * g,
    "difference": lambda g, m: 0.9 * m - 0.1 * g,
    "difference of one product": lambda g, m: g - 0.3 * m,
    "product used twice": lambda g, m: (lambda part: (part + g) * part)(0.3 * m),
    "divided by a scalar": lambda g, m: m / 3 + g,
    "scalar divided": lambda g, m: 1 / (2 + m * m) + g,
    "ratio": lambda g, m: m / (jnp.abs(g) + 0.1),
    "roots": lambda g, m: jnp.sqrt(jnp.abs(m)) + jax.lax.rsqrt(g * g + 0.1),
    "powers": lambda g, m: m**2 + m**3 + g**5 + jnp.square(m) + (g * g + 1) ** -2,
    "signs": lambda g, m: jnp.sign(m) * jnp.abs(g) - m,
    "negated": lambda g, m: -(m + g),
    "limits": lambda g, m: jnp.maximum(m, g) + jnp.minimum(g, 0.5) + jnp.clip(m, -0.1, 0.2),
    "limited scalar": lambda g, m: (
        jax.lax.clamp(jnp.full_like(m, -0.2), jnp.full_like(m, 0.1), m) + jnp.clip(0.1, g, None)
    ),
    "comparisons": lambda g, m: (
        jnp.where(g > m, g, 0.25) + jnp.where(g <= 0.1, 1.0, m) + jnp.where(m >= g, 2.0, g)
    ),
    "ties": lambda g, m: (
        jnp.where(g < g, 5.0, m)
        + jnp.where(m > m, 5.0, g)
        + jnp.where(g <= g, m, 5.0)
        + jnp.where(m >= m, g, 5.0)
    ),
    "logic": lambda g, m: jnp.where((g < 0) & (m < 0) | ~(g != jnp.maximum(g, m)), g, m),
    "finite": lambda g, m: jnp.where(jnp.isfinite(1 / jnp.maximum(g, 0)), g, m),
    "not a number": lambda g, m: jnp.where(jnp.isnan(jnp.sqrt(g)), g, m),
    "equal": lambda g, m: jnp.where(jnp.maximum(m, 0) == 0, g, m),
    "truth": lambda g, m: jnp.maximum(g, 0).astype(bool) * m,
    "bfloat16": lambda g, m: (g.astype(jnp.bfloat16) * 0.3 + 1).astype(jnp.float32) - m,
    "by a scalar of bool": lambda g, m: jnp.where(jnp.sum(g) > 0, m, g),
    "jitted": lambda g, m: jax.jit(lambda a, b: (a + b, a * 2))(g, m)[1] + m,
    "itself": lambda g, m: m,
    "constant": lambda g, m: jnp.where(m > g, 0.5, 0.5),
}
LEFT_TO_XLA: dict[str, Any] = {
    "exponential": lambda g, m: jnp.exp(m) - g,
    "float16": lambda g, m: (m + g).astype(jnp.float16).astype(jnp.float32),
    "three cases": lambda g, m: jax.lax.select_n((m > g).astype(int) + (g > 0), g, m, g * 2),
    "power": lambda g, m: jnp.abs(m) ** 0.3 + g,
    "high power": lambda g, m: m**9 + g,
    "many steps": lambda g, m: many(g, m),
}


def many(g, m):
    for i in range(300):
        m = m * (1 + 1e-4 * i) + g
    return m


def optimizer_of(fn, of_average=lambda g, m: (g - m).astype(g.dtype)):
    """The new average is fn of the gradient and the old one; updates depend on the new one."""

    def init(params: Any):
        return {"mu": jnp.zeros_like(params)}

    def update(updates, state: Any, params=None):
        del params
        mu = fn(updates, state["mu"])
        return of_average(updates, mu), {"mu": mu}

    return training.quantized_state(optax.GradientTransformation(init, update))


def compare(fn, dtype=jnp.float32, **functions):
    """Whether the kernel runs, after a step beside XLA's."""
    rng = np.random.default_rng(0)
    first, second = (jnp.asarray(rng.normal(size=SHAPE), dtype) for _ in range(2))
    start = optimizer_of(lambda g, m: (g + m).astype(jnp.float32))
    optimizer: Any = optimizer_of(fn, **functions)
    with jax.numpy_dtype_promotion("standard"):
        state = start.update(first, start.init(jnp.zeros(SHAPE)))[1]
        step = jax.jit(optimizer.update)
        found, expected = step(second, state), optimizer.update(second, state)
        text = step.lower(second, state).as_text()
    assert found[0].dtype == expected[0].dtype == dtype
    rounding = 2e-5 if dtype == jnp.float32 else 2**-7
    updates, others = (np.float32(x[0]) for x in (found, expected))
    np.testing.assert_allclose(updates, others, rounding, rounding)
    codes, exact = (x[1].inner["mu"].q for x in (found, expected))
    np.testing.assert_allclose(codes.scale, exact.scale, rtol=rounding)
    if dtype == jnp.float32:
        assert np.mean(np.asarray(codes.codes) != np.asarray(exact.codes)) <= 2e-4
    return "jaxquant_update_blocks" in text


@pytest.mark.some_rows(6)
@pytest.mark.parametrize("name", OPERATIONS)
def test_steps_are_those_of_xla(name):
    assert compare(OPERATIONS[name])


@pytest.mark.parametrize("name", LEFT_TO_XLA)
def test_other_operations_are_left_to_xla(name):
    assert not compare(LEFT_TO_XLA[name])


@pytest.mark.parametrize("name", ["average", "signs", "limits", "difference of one product"])
def test_gradients_may_be_bfloat16(name):
    assert compare(lambda g, m: OPERATIONS[name](g, m).astype(jnp.float32), jnp.bfloat16)


def test_one_row_may_be_several_results():
    assert compare(OPERATIONS["sum"], of_average=lambda g, m: m)


def test_arrays_of_bool_are_read():
    mask = jnp.asarray(np.random.default_rng(2).random(SHAPE) < 0.5)
    assert compare(lambda g, m: jnp.where(mask, g, m))
