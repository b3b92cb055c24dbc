"""Taps on the parameters of a model, which sum statistics of the activations in each product."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..core import Format, Inputs, QTensor
from ..jaxprs import is_sharded, run_with_out_sharding
from ..methods import CrossMoment, Statistic
from ..methods.internal import stack_axes
from ..ops import Activations

# Name of the axis of the two models whose activations `CrossMoment` compares.
PAIR = "float and quantized"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What a tap knows of its parameter.

    Attributes:
        path, shape: of the parameter.
        axes: those that are contracted, from 0 up.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def leading(self) -> tuple[int, ...]:
        """The lengths of the axes that may be stacked layers or experts."""
        return self.shape[: stack_axes(len(self.shape), self.axes)]

    @property
    def channels(self) -> int:
        """The number of contracted elements."""
        return math.prod(self.shape[a] for a in self.axes)


def with_tap(weight: jax.Array, axes: tuple[int, ...], tap: Any) -> QTensor:
    """A float array with a tap: the codes are its elements, and all scales are 1.

    Args:
        weight: the array.
        axes: those that products contract, from 0 up.
        tap: as in `Inputs`.
    """
    weight = jnp.asarray(weight)
    info, name = jnp.finfo(weight.dtype), str(weight.dtype)
    scale = [1 if a in axes else n for a, n in enumerate(weight.shape)]
    return QTensor(
        weight,
        jnp.ones(scale, jnp.float32),
        inputs=Inputs(tap=tap),
        format=Format(name, name, float(info.min), float(info.max)),
        dtype=weight.dtype,
    )


def with_statistics(
    weight: jax.Array,
    parameter: Parameter,
    kinds: tuple[type[Statistic], ...],
    mask: jax.Array | None,
    take: Callable[..., None],
    meet: Callable[[], None],
) -> QTensor:
    """A parameter that sends statistics of its activations to `take`, with numbers of slices."""
    leading = parameter.leading
    numbers = jnp.arange(math.prod(leading), dtype=jnp.int32).reshape(leading)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*leading, *mask.shape))
    tap = _Tap(numbers, mask, parameter=parameter, kinds=kinds, take=take, meet=meet)
    return with_tap(weight, parameter.axes, tap)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Tap:
    """Sums statistics of activations, and sends them to the host.

    Attributes:
        numbers: the indices of the slices of the parameter that is multiplied.
        mask: for each of them, the weights of the rows, if any.
        parameter: what is multiplied, static.
        kinds: which statistics, static.
        take: gets the numbers and the sums, static.
        meet: called when a product is traced, static.
    """

    numbers: jax.Array
    mask: jax.Array | None
    parameter: Parameter = dataclasses.field(kw_only=True, metadata={"static": True})
    kinds: tuple[type[Statistic], ...] = dataclasses.field(kw_only=True, metadata={"static": True})
    take: Callable[..., None] = dataclasses.field(kw_only=True, metadata={"static": True})
    meet: Callable[[], None] = dataclasses.field(kw_only=True, metadata={"static": True})

    def __call__(self, activations: Activations) -> None:
        x = activations.unfolded()
        if x is None:
            return
        self._check(activations, x.shape[-1])
        self.meet()
        batch = activations.batch
        weights = self._weights(x.shape[batch:-1])
        x = x.reshape(*x.shape[:batch], weights.size, x.shape[-1])

        def sums(x: jax.Array, weights: jax.Array) -> list[Statistic]:
            pair = None
            if CrossMoment in self.kinds:
                # Both models run side by side, as two examples of a batch.
                pair = jax.lax.all_gather(x, PAIR)
                x, pair = pair[0], jnp.moveaxis(pair, 0, batch)
            return [
                _sum(kind, pair if kind is CrossMoment else x, weights, activations)
                for kind in self.kinds
            ]

        # XLA adds the parts of several devices.
        replicated = jax.typeof(x).sharding.update(spec=jax.P()) if is_sharded(x) else None
        found = run_with_out_sharding(sums, replicated, x, weights)
        jax.debug.callback(self.take, self.numbers, *found)

    def _check(self, activations: Activations, channels: int) -> None:
        path, wanted = self.parameter.path, self.parameter.channels
        if not activations.is_along_scales or channels != wanted:
            raise ValueError(
                f"{path}: products must contract the axes of its rule, of {wanted} channels; got "
                f"{activations.operation} of {activations.stored_shape} along others, of "
                f"{channels}. Correct the axis of the rule; or exclude the parameter, "
                f"Rule({path!r}, None), if it is used along several axes, as tied weights are."
            )
        count, whole = self.numbers.size, math.prod(self.parameter.shape)
        if count > 1 and math.prod(activations.stored_shape) != whole:
            raise ValueError(
                f"{path}: products must use the whole stack, or slices that lax.scan makes; got "
                f"{activations.operation} of {activations.stored_shape}. Keep the layers as "
                f"separate parameters, run them with lax.scan, or exclude them, Rule({path!r}, "
                "None)."
            )

    def _weights(self, shape: tuple[int, ...]) -> jax.Array:
        """The weight of each row, (rows,)."""
        rows = math.prod(shape)
        if self.mask is None:
            return jnp.ones(rows, jnp.float32)
        depth = self.numbers.ndim
        mask = self.mask[(0,) * depth]
        is_flat = shape[:1] == (mask.size,)
        if not is_flat and shape[: mask.ndim] != mask.shape:
            raise ValueError(
                f"{self.parameter.path}: the mask must have the shape of the leading axes of its "
                f"rows; got {mask.shape} for rows {shape}. Collect without a mask, or leave it out."
            )
        return jnp.repeat(mask.ravel(), rows // max(mask.size, 1))


def _sum(kind: type[Statistic], x: Any, weights: jax.Array, activations: Activations) -> Statistic:
    """The statistic of one product, with an axis per batch axis, or for the groups of rows."""
    update: Callable[..., Statistic] = kind.init(x.shape[-1]).update
    if activations.group_sizes is not None:
        ends = jnp.cumsum(activations.group_sizes)
        group = jnp.searchsorted(ends, jnp.arange(weights.size), side="right")

        def of_group(number: jax.Array) -> Statistic:
            return update(x, weights * (group == number).astype(weights.dtype))

        return jax.lax.map(of_group, jnp.arange(ends.size))
    for _ in range(activations.batch):
        update = jax.vmap(update, (0, None))
    return update(x, weights)
