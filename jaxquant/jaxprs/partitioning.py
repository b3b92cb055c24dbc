"""Whether XLA will partition a traced program among devices."""

import math
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from .params import inner_jaxprs
from .walker import Site, walk

# Parameters of primitives that hold meshes, shardings or tuples of them.
_PLACES = ("in_shardings", "out_shardings", "ctx_mesh", "sharding", "devices", "mesh")


def device_count(program: ClosedJaxpr, args: Any) -> int:
    """How many devices a program runs on, by its arguments, meshes and shardings."""
    placed = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
    for site in walk(program):
        for value in map(site.eqn.params.get, _PLACES):
            placed += value if isinstance(value, tuple | list) else [value]
    return max(map(_device_count, placed), default=1)


# In how many parts devices hold each axis of arrays of a program.
Parts = dict[Any, tuple[int, ...]]


def parts_of_arguments(program: ClosedJaxpr, args: Any) -> Parts:
    """Those of the arguments whose shardings say so."""
    found = {}
    for variable, leaf in zip(program.jaxpr.invars, jax.tree.leaves(args), strict=True):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding):
            padded = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
            found[variable] = tuple(_count(entry, sharding.mesh) for entry in padded)
    return found


def parts_of(variable: Any, known: Parts) -> tuple[int, ...] | None:
    """Those of a variable or a constant; None if they are not known."""
    return known.get(variable) if isinstance(variable, Var) else None


def add_parts(eqn: JaxprEqn, known: Parts) -> Parts:
    """The parts known before an equation, and those of the inputs of its inner jaxprs.

    Call it on each equation in the order of `walk`.
    """
    found = dict(known)
    for jaxpr, operands, _ in inner_jaxprs(eqn):
        for variable, operand in zip(jaxpr.invars, operands, strict=True):
            aval: Any = variable.aval
            parts = parts_of(operand, known)
            found.pop(variable, None)
            if parts is not None:
                # A scan takes slices along the first axis.
                found[variable] = parts[len(parts) - aval.ndim :]
    return found


def _count(entry: Any, mesh: Any) -> int:
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return math.prod(mesh.shape[name] for name in names if name in mesh.shape)


def is_partitioned(site: Site) -> bool:
    """Whether XLA partitions an equation of a program that runs on several devices.

    XLA does not partition inside a `shard_map` over all axes of its mesh.
    """
    maps = _maps(site)
    if not maps:
        return True
    mesh = maps[-1]["mesh"]
    manual = set(mesh.manual_axes).union(*(params["newly_manual_axes"] for params in maps))
    return not manual.issuperset(mesh.axis_names)


def is_mapped(site: Site) -> bool:
    """Whether an equation lies inside a `shard_map`."""
    return bool(_maps(site))


def _maps(site: Site) -> list[Any]:
    return [eqn.params for eqn in site.within if eqn.primitive.name == "shard_map"]


def _device_count(place: Any) -> int:
    """Of a sharding or a mesh; 1 for anything else, such as a sharding that JAX will choose."""
    if isinstance(place, jax.sharding.Sharding):
        return place.num_devices
    return getattr(place, "size", 1) if hasattr(place, "axis_names") else 1
