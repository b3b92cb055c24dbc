"""Rows of a quantized array, such as the embeddings of tokens."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..core import LowRank, QTensor
from ..jaxprs import OutSharding, names_along, run_with_out_sharding, without_names
from .low_rank import take_low_rank
from .operands import Operand, OperandLike, as_operands, stored_axes


def take(
    a: OperandLike,
    indices: jax.typing.ArrayLike,
    axis: int | None = None,
    *,
    mode: str | None = None,
    unique_indices: bool = False,
    indices_are_sorted: bool = False,
    fill_value: jax.typing.ArrayLike | None = None,
    out_sharding: OutSharding = None,
) -> jax.Array:
    """`jax.numpy.take` from an array or a QTensor: gathers codes and scales, then dequantizes.

        out[..., i, ...] = dequantize(a)[..., indices[i], ...]

    Args:
        a: array or QTensor.
        indices: integers of any shape.
        axis: axis to take along; None takes from the flattened array, which dequantizes all.
        mode: "fill" (the default: `fill_value`, or NaN, for indices out of bounds; negative
            ones count from the end), "clip", "wrap" or "promise_in_bounds".
        unique_indices, indices_are_sorted: hints, as for `jax.numpy.take`.
        fill_value: value for indices out of bounds in mode "fill".
        out_sharding: sharding of the result over explicit axes of a mesh, as for
            `x.at[indices].get` in JAX. None if it follows from those of a and indices.

    Returns:
        Array in the dtype of a, with the shape of indices in place of axis.

    Raises:
        ValueError: indices are not integers, the mode is unknown, axis is out of range, or
            out_sharding is not a sharding.

    Gradients: scales of 16 bits or more get theirs.
    Error: none; equal to `jnp.take` from the dequantized array.

    Example:
        >>> table = jq.quantize(jnp.ones((10, 4)), jq.ArrayConfig(), axis=1)
        >>> jq.take(table, jnp.array([3, 7]), axis=0).shape
        (2, 4)
    """
    (a,) = as_operands((a,), None)
    hints: dict[str, Any] = {
        "unique_indices": unique_indices,
        "indices_are_sorted": indices_are_sorted,
    }
    if out_sharding is not None:
        run = partial(take, axis=axis, mode=mode, fill_value=fill_value, **hints)
        return _sharded(run, out_sharding, a, jnp.asarray(indices), axis)
    if isinstance(a, LowRank):
        rows = partial(take, indices=indices, mode=mode, **hints)
        return take_low_rank(rows, a, axis, fill_value)
    if axis is None or not isinstance(a, QTensor):
        return jnp.take(
            a.dequantize() if isinstance(a, QTensor) else a,
            indices,
            axis,
            mode=mode,
            fill_value=fill_value,  # pyright: ignore[reportArgumentType] (a Python number there)
            **hints,
        )
    indices = jnp.asarray(indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices must be integers; got {indices.dtype}. Cast them first.")
    if mode is not None and mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, or None; got {mode!r}.")
    if not -a.ndim <= axis < a.ndim:
        raise ValueError(f"axis must be an axis of shape {a.shape}; got {axis}.")
    if indices.dtype.itemsize < 4:
        # int8 cannot hold lengths above 127, and arithmetic would wrap around.
        indices = indices.astype(jnp.int32)
    fill_value = jnp.nan if fill_value is None else fill_value
    static = axis % a.ndim, mode or "fill", unique_indices, indices_are_sorted
    return _take(a, indices, fill_value, *static)


def _sharded(
    run: Callable[..., jax.Array],
    out_sharding: OutSharding,
    a: Any,
    indices: jax.Array,
    axis: int | None,
) -> jax.Array:
    """`run(a, indices)` with `out_sharding`.

    XLA (jax 0.10.2, 0.12.0) returns wrong values if a mesh axis that splits the axis of the lookup
    splits another axis of the result. So the result is first sharded without such axes.
    """
    first = without_names(out_sharding, _names_along(a, axis))
    out = run_with_out_sharding(run, first, a, indices)
    return out if first == out_sharding else jax.sharding.reshard(out, out_sharding)


def _names_along(a: Operand | LowRank, axis: int | None) -> set[str]:
    """The mesh axes that split an axis of an operand."""
    if isinstance(a, LowRank):
        return _names_along(a.base, axis) | _names_along(a.a, axis)
    (stored,) = (None,) if axis is None else stored_axes(a, [axis])
    return set[str]().union(*(names_along(x, stored) for x in jax.tree.leaves(a)))


def _from_start(indices: jax.Array, length: int) -> jax.Array:
    """Negative indices count from the end."""
    return jnp.where(indices < 0, indices + length, indices)


# What brings indices into bounds, given the length of the axis, and whether to fill outside.
_MODES = {
    "fill": (lambda i, n: jnp.clip(_from_start(i, n), 0, n - 1), True),
    "clip": (lambda i, n: jnp.clip(i, 0, n - 1), False),
    "wrap": (lambda i, n: i % n, False),
    "promise_in_bounds": (lambda i, n: i, False),
}


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _take(
    a: QTensor,
    indices: jax.Array,
    fill_value: jax.typing.ArrayLike,
    axis: int,
    mode: str,
    unique: bool,
    is_sorted: bool,
) -> jax.Array:
    length, (stored,) = a.shape[axis], a.stored_axes([axis])
    bound, fills = _MODES[mode]
    bounded = bound(indices, length)

    def gather(x: jax.Array) -> jax.Array:
        before, count, after = x.shape[:stored], x.shape[stored], x.shape[stored + 1 :]
        if count == 1:
            return x.reshape(*before, *(1,) * indices.ndim, *after)
        block = length // count if count else 1
        return jnp.take(
            x,
            bounded // block,
            stored,
            mode="clip",
            unique_indices=unique and block == 1,
            indices_are_sorted=is_sorted,
        )

    bare = dataclasses.replace(a, inputs=None, order=None)
    rows = jax.tree.map(gather, bare).decode()
    out = rows.transpose(_logical_permutation(a, axis, stored, indices.ndim))
    if not fills:
        return out
    index = _from_start(indices, length)
    is_inside = (index >= 0) & (index < length)
    fill = jnp.asarray(fill_value).astype(out.dtype)
    mask_shape = (*(1,) * axis, *indices.shape, *(1,) * (a.ndim - axis - 1))
    return jnp.where(is_inside.reshape(mask_shape), out, fill)


def _logical_permutation(a: QTensor, axis: int, stored: int, added: int) -> tuple[int, ...]:
    """The permutation from stored to logical axes, after `added` axes replaced one."""
    place = []
    for logical, source in enumerate(a.stored_axes(range(a.ndim))):
        first = source + (added - 1) * (source > stored)
        place += range(stored, stored + added) if logical == axis else [first]
    return tuple(place)
