"""Parts of programs that compute each element by itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.jaxprs import elementwise_parts, remaining_program, run_program

SHAPE = (6, 4)


@jax.jit
def clipped(x, limit):
    return jnp.where(jnp.abs(x) > limit + 1, limit, x)


WEIGHTS = np.linspace(1, 2, 24, dtype=np.float32).reshape(SHAPE)


@jax.jit
def weighted(x):
    """With a constant of the shape of the arrays."""
    return x * WEIGHTS


def update(g, m, v, p, other):
    """Like an optimizer: m and v depend on g, whose norm is computed before."""
    g = g / jnp.maximum(jnp.linalg.norm(g), 1)
    m = 0.9 * m + 0.1 * clipped(weighted(g), other[0] * 2)
    v = jnp.full_like(v, 0.5) * v + jnp.square(g)
    ratio = jnp.sum(p * p) / jnp.sum(m * m)
    return m / jnp.sqrt(v), v, m, ratio * m, m.T, g, other + 1


def arguments():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(4)]
    return *(x if i != 2 else jnp.abs(x) for i, x in enumerate(arrays)), jnp.arange(3.0)


def test_parts_and_the_rest_give_the_results_of_the_program():
    given: Any = arguments()
    program = jax.make_jaxpr(update)(*given)
    parts = elementwise_parts(program, [1, 2])
    # Results that share an input; the norms, the transpose and what depends on neither are left.
    assert [part.places for part in parts] == [(0, 1, 2, 3)]
    (part,) = parts
    assert part.shape == SHAPE
    assert part.dtypes == [jnp.float32] * 4
    rest, places, computed = remaining_program(program, parts)
    found = run_program(rest, [given[i] for i in places])
    known = dict(zip(program.jaxpr.invars, given, strict=True))
    known |= dict(zip(computed, found, strict=False))
    arrays, scalars = ([known[v] for v in vs] for vs in (part.arrays, part.scalars))
    expected = update(*given)
    for results in (part.compute(arrays, scalars), jax.jit(part.compute)(arrays, scalars)):
        for place, x in zip(part.places, results, strict=True):
            np.testing.assert_allclose(x, expected[place], rtol=1e-6)
    others = [i for i in range(len(expected)) if i not in part.places]
    for place, x in zip(others, found[len(computed) :], strict=True):
        np.testing.assert_allclose(x, expected[place], rtol=1e-6)


def test_results_of_separate_inputs_are_separate_parts():
    """A row for each row, sums along an axis and inputs are no elementwise results."""

    def both(a, b, c):
        return a + 1, b * 2, jnp.exp(a), c[:, None] + b, jnp.cumsum(a, 0), a

    program = jax.make_jaxpr(both)(*arguments()[:2], jnp.ones(6))
    parts = elementwise_parts(program, [0, 1])
    assert [part.places for part in parts] == [(1,), (0, 2)]
