"""How the arrays of a QTensor are divided among devices, from how the array that it is would be."""

import dataclasses
import math
from typing import Any

import jax

from ..core import QTensor
from .carriers import repeat_blocks
from .parameter import Parameter, Unsupported


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
    q = x.qtensor()
    if q.inputs is not None and q.inputs.multiplier is not None:
        raise Unsupported("inputs.multiplier would have to be divided, too")
    names = dict(zip(q.stored_axes(range(len(spec))), spec, strict=True))
    stored = jax.P(*(names.get(a) for a in range(q.ndim)))
    q = _divisible(q, stored, mesh)
    return q, _specs(q, stored)


def _divisible(q, spec, mesh):
    """q with as many scales along each axis as the devices can share evenly, or one."""

    def divide(x):
        if x is None:
            return None
        for axis, name in enumerate(spec):
            count, length = x.shape[axis], q.codes.shape[axis]
            devices = _devices(name, mesh)
            times = devices // math.gcd(count, devices)
            if count == 1 or times == 1:
                continue
            if (length // count) % times:
                raise Unsupported(f"{devices} devices cannot share {count} blocks of axis {axis}")
            x = repeat_blocks(x, axis, times)
        return _divisible(x, spec, mesh) if isinstance(x, QTensor) else x

    return dataclasses.replace(q, scale=divide(q.scale), zero_point=divide(q.zero_point))


def _devices(name, mesh):
    names = name if isinstance(name, tuple) else () if name is None else (name,)
    return math.prod(dict(mesh.shape)[n] for n in names)


def _specs(q: QTensor, spec: jax.P) -> Any:
    """The QTensor with a spec in place of each array."""

    def of(x):
        if isinstance(x, QTensor):
            return _specs(x, _of_counts(spec, x.shape))
        return None if x is None else _of_counts(spec, x.shape)

    inputs = jax.tree.map(lambda _: jax.P(), q.inputs)
    return dataclasses.replace(
        q,
        codes=spec,
        scale=of(q.scale),
        zero_point=of(q.zero_point),
        values=None if q.values is None else spec,
        inputs=inputs,
    )


def _of_counts(spec, counts):
    return jax.P(*(None if n == 1 else name for name, n in zip(spec, counts, strict=True)))
