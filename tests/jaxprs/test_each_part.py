"""Results of which each device computes its part, in programs that XLA partitions."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxquant.jaxprs import names_parts, on_each_cpu, on_each_part

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32))


def sums(x, times=1.0):
    """Sums of rows by the devices that hold parts of them; NaN where there are none."""

    def divide(mesh, specs):
        ((rows, columns),) = specs

        def part(x):
            out = times * x.sum(1)
            return jax.lax.psum(out, columns) if columns else out

        return [(rows, columns)], (rows,), part

    result = jax.ShapeDtypeStruct(x.shape[:1], x.dtype)

    def parts(x):
        return on_each_part(result, divide, ([["m", "k"]], ["m"]), f"sums {times}", x)

    def nan(x):
        return jnp.full(result.shape, jnp.nan)

    return on_each_cpu(nan, parts, nan, x)


def mesh(*lengths):
    names = ("a", "b")[: len(lengths)]
    return jax.make_mesh(lengths, names, axis_types=(AxisType.Auto,) * len(names))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("on", "spec"),
    [
        (mesh(2), jax.P("a")),
        (mesh(8), jax.P(None, "a")),
        (mesh(2, 4), jax.P("a", "b")),
        (mesh(4, 2), jax.P("b", "a")),
        (mesh(2, 2), jax.P(None, ("b", "a"))),
        (mesh(3), jax.P("a")),
        (mesh(5), jax.P()),
    ],
    ids=str,
)
def test_each_device_sums_its_part_whatever_the_mesh(on, spec):
    x = jax.device_put(X, jax.NamedSharding(on, spec))
    np.testing.assert_allclose(jax.jit(sums)(x), X.sum(1), rtol=1e-5)


def test_one_device_and_numbers_with_different_factors_have_no_parts():
    assert np.isnan(jax.jit(sums)(X)).all()
    x = jax.device_put(X, jax.NamedSharding(mesh(6), jax.P("a")))
    assert np.isnan(jax.jit(sums)(x)).all()
    found = [count for count in range(33) if names_parts(count)]
    assert found == [2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29, 31, 32]


def test_programs_of_other_functions_differ_by_their_keys():
    x = jax.device_put(X, jax.NamedSharding(mesh(2), jax.P("a")))

    def text(times):
        # Without the address of the function.
        lowered = jax.jit(partial(sums, times=times)).lower(x).as_text()
        return re.sub(r'backend_config = "\d+"', "", lowered)

    assert text(1.0) == text(1.0)
    assert text(1.0) != text(2.0)


def test_parts_have_64_bits_where_the_program_was_traced_so():
    with jax.enable_x64(True):
        x = jax.device_put(np.asarray(X, np.float64), jax.NamedSharding(mesh(8), jax.P(None, "a")))
        found = jax.jit(partial(sums, times=1 / 3))(x)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.asarray(X, np.float64).sum(1) / 3, rtol=1e-13)
