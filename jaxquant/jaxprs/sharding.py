"""Shardings of arrays while they are traced."""

import jax

OutSharding = jax.sharding.NamedSharding | jax.P | None


def before_transpose(out_sharding: OutSharding, permutation: tuple[int, ...]) -> OutSharding:
    """The sharding of an array whose transpose by `permutation` has `out_sharding`."""
    if isinstance(out_sharding, jax.sharding.NamedSharding):
        return out_sharding.update(spec=before_transpose(out_sharding.spec, permutation))
    if out_sharding is None:
        return None
    named = dict(enumerate(out_sharding))
    partitions = [named.get(permutation.index(a)) for a in range(len(permutation))]
    return out_sharding.update(partitions=tuple(partitions))


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


def is_sharded(x: jax.Array) -> bool:
    """Whether an array is sharded along an explicit axis of a mesh, which its type says."""
    return any(name is not None for name in jax.typeof(x).sharding.spec)


def varying_axes(x: jax.Array) -> frozenset:
    """The mesh axes along which an array varies between devices, inside `shard_map`."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_alike(arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays, all varying along the same mesh axes, inside `shard_map`."""
    axes = frozenset[str]().union(*(varying_axes(x) for x in arrays))
    return [jax.lax.pcast(x, tuple(sorted(axes - varying_axes(x))), to="varying") for x in arrays]
