"""What the types of traced arrays say of their sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxquant.jaxprs import (
    before_transpose,
    explicit_mesh,
    is_sharded,
    reshard_like,
    sharding_for,
    vary_alike,
    varying_axes,
)

X = np.arange(24.0, dtype=np.float32).reshape(4, 6)


def mesh(kind=AxisType.Explicit):
    return jax.make_mesh((2,), ("a",), axis_types=(kind,))


@pytest.mark.parametrize("spec", [jax.P("a", None, None), jax.P(None, None, "a"), jax.P("a")])
def test_the_sharding_before_a_transpose_becomes_that_of_the_result(spec):
    permutation = (2, 0, 1)
    x = jnp.ones((4, 6, 2))

    def run(x, wanted):
        return jax.sharding.reshard(x, wanted).transpose(permutation)

    with jax.set_mesh(mesh()):
        out = jax.jit(run, static_argnums=1)(x, before_transpose(spec, permutation))
    assert tuple(jax.typeof(out).sharding.spec) == (*spec, *[None] * (3 - len(spec)))
    named = jax.NamedSharding(mesh(), spec)
    found = before_transpose(named, permutation)
    assert isinstance(found, jax.NamedSharding)
    assert (found.mesh, found.spec) == (named.mesh, before_transpose(spec, permutation))
    assert before_transpose(None, permutation) is None


def test_what_broadcasts_with_a_result_is_sharded_like_it():
    with jax.set_mesh(mesh()):
        for spec in (jax.P("a", None), jax.P(None, "a")):
            for shape in ((4, 1), (1, 6), (4, 6)):
                out = jax.jit(reshard_like, static_argnums=1)(jnp.ones(shape), spec)
                wanted = [a if n > 1 else None for a, n in zip(spec, shape, strict=True)]
                assert list(jax.typeof(out).sharding.spec) == wanted
        named = jax.NamedSharding(mesh(), jax.P("a", None))
        out = jax.jit(lambda x: reshard_like(x, named))(jnp.ones((4, 1)))
    assert jax.typeof(out).sharding.spec == jax.P("a", None)
    x = jnp.ones(3)
    assert reshard_like(x, None) is x


def test_only_explicit_axes_are_in_the_type():
    seen = []

    @jax.jit
    def run(x):
        seen.append((is_sharded(x), explicit_mesh(X, x) is not None))
        return x

    for kind, spec in (("Explicit", jax.P("a")), ("Explicit", jax.P()), ("Auto", jax.P("a"))):
        run(jax.device_put(X, jax.NamedSharding(mesh(AxisType[kind]), spec)))
    assert seen == [(True, True), (False, False), (False, False)]


def test_arrays_vary_along_the_axes_that_any_of_them_varies_along():
    seen = []

    def run(x, y):
        seen.append([varying_axes(x), varying_axes(y)])
        both = vary_alike([x, y])
        seen.append([varying_axes(array) for array in both])
        return both[0] + both[1]

    jax.shard_map(
        run, mesh=mesh(AxisType.Auto), in_specs=(jax.P("a"), jax.P()), out_specs=jax.P("a")
    )(X, X[:2])
    assert seen == [[{"a"}, set()], [{"a"}, {"a"}]]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharding_for_another_shape_leaves_out_what_devices_cannot_share(kind):
    sharding = jax.NamedSharding(mesh(kind), jax.P(None, "a"))
    x = jax.device_put(X, sharding)
    assert sharding_for((4, 8), x) == sharding
    for shape in ((4, 1), (4, 3)):
        found = sharding_for(shape, x)
        assert found is not None
        assert found.spec == jax.P(None, None)
    assert sharding_for((4, 6), jnp.asarray(X)) is None
    of_rows = jax.device_put(X, jax.NamedSharding(mesh(kind), jax.P("a")))
    short = sharding_for((4, 3), of_rows)
    assert short is not None
    assert short.spec == jax.P("a", None)
    found = []
    with jax.set_mesh(mesh(kind)):
        jax.jit(lambda x: found.append(sharding_for((4, 8), x)))(x)
    assert [s and s.spec for s in found] == [sharding.spec if kind == AxisType.Explicit else None]
