"""Rows times a matrix on each device's part of them, in programs that XLA partitions."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax

from ...core import Format, QTensor
from ...jaxprs import cpu_count, names_parts, on_each_part
from ..dot_spec import DotSpec
from ..operands import Operand, as_stored
from ..shares import Shares, axes_of_result, own_shape, without_inputs


def run_on_parts(
    lhs: Operand, rhs: QTensor, spec: DotSpec, run: Callable[..., jax.Array], key: str
) -> jax.Array:
    """Rows by one matrix: `run` multiplies what each device holds of the weights.

    Weights stay where they are. If their columns are divided, so is the result; if their
    contracted axes are, the parts of the result are added in float32.

    Args:
        lhs, rhs, spec: as for a row, both stored with their contracted axes last; no stack.
        run: (lhs, rhs, spec) -> result, of any length of the axes.
        key: equal only for functions `run` that do the same.
    """
    operands: tuple[Any, Any] = without_inputs(lhs), without_inputs(rhs)
    leaves, treedef = jax.tree.flatten((*operands, *spec.arrays))
    counts = len(jax.tree.leaves(operands[0]))

    def divide(mesh: Any, specs: Any) -> Any:
        shares = Shares.where_they_are(*operands, spec, (mesh, specs[0], specs[counts]))
        parts = shares.parts(*operands)

        def on_part(*given: jax.Array) -> jax.Array:
            own = [part.own(x) for part, x in zip(parts, given, strict=True)]
            return shares.run(run, treedef, own, halves=False)

        return [p.spec for p in parts], shares.of_result, on_part

    shapes = as_stored(lhs).shape, rhs.codes.shape
    factors = _factors(leaves, counts, shapes, spec)
    result = jax.ShapeDtypeStruct(axes_of_result(*shapes, spec), spec.dtype)
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
    operands = tuple(map(without_inputs, (lhs, rhs)))
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
    return jax.ShapeDtypeStruct(own_shape(x.shape, counts), x.dtype)


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
    return found, axes_of_result(names[0], names[1], spec)


def _formats(x: Any) -> Iterator[Format]:
    """Those of the codes of an operand, and of its scales and offsets."""
    if isinstance(x, QTensor):
        yield x.format
        yield from _formats(x.scale)
        yield from _formats(x.offset)
