"""Operands of the three products of a training step, quantized in blocks of any length."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from .. import ops
from ..core import ArrayConfig, QTensor, encode, fit, group, hadamard, quantize_with_range
from .residuals import Residual

CODES = "jaxquant_codes"
# The signs of a rotation. One draw for all products, as in arXiv:2509.25149, section 4.2.
_SIGNS_SEED = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which elements of an operand share a scale. Hashable.

    Attributes:
        axes: the axes along which they do.
        blocks: how many along each; None for all.
        shape: of the operand, with zeros that complete its blocks.
    """

    axes: tuple[int, ...]
    blocks: tuple[int | None, ...]
    shape: tuple[int, ...]

    def config(self, config: ArrayConfig) -> ArrayConfig:
        """The config, with these blocks unless its format prescribes them."""
        if config.format.group_size is not None or None in self.blocks or not self.blocks:
            return dataclasses.replace(config, group_size=None)
        return dataclasses.replace(config, group_size=self.blocks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Padded:
    """A quantized operand with zeros that complete its last blocks. A pytree.

    Attributes:
        q: the operand with zeros.
        shape: of the operand without them, static.
    """

    q: QTensor
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def dtype(self) -> Any:
        """Dtype of the operand."""
        return self.q.dtype

    def dequantize(self) -> jax.Array:
        """The values of the codes, without the zeros."""
        return self.q.dequantize()[tuple(map(slice, self.shape))]


Kept = jax.Array | QTensor | Padded


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one operand of one product is quantized. Hashable; equal plans give equal codes.

    Attributes:
        config: None to leave it in float.
        layout: of the operand once it is rotated; None without a config.
        rotation: (axis, size) of the blocks that `rotate` multiplies by a matrix; None for none.
        covers: whether scales are rounded up to their dtype, so that no element is clipped.
    """

    config: ArrayConfig | None
    layout: Layout | None
    rotation: tuple[int, int] | None = None
    covers: bool = False

    def quantize(
        self, x: jax.Array, limit: jax.Array | None = None, key: jax.Array | None = None
    ) -> Kept:
        """The operand, quantized; in float if it is empty or has no config.

        Args:
            x: the operand.
            limit: the end of its range; None to compute it from x.
            key: random key for stochastic rounding; None rounds to nearest.
        """
        dtype = x.dtype
        if self.rotation is not None:
            x = rotate(x, *self.rotation)
        if self.config is None or self.layout is None or x.size == 0:
            return x.astype(dtype)
        if limit is not None:
            return quantize_with_range(x, -limit, limit, self.config, key=key)
        q = _quantize(x, self.config, self.layout, key, self.covers).astype(dtype)
        q = q.reorder(ops.best_order(q, jax.default_backend()))
        return q if self.layout.shape == x.shape else Padded(q, x.shape)


def _quantize(x, config, layout, key, covers):
    config = layout.config(config)
    if layout.shape != x.shape:
        x = jnp.pad(x, [(0, n - m) for n, m in zip(layout.shape, x.shape, strict=True)])
    axis = layout.axes[0] if len(layout.axes) == 1 else layout.axes
    groups = group(x, config, axis)
    scale, zero_point = fit(groups, config, covers=covers or key is not None)
    return encode(groups, scale, zero_point, config, key)


def plan_operand(
    shape: tuple[int, ...],
    config: ArrayConfig | None,
    contract: Sequence[int],
    groups: Mapping[int, int],
    rotation: tuple[int, int] | None,
    *,
    covers: bool,
) -> Plan:
    """The plan of one operand.

    Args:
        shape: of the operand.
        config: of the operand; None to leave it in float.
        contract: the axes that the product sums over.
        groups: elements per scale along each axis that has groups.
        rotation, covers: as the attributes.
    """
    if rotation is not None:
        axis, size = rotation
        shape = (*shape[:axis], _up(shape[axis], size), *shape[axis + 1 :])
    if config is None or not shape:
        return Plan(None, None, rotation)
    if not groups:
        axes = tuple(range(len(shape))) if config.per_tensor else tuple(sorted(contract))
        return Plan(config, Layout(axes, (None,) * len(axes), shape), rotation, covers)
    is_fixed = config.format.group_size is not None
    blocks = {a: n if is_fixed else min(n, max(shape[a], 1)) for a, n in groups.items()}
    padded = tuple(_up(n, blocks.get(a, 1)) for a, n in enumerate(shape))
    return Plan(config, Layout(tuple(blocks), tuple(blocks.values()), padded), rotation, covers)


def _up(length, size):
    return math.ceil(length / size) * size


def as_operand(x: Kept) -> jax.Array | QTensor:
    """What an operation gets for an operand: its codes, or values of blocks that were padded."""
    return x.dequantize() if isinstance(x, Padded) else x


def name_codes(x: Kept) -> Kept:
    """x, with a name on its codes and scales by which `save_codes` keeps them."""
    if isinstance(x, jax.Array):
        return x
    # What is kept of them has the name.
    return jax.tree.map(partial(checkpoint_name, name=CODES), Residual.of(x)).restore()


def rotate(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x times a random Hadamard matrix along an axis, in blocks of `size`, padded with zeros.

    Blocks of both operands of a product that contracts the axis are multiplied by the same
    orthogonal matrix, so that the product is the same. In float32, or float64 for float64.
    """
    padded = math.ceil(x.shape[axis] / size) * size
    moved = jnp.moveaxis(x, axis, -1)
    moved = jnp.pad(moved, [(0, 0)] * (x.ndim - 1) + [(0, padded - x.shape[axis])])
    compute = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    blocks = moved.astype(compute).reshape(*moved.shape[:-1], padded // size, size)
    matrix = jnp.asarray(rotation_matrix(size), compute)
    rotated = jnp.matmul(blocks, matrix, precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(rotated.reshape(moved.shape), -1, axis)


def rotation_matrix(size: int) -> np.ndarray:
    """diag(signs) hadamard(size) / sqrt(size) in float64, with the same signs for all products."""
    signs = np.random.default_rng(_SIGNS_SEED).choice([-1.0, 1.0], size)
    return signs[:, None] * hadamard(size) / math.sqrt(size)
