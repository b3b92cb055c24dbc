"""Parameters in `jax.shard_map` and with sharding constraints."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from ..core import LowRank, QTensor, refine_blocks
from ..core import specs as core_specs
from .parameter import Parameter, Tagged, Unsupported


def specs(x: Any, spec: jax.P, mesh: Any) -> tuple[Any, Any]:
    """A value, and the specs of `jax.shard_map` for the arrays that it consists of.

    Codes are divided as the array is, in the order in which they are stored. Scales and zero points
    are divided along axes with several blocks, and repeated first where a device gets part of a
    block.

    Args:
        x: an array or a Parameter.
        spec: of the array.
        mesh: whose axes the spec names.
    """
    if not isinstance(x, Parameter):
        return x, spec
    if isinstance(x.value, Tagged):
        everywhere = jax.tree.map(lambda _: jax.P(), x.value.extra)
        return x.value, dataclasses.replace(x.value, array=spec, extra=everywhere)
    q = x.qtensor()
    if q.inputs is not None and q.inputs.changes_weight:
        raise Unsupported(f"inputs.{q.inputs.changing_field} would have to be divided, too")
    q = refine_blocks(q, spec, mesh)
    return q, core_specs(q, spec)


def constrained(x: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """A value with a sharding along the automatic axes of a mesh; types name the explicit ones.

    That of a Parameter becomes one of each of its arrays; adapters are left to XLA.
    """
    is_named = isinstance(sharding, jax.sharding.NamedSharding)
    if sharding is None or (is_named and sharding.mesh.are_all_axes_explicit):
        return x
    if is_named and sharding.mesh.explicit_axes:
        raise Unsupported(f"its mesh has both automatic and explicit axes: {sharding.mesh}")
    if not isinstance(x, Parameter):
        return jax.lax.with_sharding_constraint(x, sharding)
    if isinstance(x.value, Tagged):
        return x.derive(x.value.with_array(constrained(x.value.array, sharding)))
    if not is_named:
        raise Unsupported(f"its sharding does not name axes of a mesh: {sharding}")
    if isinstance(x.value, LowRank):
        base = constrained(Parameter(x.value.base, x.path), sharding).value
        return dataclasses.replace(x, value=dataclasses.replace(x.value, base=base), _forms={})
    return _placed(x, sharding, jax.lax.with_sharding_constraint)


def resharded(x: Any, sharding: jax.sharding.NamedSharding) -> Any:
    """A value with another sharding along explicit axes of a mesh, or in a mesh of other types.

    That of a Parameter becomes one of each of its arrays.
    """
    if not isinstance(x, Parameter):
        return jax.sharding.reshard(x, sharding)
    if not isinstance(x.value, QTensor):
        raise Unsupported("its arrays are sharded in other ways")
    return _placed(x, sharding, jax.sharding.reshard)


def _placed(x: Parameter, sharding: jax.NamedSharding, place: Callable[..., Any]) -> Parameter:
    q, of_arrays = specs(x, sharding.spec, sharding.mesh)
    shardings = jax.tree.map(lambda spec: sharding.update(spec=spec), of_arrays)
    is_whole = x.is_whole and isinstance(x.value, QTensor)
    return dataclasses.replace(x, value=place(q, shardings), is_whole=is_whole, _forms={})
