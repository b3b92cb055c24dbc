"""Where a result lies on a mesh, while its axes are still in another order."""

import jax

OutSharding = jax.sharding.NamedSharding | jax.P | None


def before_transpose(out_sharding: OutSharding, permutation: tuple[int, ...]) -> OutSharding:
    """What an array must have for its transpose by `permutation` to have `out_sharding`."""
    if isinstance(out_sharding, jax.sharding.NamedSharding):
        return out_sharding.update(spec=before_transpose(out_sharding.spec, permutation))
    if out_sharding is None:
        return None
    named = dict(enumerate(out_sharding))
    partitions = [named.get(permutation.index(a)) for a in range(len(permutation))]
    return out_sharding.update(partitions=tuple(partitions))


def like_result(values: jax.Array, out_sharding: OutSharding) -> jax.Array:
    """Lays an array that broadcasts with a result out as the result is."""
    if out_sharding is None:
        return values
    spec = out_sharding if isinstance(out_sharding, jax.P) else out_sharding.spec
    named = dict(enumerate(spec))
    partitions = [named.get(a) if n > 1 else None for a, n in enumerate(values.shape)]
    spec = jax.P(*partitions)
    wanted = spec if isinstance(out_sharding, jax.P) else out_sharding.update(spec=spec)
    return jax.sharding.reshard(values, wanted)


def is_sharded(x: jax.Array) -> bool:
    """Whether an array is known, while it is traced, to lie in parts (explicit sharding)."""
    return any(name is not None for name in jax.typeof(x).sharding.spec)


def varying_axes(x: jax.Array) -> frozenset:
    """The axes of a mesh along which an array differs between devices, inside `shard_map`."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary_alike(arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays, differing between devices along the same axes of the mesh, inside `shard_map`."""
    axes = frozenset[str]().union(*(varying_axes(x) for x in arrays))
    return [jax.lax.pcast(x, tuple(sorted(axes - varying_axes(x))), to="varying") for x in arrays]
