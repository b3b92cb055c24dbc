"""Operands of a product: what their `inputs` ask for, and gradients through them."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import (
    Deferred,
    Inputs,
    LowRank,
    QTensor,
    bits_of,
    quantize_with_scale,
    straight_through,
)
from .dispatch import Factor, Operand
from .inputs import quantize_inputs

AxesOfBoth = tuple[tuple[int, ...], tuple[int, ...]]


def as_array(x: Operand) -> jax.Array | np.ndarray:
    """The operand as a float array with its axes as they are stored."""
    return x.decode() if isinstance(x, QTensor) else x


def stored_axes(x: Operand, axes) -> tuple[int, ...]:
    """Where logical axes of the operand lie, from 0 up."""
    return x.stored_axes(axes) if isinstance(x, QTensor) else tuple(a % x.ndim for a in axes)


def check_operands(factors: Sequence[Factor], implementation: str | None) -> tuple[Operand, ...]:
    """`check_factors` for an operation that knows nothing of adapters.

    Raises:
        ValueError: an operand has adapters, or as for `check_factors`.
    """
    for x in factors:
        if isinstance(x, LowRank):
            raise ValueError(
                "Only matmul, einsum, dot_general and take know adapters; got "
                f"{x!r}. Merge it first, by jaxquant.training.merge."
            )
    return check_factors(factors, implementation)  # pyright: ignore[reportReturnType] (checked)


def check_factors(
    factors: Sequence[Factor], implementation: str | None
) -> tuple[Operand | LowRank, ...]:
    """What a product is given, checked before anything asks for its shape, and quantized.

    Raises:
        ValueError: an operand is neither an array nor quantized, or `implementation` is named
            for a product of arrays.
    """
    operands = tuple(x.quantize() if isinstance(x, Deferred) else x for x in factors)
    for x in operands:
        if not isinstance(x, jax.Array | np.ndarray | np.generic | QTensor | LowRank):
            raise ValueError(
                f"Operands must be arrays or QTensors; got {type(x).__name__}. Use jnp.asarray."
            )
    if implementation is not None and not any(map(is_quantized, operands)):
        shapes = " and ".join(f"{x.dtype} {x.shape}" for x in operands)
        raise ValueError(
            f"implementation={implementation!r} is for products with a QTensor; got {shapes}. "
            "Quantize one, or leave it None."
        )
    return operands


def repeat_groups(values: jax.Array, shape: Sequence[int], axes: Iterable[int]) -> jax.Array:
    """Scales or zero points, one per group, repeated to one per element along `axes` of `shape`."""
    for axis in axes:
        if values.shape[axis] != shape[axis]:
            values = jnp.repeat(values, shape[axis] // values.shape[axis], axis)
    return values


def is_quantized(x: Operand | LowRank) -> bool:
    """Whether an operand is more than an array."""
    return isinstance(x, QTensor | LowRank)


def result_dtype(lhs: Operand, rhs: Operand, preferred: jax.typing.DTypeLike | None):
    """The dtype that `jnp` gives a product of the arrays that the operands stand for.

    Raises:
        ValueError: the preferred dtype is not floating.
    """
    if preferred is None:
        return jax.dtypes.canonicalize_dtype(jnp.promote_types(lhs.dtype, rhs.dtype))
    if not jnp.issubdtype(preferred, jnp.floating):
        raise ValueError(
            "preferred_element_type must be floating, because a quantized operand stands for "
            f"floats; got {preferred}. For codes as integers, multiply `codes` themselves."
        )
    return jax.dtypes.canonicalize_dtype(preferred)


def why_unsupported_codes(x: Operand) -> str | None:
    """Why the operand does not have integer codes that int8 can hold, or None."""
    if not isinstance(x, QTensor):
        return f"an operand of {x.dtype} has no codes"
    if not x.format.rounds or jnp.iinfo(x.format.dtype).max > 127:
        return f"{x.format} codes are not integers within int8"
    return None


def why_unsupported_length(length: int, lhs: QTensor, rhs: QTensor) -> str | None:
    """Why int32 may not hold sums of so many products of codes less zero points, or None."""
    largest = length * _reach(lhs) * _reach(rhs)
    return None if largest < 2**31 else f"sums of {length} codes may leave int32"


def _reach(x):
    """The largest magnitude of code less zero point: 128 for int8, 255 with a zero point."""
    info = jnp.iinfo(x.format.dtype)
    return max(-info.min, info.max) if x.zero_point is None else info.max - info.min


def with_dequantized_gradient(
    fast: Callable[..., jax.Array],
    reference: Callable[..., jax.Array],
    operands: tuple[Operand, Operand],
    contract: AxesOfBoth,
    others: tuple[jax.Array | None, ...] = (),
    channels: AxesOfBoth | None = None,
) -> jax.Array:
    """Returns fast(*operands, *others), with the derivative of `reference` on plain arrays.

    A float operand is first treated as the other's `inputs` say; `contract` has the contracted
    axes of both, and `channels` those of them that a multiplier is for, None for all. `others`
    are arrays without gradient.

    Rounding has derivative zero almost everywhere; here it counts as the identity (the
    straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), so a float operand gets
    the gradient of the float product, less what a calibrated scale of `inputs` clips. That scale
    gets the gradient of a step (LSQ, Esser et al. 2020, arXiv:1902.08153, eq. 3), a floating zero
    point beside it that of LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576, eq. 5), and scales of 16
    bits or more get theirs; codes get none. In a QTensor with `values` these get all of it.
    """
    lhs_channels, rhs_channels = channels or contract
    lhs_axes = contract[0], _in_order_of(operands[1], rhs_channels, lhs_channels)
    rhs_axes = contract[1], _in_order_of(operands[0], lhs_channels, rhs_channels)
    lhs, rhs = operands
    operands = _observed(lhs, rhs, rhs_axes[1]), _observed(rhs, lhs, lhs_axes[1])
    leaves, treedef = jax.tree.flatten((operands, others))

    @jax.custom_jvp
    def product(*leaves):
        (lhs, rhs), others = jax.tree.unflatten(treedef, leaves)
        lhs, rhs = _without_values(lhs), _without_values(rhs)
        return fast(_treat(lhs, rhs, *lhs_axes), _treat(rhs, lhs, *rhs_axes), *others)

    def on_dequantized(*leaves):
        (lhs, rhs), others = jax.tree.unflatten(treedef, leaves)
        met = _straight_through(lhs, rhs, *lhs_axes), _straight_through(rhs, lhs, *rhs_axes)
        return reference(*(as_array(x) for x in met), *others)

    @partial(product.defjvp, symbolic_zeros=True)
    def _(primals, tangents):
        # Products with zero tangents would otherwise be computed in full.
        active = [i for i, t in enumerate(tangents) if _carries_gradient(t)]

        def of_active(*values):
            leaves = list(primals)
            for i, value in zip(active, values, strict=True):
                leaves[i] = value
            return on_dequantized(*leaves)

        out = product(*primals)
        if not active:
            return out, jnp.zeros_like(out)
        taken = [primals[i] for i in active], [tangents[i] for i in active]
        return out, jax.jvp(of_active, *taken)[1]

    return product(*leaves)


def _without_values(x):
    return dataclasses.replace(x, values=None) if isinstance(x, QTensor) else x


def _carries_gradient(tangent):
    is_zero = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return not is_zero and _is_wide_float(tangent.dtype)


def _is_wide_float(dtype):
    """Whether a dtype is that of values and scales, and not of codes."""
    return jnp.issubdtype(dtype, jnp.floating) and bits_of(dtype) >= 16


def _in_order_of(other, met, axes):
    """`axes` in the order of the logical axes of `other` that they meet, stored at `met`."""
    if not isinstance(other, QTensor):
        return axes
    logical = np.argsort(other.stored_axes(range(other.ndim))).tolist()
    return tuple(axis for _, axis in sorted(zip([logical[a] for a in met], axes, strict=True)))


def _inputs_for(x, other) -> Inputs | None:
    """What `other` asks of x, or None. Of a quantized x it can ask nothing any more."""
    inputs = other.inputs if isinstance(other, QTensor) else None
    if not isinstance(x, QTensor):
        return inputs
    if inputs is not None and inputs.multiplier is not None:
        raise ValueError(
            f"An operand that is quantized already cannot be multiplied by inputs.multiplier; got "
            f"{x!r}. Multiply it before you quantize it, and drop the multiplier."
        )
    return None


def _observed(other, x, channels):
    """`other` without a tap, after x has run through it."""
    inputs = _inputs_for(x, other)
    if inputs is None or inputs.tap is None:
        return other
    inputs.tap(_multiply(x, other, channels))
    return dataclasses.replace(other, inputs=dataclasses.replace(inputs, tap=None))


def _treat(x, other, shared, channels):
    inputs = _inputs_for(x, other)
    if inputs is None:
        return x
    return _quantize_inputs(_multiply(x, other, channels), other, shared, channels)


def _straight_through(x, other, shared, channels):
    """`_treat`, with the values of the quantized operand and the derivative of x."""
    inputs = _inputs_for(x, other)
    if inputs is None:
        return x
    x = _multiply(x, other, channels)
    if inputs.config is None:
        return x
    q = _quantize_inputs(lax.stop_gradient(x), other, shared, channels)
    parameters = inputs.scale, inputs.zero_point
    return straight_through(x, q, inputs.config, *parameters, margin=inputs.scale is None)


def _multiply(x, other, axes):
    """x * multiplier, which has one factor per element of `axes`, in that order."""
    inputs = other.inputs
    # Masks and one-hot rows may be whole numbers.
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(other.dtype)
    if inputs.multiplier is None:
        return x
    lengths = tuple(x.shape[a] for a in axes)
    if inputs.multiplier.shape != lengths:
        raise ValueError(
            f"inputs.multiplier must have the shape of the contracted axes, {lengths}, in the "
            f"order of the QTensor's; got {inputs.multiplier.shape} for axes {axes} of an "
            f"operand of shape {x.shape}."
        )
    ascending = inputs.multiplier.transpose(np.argsort(axes))
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    return x * ascending.reshape(shape).astype(x.dtype)


def _quantize_inputs(x, other, shared, channels):
    inputs, config = other.inputs, other.inputs.config
    if config is None:
        return x
    if inputs.scale is not None:
        return quantize_with_scale(x, inputs.scale, inputs.zero_point, config)
    try:
        return quantize_inputs(x, config, _shared_axis(config, shared, channels))
    except ValueError as error:
        raise ValueError(f"The inputs of {other!r} cannot be quantized: {error}") from error


def _shared_axis(config, shared, channels):
    """Along all contracted axes, or in groups along the last of the channels."""
    is_grouped = config.group_size is not None or config.format.group_size is not None
    axes = (max(channels),) if is_grouped and channels else tuple(sorted(shared))
    return axes[0] if len(axes) == 1 else axes
