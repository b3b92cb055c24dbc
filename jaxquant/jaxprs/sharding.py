"""Shardings of arrays while they are traced."""

from collections.abc import Callable
from typing import Any

import jax

from ..core import devices_of
from .params import is_tracer

OutSharding = jax.sharding.NamedSharding | jax.P | None


def before_transpose(out_sharding: OutSharding, permutation: tuple[int, ...]) -> OutSharding:
    """The sharding of an array whose transpose by `permutation` has `out_sharding`.

    Raises:
        ValueError: out_sharding is not a sharding.
    """
    if isinstance(out_sharding, jax.sharding.NamedSharding):
        return out_sharding.update(spec=before_transpose(out_sharding.spec, permutation))
    if out_sharding is None:
        return None
    _check_sharding(out_sharding)
    named = dict(enumerate(out_sharding))
    partitions = [named.get(permutation.index(a)) for a in range(len(permutation))]
    return out_sharding.update(partitions=tuple(partitions))


def after_transpose(out_sharding: OutSharding, permutation: tuple[int, ...]) -> OutSharding:
    """The sharding of the transpose by `permutation` of an array that has `out_sharding`."""
    turned = sorted(range(len(permutation)), key=permutation.__getitem__)
    return before_transpose(out_sharding, tuple(turned))


def reshard_like(values: jax.Array, out_sharding: OutSharding) -> jax.Array:
    """Shards an array that broadcasts with a result like the result."""
    if out_sharding is None:
        return values
    spec = out_sharding if isinstance(out_sharding, jax.P) else out_sharding.spec
    named = dict(enumerate(spec))
    partitions = [named.get(a) if n > 1 else None for a, n in enumerate(values.shape)]
    spec = jax.P(*partitions)
    wanted = spec if isinstance(out_sharding, jax.P) else out_sharding.update(spec=spec)
    return jax.sharding.reshard(values, wanted)


def run_with_out_sharding(
    function: Callable[..., Any], out_sharding: OutSharding, *args: jax.Array
) -> Any:
    """`function(*args)` with the results sharded as asked, and XLA to shard what is between.

    Raises:
        ValueError: out_sharding is not a sharding, or names more axes than the result has.
    """
    if out_sharding is None:
        return function(*args)
    _check_sharding(out_sharding)
    is_named = isinstance(out_sharding, jax.sharding.NamedSharding)
    mesh = out_sharding.mesh if is_named else jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(
            f"out_sharding={out_sharding!r} needs a mesh. Pass a NamedSharding, or enter "
            "jax.set_mesh(mesh)."
        )
    run: Any = jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=out_sharding)
    return run(*args)


def _check_sharding(out_sharding: Any) -> None:
    if not isinstance(out_sharding, jax.sharding.NamedSharding | jax.P):
        raise ValueError(
            "out_sharding must be a NamedSharding, a PartitionSpec or None; got "
            f"{out_sharding!r}. Use jax.P, such as jax.P('data', None)."
        )


def names_along(x: jax.Array, axis: int | None) -> set[str]:
    """The explicit axes of a mesh over which an axis of an array, or any for None, is split."""
    spec = tuple(jax.typeof(x).sharding.spec)
    entries = spec if axis is None else spec[axis : axis + 1]
    parts = (e if isinstance(e, tuple) else (e,) for e in entries)
    return {name for part in parts for name in part if isinstance(name, str)}


def without_names(out_sharding: OutSharding, names: set[str]) -> OutSharding:
    """The sharding without the named axes of the mesh."""
    if isinstance(out_sharding, jax.sharding.NamedSharding):
        return out_sharding.update(spec=without_names(out_sharding.spec, names))
    if not isinstance(out_sharding, jax.P):
        return out_sharding

    def keep(entry: Any) -> Any:
        if isinstance(entry, tuple):
            return tuple(name for name in entry if name not in names)
        return None if entry in names else entry

    return out_sharding.update(partitions=tuple(map(keep, out_sharding)))


def is_sharded(x: jax.Array) -> bool:
    """Whether the type of an array says that it is sharded along an explicit mesh axis."""
    return any(name is not None for name in jax.typeof(x).sharding.spec)


def explicit_mesh(*arrays: Any) -> Any:
    """The mesh along whose axes, all of them explicit, an array is sharded; None if none is.

    Types of other arrays name the mesh of the context, but they may lie on one device. Axes that a
    `shard_map` around has made manual do not count.
    """
    meshes = (jax.typeof(x).sharding.mesh for x in arrays if is_sharded(x))
    mesh = next(meshes, None)
    return None if mesh is None or mesh.auto_axes else mesh


def spec_of_type(x: jax.Array) -> tuple[Any, ...]:
    """How the type of an array says that each axis is sharded along explicit mesh axes."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return (*spec, *(None,) * (x.ndim - len(spec)))


def sharding_for(shape: tuple[int, ...], like: jax.Array) -> jax.NamedSharding | None:
    """The sharding of an array for one of another shape, such as its scales.

    Axes that the devices cannot share evenly are not sharded.

    Args:
        shape: of the rank of `like`.
        like: an array, or a tracer whose type says how it is sharded.

    Returns:
        The sharding; None if `like` does not have a named one.
    """
    sharding = jax.typeof(like).sharding if is_tracer(like) else getattr(like, "sharding", None)
    if not isinstance(sharding, jax.NamedSharding) or not any(sharding.spec):
        return None
    spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    names = (
        name if n > 1 and n % devices_of(name, sharding.mesh) == 0 else None
        for name, n in zip(spec, shape, strict=True)
    )
    return sharding.update(spec=jax.P(*names))


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which an array varies between devices, inside `shard_map`."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_alike(arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays, made to vary along the same mesh axes, inside `shard_map`."""
    axes = frozenset[str]().union(*(varying_axes(x) for x in arrays))
    return [jax.lax.pcast(x, tuple(sorted(axes - varying_axes(x))), to="varying") for x in arrays]
