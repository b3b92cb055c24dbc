"""Runs functions of a cache on each device's part of its sequences and heads."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ...jaxprs import explicit_mesh, spec_of_type


def on_own_heads(
    run: Callable[..., Any],
    cache: Any,
    counts: jax.Array | None,
    layer: Any,
    *heads: jax.Array,
    returns_cache: bool = False,
) -> Any:
    """run(cache, counts, layer, *heads), on each device's part if types say how it is divided.

    That is, if sequences or heads of the cache are sharded along explicit axes of a mesh. If it is
    sharded in other ways, XLA partitions what runs.

    Args:
        run: returns an array like `heads`, or a cache.
        cache: a `Cache`, whose sharding decides.
        counts: integers (B,), or None.
        layer: as for `append`.
        heads: queries, keys or values, (B, T, N, D).
        returns_cache: whether `run` does.
    """
    mesh = explicit_mesh(cache.keys)
    *_, batch, head, position, element = spec = spec_of_type(cache.keys)
    if mesh is None:
        return run(cache, counts, layer, *heads)
    lead = spec[:-4]
    if any((*lead, position, element)):
        # XLA shards what lies between.
        kept = jax.tree.map(lambda x: jax.P(*spec_of_type(x)), cache)
        specs = kept if returns_cache else jax.P(batch, None, head)
        shardings = jax.tree.map(partial(jax.NamedSharding, mesh), specs)
        divided: Any = jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=shardings)
        return divided(cache, counts, layer, *heads)
    of_cache = jax.tree.map(lambda _: jax.P(*lead, batch, head), cache)
    of_cache = dataclasses.replace(of_cache, lengths=jax.P(*lead, batch))
    of_heads = jax.P(batch, None, head)
    layer = None if layer is None else jnp.asarray(layer)
    given = cache, counts, layer, *heads
    of_counts = None if counts is None else jax.P(batch)
    specs = of_cache, of_counts, None if layer is None else jax.P(), *[of_heads] * len(heads)
    moved = jax.tree.map(
        lambda x, s: jax.sharding.reshard(x, jax.NamedSharding(mesh, s)), given, specs
    )
    of_result = of_cache if returns_cache else of_heads
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=of_result)(*moved)
