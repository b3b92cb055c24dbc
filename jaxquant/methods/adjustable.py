"""Rounding that can be trained: an offset for each weight, and factors of each group's range."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..core import (
    ArrayConfig,
    Format,
    Groups,
    QTensor,
    blocks_between,
    encode,
    fit_zero_point,
    scale_values,
    split_groups,
    store_scale,
)

# How far from the edge of the cell of its code a weight stays, in codes.
_MARGIN = 0.01


class Adjustments(NamedTuple):
    """What is trained. A pytree; also the type of its gradients.

    Attributes:
        offset: in [-1/2, 1/2], added to weights before they are rounded, in units of codes; in the
            shape of the groups' values.
        low, high: factors of the ends of the range of each group, in [0, 2].
    """

    offset: jax.Array
    low: jax.Array
    high: jax.Array

    def stepped(self, gradients: "Adjustments", rate: jax.Array) -> "Adjustments":
        """A step of gradient descent by signs, within the bounds."""
        moved = jax.tree.map(lambda x, g: x - rate * jnp.sign(g), self, gradients)
        factors = (jnp.clip(x, 0, 2) for x in moved[1:])
        return Adjustments(jnp.clip(moved.offset, -0.5, 0.5), *factors)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class AdjustableRounding:
    """An array with scales and codes to start with, as a function of `Adjustments`. A pytree.

        scale = scale_0 * high                              q = round(W / scale + shift + offset)
        scale = (high_0 * high - low_0 * low) / (qmax - qmin), and a new zero point, if asymmetric

    `shift` moves weights into the cells of the codes of the start, so that these are what zero
    offsets give, and so that a code turns first towards its weight. Codebooks and floating-point
    formats round between the neighbouring entries in the same way.

    Attributes:
        groups: the array.
        shift: in units of codes, or of the scale for formats that do not round to integers.
        start: the QTensor.
        config: static.
    """

    groups: Groups
    shift: jax.Array
    start: QTensor
    config: ArrayConfig = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, x: jax.Array, start: QTensor, config: ArrayConfig) -> "AdjustableRounding":
        """The rounding of an array that starts at a QTensor of it.

        Raises:
            ValueError: the QTensor has an offset.
        """
        if start.offset is not None:
            raise ValueError(
                f"The start must not have an offset, as that of HQQ has; got {start!r}. Start from "
                "another method."
            )
        groups = split_groups(x, blocks_between(x.shape, start.scale.shape))
        step = groups.per_element(scale_values(start.scale))
        position = groups.values / step + _zero(groups, start.zero_point)
        codes = split_groups(start.astype(jnp.float32).decode(), groups.blocks).values / step
        low, high = _cell(codes + _zero(groups, start.zero_point), config.format)
        shift = jnp.clip(position, low, high) - position
        return cls(groups, shift, dataclasses.replace(start, inputs=None), config)

    def initial(self) -> Adjustments:
        """No adjustment."""
        ones = self.groups.per_element(jnp.ones(self.groups.scale_shape, jnp.float32))
        return Adjustments(jnp.zeros_like(self.groups.values), ones, ones)

    def values(self, adjustments: Adjustments) -> jax.Array:
        """The decoded array, with straight-through gradients for the adjustments."""
        return self._rounded(adjustments)[0].reshape(self.groups.shape)

    def quantized(self, adjustments: Adjustments) -> QTensor:
        """The adjusted QTensor."""
        values, scale, zero_point = self._rounded(adjustments)
        groups = dataclasses.replace(self.groups, values=values)
        return encode(groups, scale, zero_point, self.config)

    def _rounded(
        self, adjustments: Adjustments
    ) -> tuple[jax.Array, jax.Array | QTensor, jax.Array | None]:
        """Decoded values, stored scales and zero points."""
        groups, config, start = self.groups, self.config, self.start
        before, first = (
            groups.per_element(scale_values(start.scale)),
            _zero(groups, start.zero_point),
        )
        low, high = self._ends(first)
        low, high = low * adjustments.low, high * adjustments.high
        wanted = before * (high if start.zero_point is None else high - low)
        unit: Any = start.scale.scale if isinstance(start.scale, QTensor) else None
        fixed = groups.per_group(jax.lax.stop_gradient(wanted))
        scale = store_scale(fixed, config, unit)
        step = _straight_through(wanted, groups.per_element(scale_values(scale)))
        zero_point = None
        if start.zero_point is not None:
            span = config.bounds[1] - config.bounds[0]
            bottom = jax.lax.stop_gradient(low * span * before)
            zero_point = fit_zero_point(groups, bottom, scale, config)
        zero = _zero(groups, zero_point)
        moved = groups.values / step + zero + self.shift
        rounded = _round(moved, adjustments.offset, config)
        return (rounded - zero) * step, scale, zero_point

    def _ends(self, zero_point: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The ends of the range of the start, in units of its scale times the number of codes."""
        if self.start.zero_point is None:
            return -jnp.ones_like(zero_point), jnp.ones_like(zero_point)
        qmin, qmax = self.config.bounds
        return (qmin - zero_point) / (qmax - qmin), (qmax - zero_point) / (qmax - qmin)


def _zero(groups: Groups, zero_point: jax.Array | None) -> jax.Array:
    """Zero points that broadcast with the values of groups."""
    if zero_point is None:
        zero_point = jnp.zeros(groups.scale_shape, jnp.float32)
    return groups.per_element(zero_point)


def _straight_through(x: jax.Array, value: jax.Array) -> jax.Array:
    """The value, with the gradient of x."""
    return x + jax.lax.stop_gradient(value - x)


def _round(x: jax.Array, offset: jax.Array, config: ArrayConfig) -> jax.Array:
    """The code, or the entry of a grid, next to x, after the offset was added."""
    if config.format.rounds:
        x = jnp.clip(x + offset, *config.bounds)
        return _straight_through(x, jnp.round(x))
    grid = jnp.asarray(_grid(config.format))
    index = jnp.searchsorted(grid, jax.lax.stop_gradient(x), side="right", method="compare_all")
    below = jnp.clip(index - 1, 0, len(grid) - 2)
    gap = grid[below + 1] - grid[below]
    part = jnp.clip((x - grid[below]) / gap + offset, 0, 1)
    return grid[below] + gap * _straight_through(part, jnp.round(part))


def _cell(entry: jax.Array, format: Format) -> tuple[jax.Array, jax.Array]:
    """The ends of what is rounded to an entry, a little inside."""
    if format.rounds:
        return entry - (0.5 - _MARGIN), entry + (0.5 - _MARGIN)
    grid = _grid(format)
    inner = (grid[1:] + grid[:-1]) / 2
    margins = _MARGIN * np.diff(grid)
    low = np.concatenate([[-np.inf], inner + margins]).astype(np.float32)
    high = np.concatenate([inner - margins, [np.inf]]).astype(np.float32)
    index = jnp.searchsorted(jnp.asarray(inner), entry, method="compare_all")
    return jnp.asarray(low)[index], jnp.asarray(high)[index]


def _grid(format: Format) -> np.ndarray:
    """All values of a codebook or a floating-point format, ascending."""
    if format.codebook is not None:
        return np.asarray(format.codebook, np.float32)
    numbers = np.arange(2**format.bits, dtype=np.uint8).view(jnp.dtype(format.dtype))
    values = np.unique(numbers.astype(np.float32))
    return values[(values >= format.qmin) & (values <= format.qmax)]
