"""How devices share the operands and the result of a product: the weights stay where they are."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..core import QTensor
from ..jaxprs import after_transpose, explicit_mesh, names_along, spec_of_type
from .operands import Operand, as_stored

# What divides one axis: names of axes of a mesh.
Names = tuple[str, ...]
# Elements of a result, at least, for which devices run XLA's rows on their parts, to add these in
# 16 bits. Fewer are sent in less time than it takes to round them.
_HALVES = 2**16


@dataclasses.dataclass(frozen=True)
class Part:
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
    def counts(self) -> tuple[int, ...]:
        """The number of parts of the other along each axis."""
        return tuple(devices(self.mesh, share) for share in self.shares)

    @property
    def spec(self) -> tuple[Any, ...]:
        """Of the array, which is not divided along axes whose blocks span devices."""
        triples = zip(self.shape, self.counts, self.shares, strict=True)
        return tuple(None if n % count else share or None for n, count, share in triples)

    def own(self, x: jax.Array) -> jax.Array:
        """What belongs to this device's part of the other array, from what it gets of this one."""
        lengths = zip(self.shape, self.counts, self.shares, strict=True)
        for axis, (length, count, share) in enumerate(lengths):
            if length == 1 or length % count == 0:
                continue
            # The blocks are cut so that none spans devices.
            whole = jnp.repeat(x, count // math.gcd(length, count), axis)
            size = whole.shape[axis] // count
            x = lax.dynamic_slice_in_dim(whole, lax.axis_index(share) * size, size, axis)
        return x


@dataclasses.dataclass(frozen=True)
class Shares:
    """How devices share one product of two operands.

    Attributes:
        mesh: the devices.
        of_lhs, of_rhs: what divides each stored axis of the operands.
        spec: the `DotSpec` of the product.
    """

    mesh: Any
    of_lhs: tuple[Names, ...]
    of_rhs: tuple[Names, ...]
    spec: Any

    @classmethod
    def where_they_are(cls, lhs: Operand, rhs: QTensor, spec: Any, on: Any) -> "Shares":
        """Those that leave the weights where they are; the activations move.

        Args:
            lhs, rhs, spec: of the product.
            on: (mesh, spec of the codes of lhs, spec of those of rhs), one entry per axis.
        """
        mesh, *specs = on
        shapes = as_stored(lhs).shape, rhs.codes.shape
        of_lhs, of_rhs = (
            [_names(mesh, entry, n) for entry, n in zip(s, shape, strict=True)]
            for s, shape in zip(specs, shapes, strict=True)
        )
        taken = {*itertools.chain(*of_rhs)}
        of_lhs = [() if taken.intersection(names) else names for names in of_lhs]
        for left, right in (spec.contract, spec.batch):
            for a, b in zip(left, right, strict=True):
                of_lhs[a] = of_rhs[b]
        return cls(mesh, (*of_lhs,), (*of_rhs,), spec)

    @classmethod
    def of_types(cls, lhs: Operand, rhs: Operand, spec: Any) -> "Shares | None":
        """`where_they_are` of operands whose types say so, with the explicit axes of a mesh.

        None for others, and where JAX wants to know how the result is divided.
        """
        mesh = explicit_mesh(*jax.tree.leaves((lhs, rhs)))
        if mesh is None or not isinstance(rhs, QTensor):
            return None
        left, right = as_stored(lhs), rhs.codes
        on = mesh, spec_of_type(left), spec_of_type(right)
        shares = cls.where_they_are(lhs, rhs, spec, on)
        is_ambiguous = not names_along(left, None).isdisjoint(names_along(right, None))
        return None if is_ambiguous and spec.out_sharding is None else shares

    @property
    def own_spec(self) -> Any:
        """The spec of one device's product."""
        return dataclasses.replace(self.spec, out_sharding=None)

    @property
    def contracted(self) -> Names:
        """What divides the contracted axes: its devices have parts of the sums."""
        return tuple(itertools.chain(*(self.of_rhs[a] for a in self.spec.contract[1])))

    def adds_halves(self, lhs: Operand, rhs: QTensor) -> bool:
        """Whether XLA's rows are run on parts to add these in 16 bits; XLA adds sums of 32 bits."""
        shapes = as_stored(lhs).shape, rhs.codes.shape
        is_large = math.prod(axes_of_result(*shapes, self.spec)) >= _HALVES
        return bool(self.contracted) and jnp.dtype(self.spec.dtype).itemsize == 2 and is_large

    @property
    def of_result(self) -> tuple[Names, ...]:
        """What divides each axis of the result."""
        return axes_of_result(self.of_lhs, self.of_rhs, self.spec)

    def operands(self, lhs: Operand, rhs: QTensor) -> tuple[Any, ...]:
        """Both, whose inputs were applied, and the arrays of the spec."""
        return without_inputs(lhs), without_inputs(rhs), *self.spec.arrays

    def parts(self, lhs: Operand, rhs: QTensor) -> list[Part]:
        """How the leaves of `operands` are divided, in their order."""
        stack, layer, unquantized = self.spec.arrays
        pairs = (
            *((lhs, self.of_lhs), (rhs, self.of_rhs)),
            *((stack, ((), *self.of_rhs)), (layer, ()), (unquantized, self.of_lhs)),
        )
        return [Part(leaf.shape, s, self.mesh) for x, s in pairs for leaf in jax.tree.leaves(x)]

    def run(
        self, run: Callable[..., jax.Array], treedef: Any, own: Sequence[Any], *, halves: bool
    ) -> jax.Array:
        """This device's part of the result, from its parts of the leaves of `operands`.

        If contracted axes are divided, parts of the result are added in float32, or, if `halves`
        says so, in the dtype of the result.
        """
        lhs, rhs, *arrays = jax.tree.unflatten(treedef, own)
        spec = self.spec.with_arrays(*arrays)
        if not self.contracted:
            return run(lhs, rhs, spec)
        wide = jnp.dtype(jnp.float64 if spec.dtype == jnp.float64 else jnp.float32)
        own_spec = spec if halves else dataclasses.replace(spec, dtype=wide)
        return lax.psum(run(lhs, rhs, own_spec), self.contracted).astype(spec.dtype)


def on_own_parts(
    shares: Shares, lhs: Operand, rhs: QTensor, run: Callable[..., jax.Array]
) -> jax.Array:
    """The product of arrays whose types say how they are divided: each device runs its part.

    Results of 16 bits are added in 16 bits, as XLA does with those of float products.

    Args:
        shares: from `Shares.of_types`.
        lhs, rhs: the operands.
        run: (lhs, rhs, spec) -> result, of parts and of a spec without `out_sharding`.
    """
    operands = shares.operands(lhs, rhs)
    leaves, treedef = jax.tree.flatten(operands)
    parts = shares.parts(*operands[:2])
    specs = tuple(jax.P(*part.spec) for part in parts)
    spec, local = shares.spec, dataclasses.replace(shares, spec=shares.own_spec)
    halves = spec.dtype.itemsize == 2

    def on_part(*given: jax.Array) -> jax.Array:
        own = [part.own(x) for part, x in zip(parts, given, strict=True)]
        return local.run(run, treedef, own, halves=halves)

    shardings = [jax.NamedSharding(shares.mesh, s) for s in specs]
    moved = map(jax.sharding.reshard, leaves, shardings)
    of_result = jax.P(*(names or None for names in shares.of_result))
    out = jax.shard_map(on_part, mesh=shares.mesh, in_specs=specs, out_specs=of_result)(*moved)
    if spec.out_sharding is None:
        return out
    return jax.sharding.reshard(out, after_transpose(spec.out_sharding, spec.permutation))


def own_shapes(shares: Shares, lhs: Operand, rhs: QTensor) -> tuple[Any, Any]:
    """The shapes of one device's parts of the operands."""
    operands = shares.operands(lhs, rhs)
    leaves, treedef = jax.tree.flatten(operands)
    own = [
        jax.ShapeDtypeStruct(own_shape(part.shape, part.counts), x.dtype)
        for part, x in zip(shares.parts(*operands[:2]), leaves, strict=True)
    ]
    left, right, *_ = jax.tree.unflatten(treedef, own)
    return left, right


def without_inputs(x: Operand) -> Operand:
    """An operand whose inputs were applied."""
    return dataclasses.replace(x, inputs=None) if isinstance(x, QTensor) else x


def axes_of_result(of_lhs: Sequence[Any], of_rhs: Sequence[Any], spec: Any) -> tuple[Any, ...]:
    """What the axes of the result have, of what those of the operands have."""
    batch = [of_lhs[a] for a in spec.batch[0]]
    free = [
        entry
        for side, entries in enumerate((of_lhs, of_rhs))
        for a, entry in enumerate(entries)
        if a not in spec.contract[side] + spec.batch[side]
    ]
    entries = [*batch, *free]
    return tuple(entries[a] for a in spec.permutation)


def own_shape(shape: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """The shape of one of so many parts along each axis; see `Part.own`."""
    pairs = zip(shape, counts, strict=True)
    return tuple(1 if n == 1 else math.lcm(n, count) // count for n, count in pairs)


def devices(mesh: Any, names: Names) -> int:
    """The number of parts in which axes of a mesh divide an array."""
    return math.prod(mesh.shape[name] for name in names)


def _names(mesh: Any, entry: Any, length: int) -> Names:
    """The names in an entry of a spec, if they divide an axis evenly."""
    names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return () if length % devices(mesh, names) else names
