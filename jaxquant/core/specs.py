"""How the arrays of a QTensor are divided among devices, from how the whole array is."""

import dataclasses
import math
from typing import Any

import jax

from .qtensor import QTensor


def specs(q: QTensor, spec: jax.P, mesh: Any = None) -> Any:
    """PartitionSpecs of the arrays of a QTensor that is divided as `spec` says.

    Codes are divided like the array, in the order in which they are stored. Scales, zero points and
    offsets are divided along axes with several blocks. Activation scales are replicated.

    Args:
        q: a QTensor of arrays, of `jax.ShapeDtypeStruct`, or of whatever else has a shape.
        spec: names of mesh axes for the logical axes of q, as for an array.
        mesh: the mesh, to replicate block scales along an axis whose blocks the devices cannot
            share evenly, as `jax.jit` needs it; None to leave them divided.

    Returns:
        A QTensor with a PartitionSpec in place of each array.

    Raises:
        ValueError: q is not a QTensor, or spec is not a PartitionSpec; spec has more entries than q
            has axes, or names an axis that `mesh` does not have; or the devices cannot share an
            axis of the codes evenly.

    Example:
        >>> q = jq.quantize(jnp.ones((256, 8)), jq.ArrayConfig(format=jq.INT4, group_size=64))
        >>> found = jq.specs(q, jax.P("model", None))
        >>> found.codes == found.scale == jax.P("model", None)
        True
    """
    if not isinstance(q, QTensor) or not isinstance(spec, jax.P):
        raise ValueError(
            f"specs expects a QTensor and a jax.P; got {type(q).__name__} and "
            f"{type(spec).__name__} {spec}. Map it over the QTensors of a tree."
        )
    if len(spec) > q.ndim:
        raise ValueError(f"spec must name at most {q.ndim} axes, those of {q!r}; got {spec}.")
    known = None if mesh is None else tuple(mesh.shape)
    unknown = [n for name in spec for n in _names(name) if known is not None and n not in known]
    if unknown:
        raise ValueError(f"spec must name axes of the mesh {known}; got {unknown[0]!r} in {spec}.")
    names = dict(zip(q.stored_axes(range(len(spec))), spec, strict=True))
    stored = [names.get(a) for a in range(q.ndim)]
    for length, name in zip(q.codes.shape, stored, strict=True):
        if length % devices_of(name, mesh):
            raise ValueError(
                f"{devices_of(name, mesh)} devices along mesh axis {name!r} cannot share {length} "
                f"elements evenly; got spec {spec} for {q!r}. Divide another axis."
            )
    return _specs(q, stored, mesh)


def devices_of(name: Any, mesh: Any) -> int:
    """The number of devices along one entry of a PartitionSpec; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[n] for n in _names(name))


def _names(name):
    return name if isinstance(name, tuple) else () if name is None else (name,)


def _specs(q, stored, mesh):
    def of(x):
        names = [
            None if n == 1 or n % devices_of(name, mesh) else name
            for name, n in zip(stored, x.shape, strict=True)
        ]
        return _specs(x, names, mesh) if isinstance(x, QTensor) else jax.P(*names)

    parts = {k: getattr(q, k) for k in ("codes", "scale", "zero_point", "offset", "values")}
    inputs = jax.tree.map(lambda _: jax.P(), q.inputs)
    found = {k: of(v) for k, v in parts.items() if v is not None}
    return dataclasses.replace(q, **found, inputs=inputs)
