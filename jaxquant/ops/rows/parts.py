"""Rows times a matrix on each device's part of them, in programs that XLA partitions."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...core import Format, QTensor
from ...jaxprs import cpu_count, names_parts, on_each_part
from ..dot_spec import DotSpec
from ..operands import Operand, as_stored

# What divides one axis: names of axes of a mesh.
Names = tuple[str, ...]


def run_on_parts(
    lhs: Operand, rhs: QTensor, spec: DotSpec, run: Callable[..., jax.Array], key: str
) -> jax.Array:
    """Rows by one matrix: `run` multiplies what each device holds of the weights.

    Weights stay where they are. If their columns are divided, so is the result; if their
    contracted axes are, the parts of the result are added in float32.

    Args:
        lhs, rhs, spec: as for a row, both stored with their contracted axes last.
        run: (lhs, rhs, spec) -> result, of any length of the axes.
        key: equal only for functions `run` that do the same.
    """
    leaves, treedef = jax.tree.flatten(tuple(map(_without_inputs, (lhs, rhs))))
    compute = jnp.dtype(jnp.float64 if spec.dtype == jnp.float64 else jnp.float32)
    counts = len(jax.tree.leaves(_without_inputs(lhs)))
    shapes = as_stored(lhs).shape, rhs.codes.shape
    inner = len(spec.contract[1])

    def divide(mesh: Any, specs: Any) -> Any:
        of_lhs, of_rhs = _shares(mesh, (specs[0], specs[counts]), shapes, inner)
        contracted = tuple(itertools.chain(*of_rhs[-inner:]))
        wanted = [of_lhs] * counts + [of_rhs] * (len(leaves) - counts)
        parts = [_Part(x.shape, s, mesh) for x, s in zip(leaves, wanted, strict=True)]

        def on_part(*given: jax.Array) -> jax.Array:
            own = [part.own(x) for part, x in zip(parts, given, strict=True)]
            local = dataclasses.replace(spec, dtype=compute) if contracted else spec
            out = run(*jax.tree.unflatten(treedef, own), local)
            return lax.psum(out, contracted).astype(spec.dtype) if contracted else out

        return [p.spec for p in parts], _of_result(of_lhs, of_rhs, spec), on_part

    factors = _factors(leaves, counts, shapes, spec)
    shape = _of_result(*shapes, spec)
    result = jax.ShapeDtypeStruct(shape, spec.dtype)
    # Trees are printed with the names of formats alone.
    formats = [dataclasses.astuple(f) for f in (*_formats(lhs), *_formats(rhs))]
    key = repr((key, counts, formats, str(treedef), spec))
    return on_each_part(result, divide, factors, key, *leaves)


def parts_of(
    lhs: Operand, rhs: QTensor, spec: DotSpec
) -> Iterator[tuple[tuple[int, ...], Operand, QTensor]]:
    """Shapes of the parts of operands, by the number of parts along each axis of the weights.

    Of all numbers for which this process has devices.
    """
    operands = tuple(map(_without_inputs, (lhs, rhs)))
    left, right = jax.eval_shape(lambda *operands: operands, *operands)
    inner = len(spec.contract[1])
    devices = range(1, cpu_count() + 1)
    divisors = [[n for n in devices if length % n == 0] for length in rhs.codes.shape]
    for counts in itertools.product(*divisors):
        if math.prod(counts) not in devices or not names_parts(math.prod(counts)):
            continue
        of_left = (*(1,) * (lhs.ndim - inner), *counts[-inner:])
        yield (
            counts,
            jax.tree.map(partial(_part_of, counts=of_left), left),
            jax.tree.map(partial(_part_of, counts=counts), right),
        )


def _part_of(x: jax.ShapeDtypeStruct, counts: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The shape of one of so many parts along each axis; see `_Part.own`."""
    pairs = zip(x.shape, counts, strict=True)
    shape = [1 if n == 1 else math.lcm(n, count) // count for n, count in pairs]
    return jax.ShapeDtypeStruct(shape, x.dtype)


@dataclasses.dataclass(frozen=True)
class _Part:
    """How an array with one element per block of another is divided where that is.

    Attributes:
        shape: of the array.
        shares: what divides each axis of the other.
        mesh: whose axes they name.
    """

    shape: tuple[int, ...]
    shares: tuple[Names, ...]
    mesh: Any

    @property
    def spec(self) -> tuple[Any, ...]:
        """Of the array, which is not divided along axes whose blocks span devices."""
        pairs = zip(self.shape, self.shares, strict=True)
        return tuple(None if n % _devices(self.mesh, s) else s or None for n, s in pairs)

    def own(self, x: jax.Array) -> jax.Array:
        """What belongs to this device's part of the other array, from what it gets of this one."""
        for axis, (length, share) in enumerate(zip(self.shape, self.shares, strict=True)):
            devices = _devices(self.mesh, share)
            if length == 1 or length % devices == 0:
                continue
            # The blocks are cut so that none spans devices.
            whole = jnp.repeat(x, devices // math.gcd(length, devices), axis)
            size = whole.shape[axis] // devices
            x = lax.dynamic_slice_in_dim(whole, lax.axis_index(share) * size, size, axis)
        return x


def _shares(
    mesh: Any, specs: tuple[Any, Any], shapes: tuple[tuple[int, ...], ...], inner: int
) -> list[tuple[Names, ...]]:
    """What divides each axis of both operands: the weights stay, others move.

    Args:
        mesh: whose axes it names.
        specs, shapes: of the operands.
        inner: number of contracted axes, the last ones.
    """
    rows, of_rhs = (
        [_names(mesh, entry, n) for entry, n in zip(spec, shape, strict=True)]
        for spec, shape in zip(specs, shapes, strict=True)
    )
    taken = {*itertools.chain(*of_rhs)}
    rows = [() if taken.intersection(names) else names for names in rows[:-inner]]
    return [(*rows, *of_rhs[-inner:]), (*of_rhs,)]


def _names(mesh: Any, entry: Any, length: int) -> Names:
    """The names in an entry of a spec, if they divide an axis evenly."""
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return () if length % _devices(mesh, names) else names


def _devices(mesh: Any, names: Names) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _factors(
    leaves: Sequence[Any], counts: int, shapes: tuple[tuple[int, ...], ...], spec: DotSpec
) -> tuple[list[list[str]], tuple[str, ...]]:
    """Names of the axes of the leaves and of the result: alike where they have one length."""
    inner = [f"k{i}" for i in range(len(spec.contract[1]))]
    names = [
        [*(f"{letter}{a}" for a in range(len(shape) - len(inner))), *inner]
        for letter, shape in zip(("m", "n"), shapes, strict=True)
    ]
    found = []
    for i, x in enumerate(leaves):
        side = int(i >= counts)
        own = [f"x{i}a{a}" for a in range(x.ndim)]
        triples = zip(names[side], shapes[side], x.shape, own, strict=True)
        found += [[name if n == length else alone for name, length, n, alone in triples]]
    return found, _of_result(names[0], names[1], spec)


def _of_result(of_lhs: Sequence[Any], of_rhs: Sequence[Any], spec: DotSpec) -> tuple[Any, ...]:
    """What the axes of the result have, of what those of the operands have."""
    inner = len(spec.contract[1])
    entries = (*of_lhs[:-inner], *of_rhs[:-inner])
    return tuple(entries[a] for a in spec.permutation)


def _formats(x: Any) -> Iterator[Format]:
    """Those of the codes of an operand, and of its scales and offsets."""
    if isinstance(x, QTensor):
        yield x.format
        yield from _formats(x.scale)
        yield from _formats(x.offset)


def _without_inputs(x: Operand) -> Operand:
    return dataclasses.replace(x, inputs=None) if isinstance(x, QTensor) else x
