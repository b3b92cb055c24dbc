"""Which elements share a scale. A block shape has one length per axis and tiles the array.

An array is split into blocks by a reshape that splits only the axes with several blocks longer
than one. Axes are never transposed. Below, "split" refers to an array reshaped in this way.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .config import ArrayConfig

Axes = int | tuple[int, ...] | None


def check_axis(axis: Axes) -> None:
    """Checks that `axis` is an axis, a tuple of axes or None.

    Functions with a static `axis` call it before `jax.jit`, which reports an array or a list as a
    "non-hashable static argument".

    Raises:
        ValueError: axis is not an int, a tuple of distinct ints, or None.
    """
    if isinstance(axis, jax.Array | np.ndarray):
        raise ValueError(
            "axis must be an int, a tuple of distinct ints, or None for all axes; got an array, "
            f"{axis.dtype} of shape {axis.shape}. Pass a random key by name: key=key."
        )
    axes = axis if isinstance(axis, tuple) else (axis,)
    is_index = all(isinstance(a, int) and not isinstance(a, bool) for a in axes)
    if axis is not None and not (is_index and len(set(axes)) == len(axes)):
        raise ValueError(
            f"axis must be an int, a tuple of distinct ints, or None for all axes; got {axis!r}."
        )


def normalize_axes(axis: Axes, ndim: int) -> tuple[int, ...]:
    """The axes selected by `axis` in an array of rank `ndim`, counted from 0; all for None.

    Raises:
        ValueError: an axis is out of range or repeated, or as for `check_axis`.
    """
    check_axis(axis)
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    if axes and ndim == 0:
        raise ValueError(f"axis must be None or () for a scalar, which has no axes; got {axis}.")
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(
            f"axis must lie in -{ndim} .. {ndim - 1} for an array of {ndim} axes; got axis={axis}."
        )
    found = tuple(a % ndim for a in axes)
    if len(set(found)) < len(axes):
        raise ValueError(
            f"axis must name distinct axes of the array; got axis={axis} for {ndim} axes."
        )
    return found


def shared_axes(axis: Axes, ndim: int, config: ArrayConfig) -> tuple[int, ...]:
    """The axes along which elements share a scale: all axes if per tensor, otherwise `axis`.

    Raises:
        ValueError: as for `normalize_axes`.
    """
    return normalize_axes(None if config.per_tensor else axis, ndim)


def block_shape(shape: tuple[int, ...], config: ArrayConfig, axis: Axes = 0) -> tuple[int, ...]:
    """The block shape of an array of `shape` that is quantized along `axis`.

    Raises:
        ValueError: an axis is out of range, the number of group sizes differs from the number of
            axes, or a group size does not divide its axis.
    """
    axes = shared_axes(axis, len(shape), config)
    blocks = [1] * len(shape)
    for a, size in zip(axes, _group_sizes(config, axis, len(axes)), strict=True):
        blocks[a] = shape[a] if size is None else size
        if size is not None and shape[a] % size:
            is_fixed = config.format.group_size is not None
            other = "another format" if is_fixed else _divisors(shape[a], size)
            raise ValueError(
                f"group_size must divide axis {a}; got group_size={size} for shape {shape}. Pad "
                f"the axis, or choose {other}."
            )
    return tuple(blocks)


def _group_sizes(config: ArrayConfig, axis: Axes, count: int) -> tuple[int | None, ...]:
    """The group size along each of `count` axes."""
    if config.format.group_size is not None and count != 1:
        raise ValueError(f"{config.format} needs exactly one axis for its groups; got axis={axis}.")
    size = config.group_size or config.format.group_size
    sizes = size if isinstance(size, tuple) else (size,) * count
    if len(sizes) != count:
        raise ValueError(
            f"group_size must be one int, or one per axis; got {config.group_size} for axis {axis}."
        )
    return sizes


def _divisors(length: int, wanted: int) -> str:
    """The nearest divisors of `length` below and above `wanted`, as text."""
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    near = [max((d for d in divisors if d < wanted), default=None)]
    near += [min((d for d in divisors if d > wanted), default=None)]
    return " or ".join(str(d) for d in near if d is not None)


def blocks_between(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The block shape, from the shapes of an array and of its scales."""
    return tuple(n // s if s else 1 for n, s in zip(shape, scale_shape, strict=True))


def split(x: jax.Array, blocks: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """Splits the axes of x that have several blocks. Also returns the axes within a block.

    One axis per reshape, because JAX cannot tell how an array is sharded after two are split.
    """
    inner, place = [], 0
    for block in blocks:
        length = x.shape[place]
        if block not in (1, length):
            x = x.reshape(*x.shape[:place], length // block, block, *x.shape[place + 1 :])
            place += 1
        inner += [place] * (block != 1)
        place += 1
    return x, tuple(inner)


def join(x: jax.Array, shape: tuple[int, ...], blocks: tuple[int, ...]) -> jax.Array:
    """Inverse of `split`, for an array of `shape`."""
    for axis, (length, block) in enumerate(zip(shape, blocks, strict=True)):
        if block not in (1, length):
            x = x.reshape(*x.shape[:axis], length, *x.shape[axis + 2 :])
    return x


def to_blocks(scale: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
    """Reshapes an array with one element per block to broadcast with the split array."""
    shape = []
    for count, block in zip(scale.shape, blocks, strict=True):
        shape += [count] if block == 1 or count == 1 else [count, 1]
    return scale.reshape(shape)


def from_blocks(values: jax.Array, shape: tuple[int, ...], blocks: tuple[int, ...]) -> jax.Array:
    """Inverse of `to_blocks`: reshapes one element per block to the shape of the scales."""
    return values.reshape(scale_shape(shape, blocks))


def scale_shape(shape: tuple[int, ...], blocks: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of an array of `shape`."""
    return tuple(1 if block == n else n // block for n, block in zip(shape, blocks, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """An array split into the groups whose elements share a scale. A pytree.

    Attributes:
        values: the array in float32 (float64 for a float64 array), with its axes split into groups.
        axes: the axes of `values` within a group, static.
        blocks: the block shape, static.
        shape: shape of the array, static.
        dtype: dtype of the array, static.
    """

    values: jax.Array
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    blocks: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the scales: one element per group."""
        return scale_shape(self.shape, self.blocks)

    def per_element(self, scale: jax.Array) -> jax.Array:
        """Reshapes one element per group to broadcast with `values`, and casts to their dtype."""
        return to_blocks(scale.astype(self.values.dtype), self.blocks)

    def per_group(self, reduced: jax.Array) -> jax.Array:
        """Reshapes an array reduced over `axes` with keepdims to the shape of the scales."""
        return from_blocks(reduced, self.shape, self.blocks)


def split_groups(x: jax.Array, blocks: tuple[int, ...]) -> Groups:
    """Splits an array into groups with a block shape."""
    compute = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    values, axes = split(x.astype(compute), blocks)
    return Groups(values, axes, blocks, x.shape, x.dtype)
