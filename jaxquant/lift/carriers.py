"""Operations that only rearrange an array, on the codes of a QTensor.

Each returns a QTensor that dequantizes to what the operation makes of the dequantized array, or
raises Unsupported. Nothing is dequantized, and no block is divided into elements.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ..core import QTensor, concatenate_codes, repeat_blocks, scale_values
from .parameter import Unsupported
from .reshaped import paired_axes, reshaped_blocks

# A block is divided where it is sliced or joined, but not into fewer elements.
_MIN_BLOCK = 8


def transpose(q: QTensor, permutation: Sequence[int]) -> QTensor:
    """`lax.transpose`: the same codes, stored in another order of axes."""
    ndim = q.ndim
    stored = q.stored_axes(permutation)
    order = [0] * ndim
    for logical, place in enumerate(stored):
        order[place] = logical - ndim
    while order and order[0] == -len(order):
        order.pop(0)
    return dataclasses.replace(_one_contracted(q), order=tuple(order) or None)


def _one_contracted(q):
    """q, if no multiplier or rotation depends on the order of its axes."""
    rotation = None if q.inputs is None else q.inputs.rotation
    multiplier = None if q.inputs is None else q.inputs.multiplier
    if multiplier is not None and multiplier.ndim > 1:
        raise Unsupported("inputs.multiplier has several axes, whose order would change")
    if rotation is not None and rotation.signs.ndim > 1:
        raise Unsupported("inputs.rotation has several axes, whose order would change")
    return q


def _with_channels(q):
    """q, if nothing in `inputs` depends on the places of its contracted channels."""
    if q.inputs is not None and q.inputs.changes_weight:
        raise Unsupported(f"inputs.{q.inputs.changing_field} would have to follow it")
    return q


def reshape(q: QTensor, shape: Sequence[int]) -> QTensor:
    """`lax.reshape`. Codes are copied only if a permutation of axes lies between."""
    if tuple(shape) == q.shape:
        return q
    if 0 in q.shape:
        raise Unsupported("the array is empty")
    q = _with_channels(q)
    runs = paired_axes(q.shape, shape)
    if any(_is_torn(q.stored_axes(run)) for run, _ in runs):
        q = q.reorder(None)
    # The runs of axes in the order in which they are stored.
    stored = sorted(runs, key=lambda run: q.stored_axes(run[0])[:1])
    axes = [a for _, those in stored for a in those]
    whole = _reshape_stored(dataclasses.replace(q, order=None), [shape[a] for a in axes])
    places = [axes.index(a) for a in range(len(shape))]
    return transpose(whole, places)


def _is_torn(places):
    return list(places) != list(range(places[0], places[0] + len(places))) if places else False


def _reshape_stored(q: QTensor, shape: Sequence[int]) -> QTensor:
    """`reshape` of a QTensor that is stored in its logical order."""

    def parts(x):
        blocks = reshaped_blocks(q.shape, _blocks(q.shape, x.shape), shape)
        if blocks is None:
            raise Unsupported(f"scales of shape {x.shape} do not fit {q.shape} as {tuple(shape)}")
        counts = [n // block for n, block in zip(shape, blocks, strict=True)]
        if isinstance(x, QTensor):
            return _reshape_stored(x, counts)
        return x.reshape(counts)

    return _replace(q, lambda codes: codes.reshape(shape), parts)


def _blocks(shape, counts):
    return [n // c if c else 1 for n, c in zip(shape, counts, strict=True)]


def _replace(q, of_codes, of_blocks):
    """q with other codes and values, and other scales, zero points and offsets."""
    return dataclasses.replace(
        q,
        codes=of_codes(q.codes),
        scale=of_blocks(q.scale),
        zero_point=None if q.zero_point is None else of_blocks(q.zero_point),
        offset=None if q.offset is None else of_blocks(q.offset),
        values=None if q.values is None else of_codes(q.values),
    )


def rev(q: QTensor, dimensions: Sequence[int]) -> QTensor:
    """`lax.rev`: codes, and what there is per block, in reverse order."""
    axes = q.stored_axes(dimensions)
    return _reverse_stored(_with_channels(q), axes)


def _reverse_stored(q: QTensor, axes: Sequence[int]) -> QTensor:
    def reverse(x):
        return _reverse_stored(x, axes) if isinstance(x, QTensor) else lax.rev(x, axes)

    return _replace(q, reverse, reverse)


def broadcast_in_dim(q: QTensor, shape: Sequence[int], dimensions: Sequence[int]) -> QTensor:
    """`lax.broadcast_in_dim`; new elements share the scale of the one that they copy."""
    lengths = [1] * len(shape)
    for a, place in enumerate(dimensions):
        lengths[place] = q.shape[a]
    out = reshape(q, lengths)
    stored = list(shape)
    for a, place in enumerate(out.stored_axes(range(len(shape)))):
        stored[place] = shape[a]
    return _replace(out, lambda codes: jnp.broadcast_to(codes, stored), lambda x: x)


def slice(
    q: QTensor, starts: Sequence[int], limits: Sequence[int], strides: Sequence[int] | None
) -> QTensor:
    """`lax.slice`; blocks that a slice cuts are divided, and share the old scale."""
    strides = [1] * q.ndim if strides is None else strides
    for a, cut in enumerate(zip(starts, limits, strides, strict=True)):
        if cut != (0, q.shape[a], 1):
            q = _slice_stored(_with_channels(q), q.stored_axes([a])[0], *cut)
    return q


def _slice_stored(q: QTensor, axis: int, start: int, limit: int, stride: int) -> QTensor:
    length = q.codes.shape[axis]

    def cut(x, start=start, limit=limit, stride=stride):
        return lax.slice_in_dim(x, start, limit, stride, axis)

    def of_blocks(x):
        count = x.shape[axis]
        block = length // count if count else 1
        if limit <= start:
            raise Unsupported("nothing is left of the array")
        if block == 1:
            return _slice_stored(x, axis, start, limit, stride) if _is(x) else cut(x)
        first, last = start // block, (limit - 1) // block
        if first == last:
            bounds = first, first + 1, 1
            return _slice_stored(x, axis, *bounds) if _is(x) else cut(x, *bounds)
        common = math.gcd(block, start, limit - start)
        if stride != 1 or common < min(block, _MIN_BLOCK):
            raise Unsupported(f"{start}:{limit}:{stride} does not keep the blocks of {block} whole")
        x = repeat_blocks(x, axis, block // common)
        bounds = start // common, limit // common, 1
        return _slice_stored(x, axis, *bounds) if _is(x) else cut(x, *bounds)

    return _replace(q, cut, of_blocks)


def _is(x):
    return isinstance(x, QTensor)


def dynamic_slice(q: QTensor, starts: Sequence[jax.Array], sizes: Sequence[int]) -> QTensor:
    """`lax.dynamic_slice` along axes with a scale per element, or one for all."""
    for a, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size == q.shape[a]:
            continue
        (axis,) = q.stored_axes([a])
        q = _dynamic_slice_stored(_with_channels(q), axis, start, size)
    return q


def _dynamic_slice_stored(q, axis, start, size):
    length = q.codes.shape[axis]

    def cut(x):
        return lax.dynamic_slice_in_dim(x, start, size, axis)

    def of_blocks(x):
        if x.shape[axis] == 1:
            return x
        if x.shape[axis] != length:
            raise Unsupported(f"it starts anywhere in blocks of {length // x.shape[axis]}")
        return _dynamic_slice_stored(x, axis, start, size) if _is(x) else cut(x)

    return _replace(q, cut, of_blocks)


def concatenate(operands: Sequence[QTensor], axis: int) -> QTensor:
    """`lax.concatenate` of arrays that are quantized alike."""
    first = operands[0]
    if any(q.order != first.order for q in operands):
        operands = [q.reorder(None) for q in operands]
        first = operands[0]
    for q in operands[1:]:
        _check_alike(first, q)
    (stored,) = first.stored_axes([axis])
    return _concatenate_stored(operands, stored)


def _check_alike(first: QTensor, other: QTensor) -> None:
    kinds = (jax.tree.structure(dataclasses.replace(q, inputs=None)) for q in (first, other))
    if len(set(kinds)) > 1 or jax.tree.structure(first.inputs) != jax.tree.structure(other.inputs):
        raise Unsupported(f"its operands are not quantized alike: {first!r} and {other!r}")
    if jax.tree.leaves(first.inputs):
        raise Unsupported("each of its operands has its own calibrated activations")


def _concatenate_stored(operands, axis):
    first = operands[0]

    def joined(of):
        return concatenate_codes([of(q) for q in operands], axis)

    def of_blocks(of):
        blocks = [q.codes.shape[axis] // max(of(q).shape[axis], 1) for q in operands]
        common = math.gcd(*blocks)
        if common < min(*blocks, _MIN_BLOCK):
            raise Unsupported(f"its blocks of {' and '.join(map(str, blocks))} do not fit")
        parts = [
            repeat_blocks(of(q), axis, block // common)
            for q, block in zip(operands, blocks, strict=True)
        ]
        counts = {x.shape[:axis] + x.shape[axis + 1 :] for x in parts}
        if len(counts) > 1 or len({_is(x) for x in parts}) > 1:
            shapes = " and ".join(str(of(q).shape) for q in operands)
            raise Unsupported(f"the scales of its operands differ in shape: {shapes}")
        if not _is(parts[0]):
            return concatenate_codes(parts, axis)
        for x in parts[1:]:
            _check_alike(parts[0], x)
        return _concatenate_stored(parts, axis)

    return dataclasses.replace(
        first,
        codes=joined(lambda q: q.codes),
        scale=of_blocks(lambda q: q.scale),
        zero_point=None if first.zero_point is None else of_blocks(lambda q: q.zero_point),
        offset=None if first.offset is None else of_blocks(lambda q: q.offset),
        values=None if first.values is None else joined(lambda q: q.values),
    )


def multiply(
    q: QTensor, factor: jax.Array, operation: Callable[[jax.Array, jax.Array], jax.Array]
) -> QTensor:
    """q times or by a factor that is one number per block, which becomes part of the scale.

    Args:
        q: the quantized array.
        factor: a scalar, or an array that broadcasts against q. Blocks are divided along its axes
            longer than 1, unless too few elements would share a scale.
        operation: `lax.mul` or `lax.div`.
    """
    factor = jnp.asarray(factor)
    if factor.ndim:
        places = q.stored_axes(range(q.ndim))
        factor = factor.transpose([places.index(a) for a in range(q.ndim)])
        q = _with_block_per_factor(q, factor.shape)

    def scaled(x):
        return (
            None if x is None else operation(x, jnp.broadcast_to(factor.astype(x.dtype), x.shape))
        )

    return dataclasses.replace(
        q,
        scale=scaled(scale_values(q.scale)),
        offset=None if q.offset is None else scaled(scale_values(q.offset)),
        values=scaled(q.values),
    )


def _with_block_per_factor(q, lengths):
    """q with what it has per block repeated along axes whose blocks a factor tells apart."""
    times = [
        length // count if n > 1 else 1
        for n, length, count in zip(lengths, q.codes.shape, q.scale.shape, strict=True)
    ]
    count = q.scale.size * math.prod(times)
    if count > q.scale.size and count * _MIN_BLOCK > q.size:
        raise Unsupported(f"a factor of shape {tuple(lengths)} differs within blocks")

    def repeat(x):
        for axis, n in enumerate(times):
            x = repeat_blocks(x, axis, n)
        return x

    rest = {k: getattr(q, k) for k in ("zero_point", "offset") if getattr(q, k) is not None}
    return dataclasses.replace(
        q, scale=repeat(q.scale), **{name: repeat(x) for name, x in rest.items()}
    )
