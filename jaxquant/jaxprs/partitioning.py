"""Whether XLA will partition a traced program among devices."""

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

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
