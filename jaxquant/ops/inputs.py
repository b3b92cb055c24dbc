"""Applies the `inputs` of a QTensor to the other operand: changes it, then quantizes it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import (
    AbsMax,
    ArrayConfig,
    Axes,
    Inputs,
    QTensor,
    bits_of,
    quantize_with_scale,
    straight_through,
)
from ..jaxprs import Function
from .input_rows import quantize_inputs
from .operands import AxesOfBoth, Operand


@dataclasses.dataclass(frozen=True)
class Activations:
    """The activations that a product multiplies with a QTensor, as its tap gets them.

    Attributes:
        values: the operand, with multiplier and permutation applied.
        batch: the number of batch axes of the product.
        group_sizes: number of rows that meet each matrix of a ragged product; None for other
            products.
        operation: name of the function of `jax.lax`.
        stored_shape: that of the codes of the QTensor.
        is_along_scales: whether the product contracts those axes of the QTensor along which its
            elements share a scale, and no others.
        unfolded: function that returns them as (batch axes, rows, contracted elements). The batch
            axes and the contracted elements are in the order of the QTensor's; rows have any number
            of axes. None for a convolution in groups.
    """

    values: jax.Array
    batch: int
    group_sizes: jax.Array | None
    operation: str
    stored_shape: tuple[int, ...]
    is_along_scales: bool
    unfolded: Callable[[], jax.Array | None]


def observe(lhs: Operand, rhs: Operand, spec: Any) -> tuple[Operand, Operand, Function]:
    """The operands without taps, after each tap was called with the operand that it observes.

    Also returns the function of the result that the taps make of it: each tap may return one, which
    gets the result as (batch axes, rows, output axes), in the order of the QTensor's stored axes.
    """
    _, (lhs_channels, rhs_channels) = zip(*_axes(lhs, rhs, spec.batch, spec.channels), strict=True)
    lhs_batch = _in_order_of(rhs, spec.batch[1], spec.batch[0])
    rhs_batch = _in_order_of(lhs, spec.batch[0], spec.batch[1])
    bare_lhs, change_lhs = _observed(lhs, rhs, rhs_batch, rhs_channels, spec, spec.contract[0])
    bare_rhs, change_rhs = _observed(rhs, lhs, lhs_batch, lhs_channels, spec, spec.contract[1])
    count = len(spec.batch[0])
    middle = count + lhs.ndim - count - len(spec.contract[0])

    def changed(out: jax.Array) -> jax.Array:
        batch, first, last = np.split(np.arange(out.ndim), [count, middle])
        if change_rhs is not None:
            order = _in_order_of(rhs, spec.batch[1], tuple(batch))
            out = _change(out, change_rhs, (*order, *first, *last))
        if change_lhs is not None:
            order = _in_order_of(lhs, spec.batch[0], tuple(batch))
            out = _change(out, change_lhs, (*order, *last, *first))
        return out

    return bare_lhs, bare_rhs, changed


def _change(out: jax.Array, change: Function, order: tuple[int, ...]) -> jax.Array:
    """A function of an array with its axes in another order."""
    return change(out.transpose(order)).transpose(np.argsort(order))


def prepare(lhs: Operand, rhs: Operand, channels: AxesOfBoth) -> tuple[Operand, Operand]:
    """The operands after all but the last step of `inputs`, with what that needs and no values.

    Args:
        lhs, rhs: arrays and QTensors.
        channels: contracted stored axes of both that a multiplier has factors for.
    """
    (_, lhs_channels), (_, rhs_channels) = _axes(lhs, rhs, ((), ()), channels)
    pairs = (lhs, rhs, lhs_channels), (rhs, lhs, rhs_channels)
    left, right = (
        x if _inputs_for(x, other) is None else _prepared(x, other, axes)
        for x, other, axes in pairs
    )
    return _bare(left), _bare(right)


def quantizes_parts(x: Operand, other: Any, shared: Sequence[int], parts: Sequence[Any]) -> bool:
    """Whether each device quantizes its part of the rows of x, with scales of its own.

    These are at most those of whole rows, whose largest magnitudes devices would compare first.
    Each device multiplies sums of its part by its scales, before devices add them.

    Args:
        x, other: prepared operands of a product.
        shared: contracted axes of x.
        parts: names of the axes of a mesh that divide each axis of x.
    """
    inputs = _inputs_for(x, other)
    if inputs is None or isinstance(x, QTensor) or not any(parts[a] for a in shared):
        return False
    config = inputs.config
    if config is None or inputs.scale is not None or config.per_tensor:
        return False
    # Scales of 8 bits depend on the largest of the array.
    is_plain = config.symmetric and bits_of(config.stored_scale_dtype) >= 16
    is_whole = config.group_size is None and config.format.group_size is None
    return is_plain and is_whole and isinstance(config.range, AbsMax)


def treat(
    lhs: Operand, rhs: Operand, contract: AxesOfBoth, channels: AxesOfBoth
) -> tuple[Operand, Operand]:
    """The operands, each after the `inputs` of the other were applied.

    Args:
        lhs, rhs: arrays and QTensors.
        contract: stored axes that are contracted, of both.
        channels: those of them that a multiplier has factors for.
    """
    lhs_axes, rhs_axes = _axes(lhs, rhs, contract, channels)
    return _treated(lhs, rhs, *lhs_axes), _treated(rhs, lhs, *rhs_axes)


def treat_straight_through(
    lhs: Operand, rhs: Operand, contract: AxesOfBoth, channels: AxesOfBoth
) -> tuple[Operand, Operand]:
    """`treat` that returns dequantized values with straight-through derivatives."""
    lhs_axes, rhs_axes = _axes(lhs, rhs, contract, channels)
    return _straight_through(lhs, rhs, *lhs_axes), _straight_through(rhs, lhs, *rhs_axes)


def _axes(
    lhs: Operand, rhs: Operand, contract: AxesOfBoth, channels: AxesOfBoth
) -> tuple[AxesOfBoth, AxesOfBoth]:
    """(contracted axes, channels) of each operand, channels in the order of the other's."""
    lhs_channels, rhs_channels = channels
    return (
        (contract[0], _in_order_of(rhs, rhs_channels, lhs_channels)),
        (contract[1], _in_order_of(lhs, lhs_channels, rhs_channels)),
    )


def _in_order_of(other: Operand, met: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """`axes` in the order of the logical axes of `other` that they meet, stored at `met`."""
    if not isinstance(other, QTensor):
        return axes
    logical = np.argsort(other.stored_axes(range(other.ndim))).tolist()
    return tuple(axis for _, axis in sorted(zip([logical[a] for a in met], axes, strict=True)))


def _inputs_for(x: Operand, other: Operand) -> Inputs | None:
    """The `inputs` of `other` that apply to x, or None. They do not apply to a quantized x."""
    inputs = other.inputs if isinstance(other, QTensor) else None
    if not isinstance(x, QTensor):
        return inputs
    name = None if inputs is None else inputs.changing_field
    if name is not None:
        raise ValueError(
            f"inputs.{name} cannot be applied to an operand that is quantized already; got {x!r}. "
            f"Apply it before you quantize the operand, and drop the {name}."
        )
    return None


def _bare(x: Operand) -> Operand:
    if not isinstance(x, QTensor):
        return x
    inputs = x.inputs
    if inputs is not None and inputs.config is None:
        inputs = None
    elif inputs is not None:
        has_scale = inputs.scale is not None
        inputs = Inputs(inputs.config, inputs.scale, inputs.zero_point if has_scale else None)
    return dataclasses.replace(x, inputs=inputs, values=None)


def _observed(
    other: Any,
    x: Operand,
    batch: tuple[int, ...],
    channels: tuple[int, ...],
    spec: Any,
    contract: tuple[int, ...],
) -> tuple[Operand, Function | None]:
    """`other` without its tap, after the tap was called with x, and what the tap returned.

    Args:
        other, x: the QTensor, and its activations.
        batch, channels: axes of x.
        spec: of the product.
        contract: stored axes of `other` that are contracted.
    """
    inputs = _inputs_for(x, other)
    if inputs is None or inputs.tap is None:
        return other, None
    values = _prepared(x, other, channels)

    def unfolded() -> jax.Array | None:
        patches = spec.unfold(values, other)
        if patches is None:
            return None
        rows = [a for a in range(values.ndim) if a not in batch + channels]
        patches = patches.transpose(*batch, *rows, *channels)
        split = len(batch) + len(rows)
        return patches.reshape(*patches.shape[:split], math.prod(patches.shape[split:]))

    lengths = enumerate(zip(other.codes.shape, other.scale.shape, strict=True))
    activations = Activations(
        values,
        len(batch),
        spec.group_sizes,
        spec.operation,
        other.codes.shape,
        all(scales == (1 if a in contract else n) for a, (n, scales) in lengths),
        unfolded,
    )
    change = inputs.tap(activations)
    return dataclasses.replace(other, inputs=dataclasses.replace(inputs, tap=None)), change


def _treated(
    x: Operand, other: Operand, shared: tuple[int, ...], channels: tuple[int, ...]
) -> Operand:
    inputs = _inputs_for(x, other)
    if inputs is None:
        return x
    return _quantized(_prepared(x, other, channels), other, shared, channels)


def _straight_through(
    x: Operand, other: Operand, shared: tuple[int, ...], channels: tuple[int, ...]
) -> Operand:
    """`_treated`, with the values of the quantized operand and the derivative of x."""
    inputs = _inputs_for(x, other)
    if inputs is None:
        return x
    x = _prepared(x, other, channels)
    if inputs.config is None:
        return x
    q = _quantized(lax.stop_gradient(x), other, shared, channels)
    assert isinstance(q, QTensor), "there is a config"
    parameters = inputs.scale, inputs.zero_point
    return straight_through(x, q, inputs.config, *parameters, margin=inputs.scale is None)


def _prepared(x: Any, other: Any, axes: tuple[int, ...]) -> jax.Array:
    """x with its channels permuted, multiplied and rotated, as `other` says.

    They lie along `axes`, in that order.
    """
    inputs = other.inputs
    # Masks and one-hot rows may be integers.
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(other.dtype)
    if inputs.permutation is not None:
        if len(axes) != 1 or inputs.permutation.shape != (x.shape[axes[0]],):
            raise ValueError(
                "inputs.permutation is for a QTensor that is contracted along one axis, and must "
                f"have its length; got {inputs.permutation.shape} for axes {axes} of an operand "
                f"of shape {x.shape}."
            )
        x = jnp.take(x, inputs.permutation, axes[0], unique_indices=True)
    if inputs.multiplier is not None:
        x = _multiplied(x, inputs, axes)
    return x if inputs.rotation is None else inputs.rotation.apply(x, axes)


def _multiplied(x: jax.Array, inputs: Inputs, axes: tuple[int, ...]) -> jax.Array:
    """x times the multiplier of its channels."""
    assert inputs.multiplier is not None, "the caller has checked it"
    lengths, multiplier = tuple(x.shape[a] for a in axes), inputs.multiplier
    is_of_windows = multiplier.ndim > len(axes)
    if is_of_windows and multiplier.size == math.prod(lengths):
        multiplier = multiplier.reshape(lengths)
    elif is_of_windows:
        raise ValueError(
            "inputs.multiplier of a convolution must have one factor per input channel, which all "
            f"pixels of a window share; got {multiplier.shape} for channels {lengths}. Methods "
            "such as AWQ and SmoothQuant choose a factor per pixel: use another, such as GPTQ, for "
            "kernels of several pixels, or scale the channels beforehand."
        )
    if multiplier.shape != lengths:
        raise ValueError(
            f"inputs.multiplier must have the shape of the contracted axes, {lengths}, in the "
            f"order of the QTensor's; got {multiplier.shape} for axes {axes} of an operand of "
            f"shape {x.shape}."
        )
    ascending = multiplier.transpose(np.argsort(axes))
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    return x * ascending.reshape(shape).astype(x.dtype)


def _quantized(
    x: jax.Array, other: Any, shared: tuple[int, ...], channels: tuple[int, ...]
) -> Operand:
    inputs, config = other.inputs, other.inputs.config
    if config is None:
        return x
    if inputs.scale is not None:
        return quantize_with_scale(x, inputs.scale, inputs.zero_point, config)
    try:
        return quantize_inputs(x, config, _shared_axis(config, shared, channels), other)
    except ValueError as error:
        raise ValueError(f"The inputs of {other!r} cannot be quantized: {error}") from error


def _shared_axis(config: ArrayConfig, shared: tuple[int, ...], channels: tuple[int, ...]) -> Axes:
    """Along all contracted axes, or in groups along the last of the channels."""
    is_grouped = config.group_size is not None or config.format.group_size is not None
    axes = (max(channels),) if is_grouped and channels else tuple(sorted(shared))
    return axes[0] if len(axes) == 1 else axes
