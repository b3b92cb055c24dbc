"""Whether XLA partitions a program is known before it is lowered."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType

from jaxquant.jaxprs import device_count, is_partitioned, lowering, walk

X = jnp.ones(8)


def mesh(shape=(2,), names=("a",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


ON_TWO = jax.NamedSharding(mesh(), jax.P("a"))
REPLICATED = jax.NamedSharding(mesh(), jax.P())
SQUARE = mesh((2, 1), ("a", "b"))


def probe(seen):
    """A function of an array that says whether XLA partitions it, when it is lowered."""

    def select(context):
        seen.append(lowering._is_partitioned_program(context))
        return 0

    return lambda x: lowering.lowering_switch((jnp.sin,), select, x)


def mapped(run, on=ON_TWO.mesh, names=("a",)):
    spec = jax.P("a")
    return jax.shard_map(run, mesh=on, axis_names=set(names), in_specs=spec, out_specs=spec)


# Name: (function of the probe, argument).
PROGRAMS = {
    "one device": (lambda run: run, X),
    "sharded": (lambda run: run, jax.device_put(X, ON_TWO)),
    "replicated": (lambda run: run, jax.device_put(X, REPLICATED)),
    "a shape": (lambda run: run, jax.ShapeDtypeStruct((8,), jnp.float32, sharding=ON_TWO)),
    "constraint": (lambda run: lambda x: run(lax.with_sharding_constraint(x, ON_TWO)), X),
    "device_put": (lambda run: lambda x: run(jax.device_put(x, ON_TWO)), X),
    "in_shardings": (lambda run: jax.jit(run, in_shardings=ON_TWO), X),
    "out_shardings": (lambda run: jax.jit(run, out_shardings=ON_TWO), X),
    "shard_map": (mapped, X),
    "shard_map elsewhere": (lambda run: lambda x: run(x) + mapped(jnp.sin)(x), X),
    "shard_map over one of two axes": (lambda run: mapped(run, SQUARE), X),
    "shard_map over two axes": (lambda run: mapped(run, SQUARE, ["a", "b"]), X),
    "shard_map in a loop": (
        lambda run: lambda x: lax.fori_loop(0, 2, lambda _, x: mapped(run)(x), x),
        X,
    ),
    "jit in shard_map": (lambda run: mapped(jax.jit(run)), X),
}


def is_probe_partitioned(function, x):
    program = jax.make_jaxpr(function)(x)
    (site,) = (s for s in walk(program) if s.eqn.primitive.name == "lowering_switch")
    return device_count(program, x) > 1 and is_partitioned(site)


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_is_known_as_the_lowering_knows_it(name):
    make, x = PROGRAMS[name]
    seen = []
    function = make(probe(seen))
    found = is_probe_partitioned(jax.jit(function), x)
    jax.jit(function).lower(x)
    assert [found] == seen


def test_the_mesh_of_the_context_counts():
    seen = []
    with jax.set_mesh(mesh()):
        found = is_probe_partitioned(jax.jit(probe(seen)), X)
        jax.jit(probe(seen)).lower(X)
    assert [found] == seen == [True]
