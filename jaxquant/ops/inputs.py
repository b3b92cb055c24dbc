"""Applies the `inputs` of a QTensor to the other operand: changes it, then quantizes it."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import (
    FP8_E4M3,
    INT8,
    AbsMax,
    ArrayConfig,
    Axes,
    Inputs,
    QTensor,
    block_shape,
    quantize,
    quantize_with_scale,
    straight_through,
)
from ..jaxprs import (
    Function,
    by_generation,
    explicit_mesh,
    is_sharded,
    names_along,
    on_one_cpu,
    on_one_tpu,
    spec_of_type,
)
from ..kernels import cpu, pallas_tpu
from .operands import AxesOfBoth, Operand, has_symbolic_shape

# Rows of activations up to which one kernel beats four small fusions of XLA, and from which one
# pass over the memory beats its two. 4096 x 4096, bfloat16, microseconds: v5e 62 against 336, v6e
# 31 against 190. Those between are left to XLA, to fuse with what made them.
_ROWS = {"v5e": (64, 512), "v6e": (64, 512)}
# 32 rows of float32 must fit in VMEM several times.
_LONGEST_ROW = 2**16
_FORMATS = (INT8, FP8_E4M3)
_FLOATS = (jnp.float32, jnp.bfloat16)


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


def treat(
    lhs: Operand, rhs: Operand, contract: AxesOfBoth, channels: AxesOfBoth
) -> tuple[Operand, Operand, jax.Array | None]:
    """The operands, each after the `inputs` of the other were applied.

    Args:
        lhs, rhs: arrays and QTensors.
        contract: stored axes that are contracted, of both.
        channels: those of them that a multiplier has factors for.

    Returns:
        Both, and what lhs was just before its rows were quantized; None if it was not quantized
        in the way of `quantize_rows` to all codes of a format of 8 bits.
    """
    lhs_axes, rhs_axes = _axes(lhs, rhs, contract, channels)
    left, rows = _treated(lhs, rhs, *lhs_axes)
    return left, _treated(rhs, lhs, *rhs_axes)[0], rows


def treat_straight_through(
    lhs: Operand, rhs: Operand, contract: AxesOfBoth, channels: AxesOfBoth
) -> tuple[Operand, Operand]:
    """`treat` that returns dequantized values with straight-through derivatives."""
    lhs_axes, rhs_axes = _axes(lhs, rhs, contract, channels)
    return _straight_through(lhs, rhs, *lhs_axes), _straight_through(rhs, lhs, *rhs_axes)


def quantize_inputs(x: jax.Array, config: ArrayConfig, axis: Axes, other: Any = None) -> QTensor:
    """`quantize`, in one pass over memory where kernels of this package are faster.

    If x or the other operand is sharded along explicit axes of a mesh, each device quantizes the
    rows that it has.
    """
    if not _is_of_rows(x, config, axis):
        return quantize(x, config, axis)
    mesh, spec = explicit_mesh(x, *jax.tree.leaves(other)), jax.P(*spec_of_type(x))
    if mesh is None:
        return _quantize_at_once(x, config, axis)
    run = partial(_quantize_at_once, config=config, axis=axis)
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def quantize_rows(x: jax.Array, config: ArrayConfig, *, interpret: bool = False) -> QTensor:
    """8-bit codes of (..., K), one scale per row; `interpret` runs without a TPU, for tests."""
    rows = x.reshape(-1, x.shape[-1])
    qmin, qmax = (float(q) for q in config.bounds)
    codes, scale = pallas_tpu.quantize_rows(
        rows, qmin, qmax, config.format.dtype, interpret=interpret
    )
    scale = scale.reshape(*x.shape[:-1], 1)
    return QTensor(codes.reshape(x.shape), scale, format=config.format, dtype=x.dtype)


def quantize_rows_natively(x: jax.Array, config: ArrayConfig) -> QTensor:
    """Int8 codes of (..., K), one scale per row, by a native kernel: the bits of `quantize`."""
    qmin, qmax = (int(q) for q in config.bounds)
    codes, scale = cpu.quantize_rows(x, qmin, qmax)
    return QTensor(codes, scale, format=config.format, dtype=x.dtype)


def _quantize_at_once(x: jax.Array, config: ArrayConfig, axis: Axes) -> QTensor:
    """Rows, in one pass on the platforms where that is supported and pays off."""

    def by_xla(x: jax.Array) -> QTensor:
        return quantize(x, config, axis)

    def at_once(x: jax.Array) -> QTensor:
        return on_one_tpu(lambda x: quantize_rows(x, config), by_xla, x)

    def on_cpu(x: jax.Array) -> QTensor:
        return on_one_cpu(lambda x: quantize_rows_natively(x, config), by_xla, x)

    def on_tpu(x: jax.Array) -> QTensor:
        return by_generation(dict.fromkeys(chips, at_once), by_xla, x)

    rows, length = math.prod(x.shape[:-1]), x.shape[-1]
    chips = [c for c, (few, many) in _ROWS.items() if not few < rows < many]
    chips = chips if length <= _LONGEST_ROW else []
    branches: dict[str, Function] = {"tpu": on_tpu} if chips else {}
    # 2 cores, AVX512, float32, microseconds against those of XLA: 15 and 20 for 1 x 4096, 13 and 22
    # for 8 x 384, 1000 and 3200 for 512 x 4096; equal for 1 x 32 and 64 x 4096.
    if config.format == INT8 and cpu.unavailable() is None:
        branches["cpu"] = on_cpu
    return lax.platform_dependent(x, **branches, default=by_xla) if branches else by_xla(x)


def _is_of_rows(x: jax.Array, config: ArrayConfig, axis: Axes) -> bool:
    """Whether devices hold whole rows, of which the config asks for 8-bit codes and one scale."""
    if not _has_rows(x, config, axis) or names_along(x, x.ndim - 1):
        return False
    return not is_sharded(x) or explicit_mesh(x) is not None


def _has_rows(x: jax.Array, config: ArrayConfig, axis: Axes) -> bool:
    """Whether the config asks for 8-bit codes of rows of floats, with one scale each."""
    if not isinstance(x, jax.Array) or x.dtype not in _FLOATS or has_symbolic_shape(x):
        return False
    if 0 in (x.ndim, x.size):
        return False
    is_plain = config.format in _FORMATS and (config.range, config.symmetric) == (AbsMax(), True)
    has_float32 = config.stored_scale_dtype == "float32"
    per_row = (*(1,) * (x.ndim - 1), x.shape[-1])
    return is_plain and has_float32 and block_shape(x.shape, config, axis) == per_row


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
) -> tuple[Operand, jax.Array | None]:
    """The operand, and what it was before its rows were quantized, as `treat` returns it."""
    inputs = _inputs_for(x, other)
    if inputs is None:
        return x, None
    values = _prepared(x, other, channels)
    quantized, config = _quantized(values, other, shared, channels), inputs.config
    if config is None or inputs.scale is not None:
        return quantized, None
    has_rows = _has_rows(values, config, _shared_axis(config, shared, channels))
    return quantized, values if has_rows and config.value_range is None else None


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
