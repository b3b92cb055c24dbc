"""Functions that each device runs on its part of the arrays, where XLA partitions the program."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir

Specs = list[tuple[Any, ...]]
# (mesh, specs of the arrays) -> (specs of the parts, spec of the result, function of the parts).
Divide = Callable[[Any, Specs], tuple[Specs, tuple[Any, ...], Callable[..., jax.Array]]]


def on_each_part(
    result: jax.ShapeDtypeStruct,
    divide: Divide,
    factors: tuple[Sequence[Sequence[str]], Sequence[str]],
    key: str,
    *args: jax.Array,
) -> jax.Array:
    """A result of which each device computes its part, in a program that `has_parts`.

    Args:
        result: its shape and floating dtype.
        divide: called when XLA partitions the program, with one entry per axis: how the arrays are
            divided then. XLA divides them as the specs say that it returns.
        factors: names for the axes of each array, and of the result. XLA divides axes of equal
            names alike where nothing else says how.
        key: equal only for functions `divide` that do the same with equal arrays.
        args: arrays.
    """
    of_args, of_result = factors
    # JAX's persistent cache of compiled programs knows `divide` by its address alone, which another
    # function may get later, in this process or the next. So the key is part of the program.
    words = np.frombuffer(hashlib.sha256(key.encode()).digest(), np.uint32)[:2]
    marks = [jnp.full(1, word) for word in words]
    rule = ", ".join(["mark0", "mark1", *map(" ".join, of_args)]) + " -> " + " ".join(of_result)
    return _each_part_p.bind(*marks, *args, result=result, divide=divide, rule=rule)


def has_parts(context: mlir.LoweringRuleContext) -> bool:
    """Whether XLA partitions a whole program in a way that specs can describe.

    Inside `shard_map` XLA partitions along some axes of the mesh only.
    """
    count = getattr(context.module_context.axis_context, "num_devices", 1)
    return names_parts(count) and count <= cpu_count()


def cpu_count() -> int:
    """The number of CPU devices; 0 if `JAX_PLATFORMS` leaves them out."""
    try:
        return jax.device_count("cpu")
    except RuntimeError:
        return 0


def names_parts(count: int) -> bool:
    """Whether names of axes describe every way in which so many devices divide an array.

    Programs are lowered without a mesh. Axes of the prime factors of the number of devices make up
    those of any mesh, if the factors are equal: 6 devices may be 2 x 3 or 3 x 2.
    """
    return count > 1 and len(set(_factors(count))) == 1


def _factors(count: int) -> list[int]:
    """Prime factors, in ascending order."""
    least = next((n for n in range(2, math.isqrt(count) + 1) if count % n == 0), count)
    return [least, *_factors(count // least)] if count > 1 else []


def _mesh(count: int) -> jax.sharding.Mesh:
    """Which devices it has does not matter: partitioned programs refer to them by number."""
    factors = _factors(count)
    devices = np.array(jax.devices("cpu")[:count]).reshape(factors)
    return jax.sharding.Mesh(devices, [f"part{i}" for i in range(len(factors))])


_NO_MESH = jax.sharding.AbstractMesh((), ())
_each_part_p = Primitive("each_part")


@_each_part_p.def_abstract_eval
def _(*_: Any, result: jax.ShapeDtypeStruct, divide: Divide, rule: str) -> Any:
    (out,) = jax.make_jaxpr(lambda: jnp.zeros(result.shape, result.dtype))().out_avals
    return out


def _lower(
    context: mlir.LoweringRuleContext,
    *args: Any,
    result: jax.ShapeDtypeStruct,
    divide: Divide,
    rule: str,
) -> Any:
    # JAX asks it for a function of whole arrays, which may not hold constants, as kernels do.
    function = custom_partitioning(lambda *_: jnp.full(result.shape, jnp.nan, result.dtype))
    # XLA calls `partition` outside of the contexts of this thread.
    has_64_bits = jax.enable_x64.value

    def parts(mesh, shapes):
        _, _, *arrays = shapes
        specs = [(*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec))) for x in arrays]
        return divide(mesh, specs)

    def partition(mesh, shapes, _):
        of_parts, of_result, run = parts(mesh, shapes)
        specs = (None,), (None,), *of_parts, of_result
        named = [jax.NamedSharding(mesh, jax.P(*spec)) for spec in specs]

        def of_parts_in_context(_mark0, _mark1, *given):
            # In a mesh with explicit axes, the newest JAX would constrain the parts to shardings.
            with jax.enable_x64(has_64_bits), jax.sharding.use_abstract_mesh(_NO_MESH):
                return run(*given)

        return mesh, of_parts_in_context, named[-1], tuple(named[:-1])

    def infer(mesh, shapes, _):
        return jax.NamedSharding(mesh, jax.P(*parts(mesh, shapes)[1]))

    function.def_partition(partition, infer, sharding_rule=rule)
    module = context.module_context
    axes: Any = module.axis_context
    mesh = _mesh(axes.num_devices)
    axes = dataclasses.replace(
        axes,
        device_assignment=tuple(mesh.devices.flat),
        abstract_mesh=mesh.abstract_mesh,
    )
    context = context.replace(module_context=module.replace(axis_context=axes))
    return mlir.lower_fun(function, multiple_results=False)(context, *args)


mlir.register_lowering(_each_part_p, _lower)
