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
            share evenly, as `jax.jit` needs it (`refine_blocks` avoids that); None to leave them
            divided.

    Returns:
        A QTensor with a PartitionSpec in place of each array.

    Raises:
        ValueError: q is not a QTensor, spec is not a PartitionSpec, or mesh is not a mesh; spec has
            more entries than q has axes, or names an axis that the mesh does not have; or the
            devices cannot share an axis of the codes evenly.

    Example:
        >>> q = jq.quantize(jnp.ones((256, 8)), jq.ArrayConfig(format=jq.INT4, group_size=64))
        >>> found = jq.specs(q, jax.P("model", None))
        >>> found.codes == found.scale == jax.P("model", None)
        True
    """
    return _specs(q, _stored_names(q, spec, mesh), mesh)


def refine_blocks(q: QTensor, spec: jax.P, mesh: Any) -> QTensor:
    """The same array with smaller blocks, where devices that divide it would share one.

    Scales, zero points and offsets are repeated as often as needed for each device to hold those of
    its codes and no others: 18 groups of 32 become 72 groups of 8 on 8 devices. That is possible
    wherever the devices can share the codes, and takes no more memory per device than all of them.

    Args:
        q, spec: as for `specs`.
        mesh: the mesh.

    Returns:
        QTensor with the same codes, which dequantizes to the same values; `specs(q, spec, mesh)`
        divides all that has several blocks. It is q itself if the devices can share its blocks.

    Raises:
        ValueError: as for `specs`.

    Example:
        >>> q = jq.quantize(jnp.ones((96, 8)), jq.ArrayConfig(format=jq.INT4, group_size=32))
        >>> mesh = jax.sharding.AbstractMesh((2,), ("model",))
        >>> jq.refine_blocks(q, jax.P("model"), mesh)
        QTensor(int4 96x8, scale (6, 8), float32)
    """
    return _refined(q, _stored_names(q, spec, mesh), mesh)


def _stored_names(q: Any, spec: Any, mesh: Any) -> list[Any]:
    """What divides each stored axis of q."""
    if not isinstance(q, QTensor) or not isinstance(spec, jax.P):
        raise ValueError(
            f"q must be a QTensor and spec a jax.P; got {type(q).__name__} and {spec!r}. Map over "
            "the QTensors of a tree."
        )
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh | None):
        raise ValueError(f"mesh must be a Mesh, an AbstractMesh or None; got {mesh!r}.")
    if len(spec) > q.ndim:
        raise ValueError(f"spec must name at most {q.ndim} axes, those of {q!r}; got {spec}.")
    known = None if mesh is None else tuple(mesh.shape)
    unknown = [n for name in spec for n in _names(name) if known is not None and n not in known]
    if unknown:
        raise ValueError(f"spec must name axes of the mesh {known}; got {unknown[0]!r} in {spec}.")
    names = dict(zip(q.stored_axes(range(len(spec))), spec, strict=True))
    stored = [names.get(a) for a in range(q.ndim)]
    for length, count, name in zip(q.codes.shape, q.scale.shape, stored, strict=True):
        if length % devices_of(name, mesh):
            blocks = f" in {count} blocks" if 1 < count < length else ""
            raise ValueError(
                f"{devices_of(name, mesh)} devices along mesh axis {name!r} cannot share {length} "
                f"elements{blocks} evenly; got spec {spec} for {q!r}. Divide another axis."
            )
    return stored


def _refined(q, stored, mesh):
    def of(x):
        for axis, name in enumerate(stored):
            # Any number of devices that divides the codes divides them into parts of whole blocks
            # of this size: lcm(blocks, devices) divides what both divide.
            devices = devices_of(name, mesh)
            times = devices // math.gcd(x.shape[axis], devices)
            if x.shape[axis] > 1 and times > 1:
                x = repeat_blocks(x, axis, times)
        return _refined(x, stored, mesh) if isinstance(x, QTensor) else x

    parts = {k: getattr(q, k) for k in ("scale", "zero_point", "offset")}
    finer = {k: of(v) for k, v in parts.items() if v is not None}
    return q if all(v is parts[k] for k, v in finer.items()) else dataclasses.replace(q, **finer)


def repeat_blocks(x: Any, axis: int, times: int) -> Any:
    """Scales (an array or a QTensor) repeated along a stored axis, for blocks that are divided."""
    if times == 1:
        return x
    if isinstance(x, QTensor):
        return dataclasses.replace(x, codes=repeat_blocks(x.codes, axis, times), values=None)
    if isinstance(x, jax.ShapeDtypeStruct):
        shape = (*x.shape[:axis], times * x.shape[axis], *x.shape[axis + 1 :])
        return jax.ShapeDtypeStruct(shape, x.dtype)
    return x.repeat(times, axis)


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
