"""Operands of a product: what their `inputs` ask for, and gradients through them."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import Inputs, QTensor, bits_of, quantize, quantize_with_scale
from .dispatch import Operand


def as_array(x: Operand) -> jax.Array:
    """The operand as a float array with its axes as they are stored."""
    return x.decode() if isinstance(x, QTensor) else x


def stored_axes(x: Operand, axes) -> tuple[int, ...]:
    """Where logical axes of the operand lie, from 0 up."""
    return x.stored_axes(axes) if isinstance(x, QTensor) else tuple(a % x.ndim for a in axes)


def result_dtype(lhs: Operand, rhs: Operand, preferred: jax.typing.DTypeLike | None):
    """The dtype that `jnp` gives a product of the arrays that the operands stand for.

    Raises:
        ValueError: the preferred dtype is not floating.
    """
    if preferred is None:
        return jnp.promote_types(lhs.dtype, rhs.dtype)
    if not jnp.issubdtype(preferred, jnp.floating):
        raise ValueError(
            "preferred_element_type must be floating, because a quantized operand stands for "
            f"floats; got {preferred}. For codes as integers, multiply `codes` themselves."
        )
    return jnp.dtype(preferred)


def refuses_codes(x: Operand) -> str | None:
    """Why the operand has no codes that int8 can hold, or None."""
    if not isinstance(x, QTensor):
        return f"an operand of {x.dtype} has no codes"
    if not x.format.rounds or jnp.iinfo(x.format.dtype).max > 127:
        return f"{x.format} codes are not whole numbers within int8"
    return None


def refuses_length(length: int) -> str | None:
    """Why int32 may not hold sums of so many products of codes (127 * 127 each), or None."""
    return None if length <= 131071 else f"sums of {length} codes may leave int32"


def with_dequantized_gradient(
    fast: Callable[..., jax.Array],
    reference: Callable[..., jax.Array],
    operands: tuple[Operand, Operand],
    contract: tuple[tuple[int, ...], tuple[int, ...]],
    others: tuple[jax.Array | None, ...] = (),
) -> jax.Array:
    """Returns fast(*operands, *others), with the derivative of `reference` on plain arrays.

    A float operand is first treated as the other's `inputs` say; `contract` has the contracted
    axes of both. `others` are arrays without gradient.

    Rounding has derivative zero almost everywhere; here it counts as the identity (the
    straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), so a float operand gets
    the gradient of the float product. Scales of 16 bits or more get theirs; codes get none.
    """
    leaves, treedef = jax.tree.flatten((operands, others))

    @jax.custom_jvp
    def product(*leaves):
        (lhs, rhs), others = jax.tree.unflatten(treedef, leaves)
        return fast(_treat(lhs, rhs, contract[0]), _treat(rhs, lhs, contract[1]), *others)

    def on_dequantized(*leaves):
        (lhs, rhs), others = jax.tree.unflatten(treedef, leaves)
        met = _straight_through(lhs, rhs, contract[0]), _straight_through(rhs, lhs, contract[1])
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


def _carries_gradient(tangent):
    is_zero = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    is_float = jnp.issubdtype(tangent.dtype, jnp.floating)
    return not is_zero and is_float and bits_of(tangent.dtype) >= 16


def _inputs_for(x, other) -> Inputs | None:
    is_quantized = isinstance(x, QTensor)
    return other.inputs if isinstance(other, QTensor) and not is_quantized else None


def _treat(x, other, axes):
    inputs = _inputs_for(x, other)
    return x if inputs is None else _quantize_inputs(_multiply(x, inputs, axes), inputs, axes)


def _straight_through(x, other, axes):
    """`_treat`, with the values of the quantized operand and the derivative of x."""
    inputs = _inputs_for(x, other)
    if inputs is None:
        return x
    x = _multiply(x, inputs, axes)
    values = as_array(_quantize_inputs(x, inputs, axes))
    return x + lax.stop_gradient(values - x)


def _multiply(x, inputs, axes):
    """x * multiplier, which has one factor per element of the contracted axes."""
    if inputs.multiplier is None:
        return x
    lengths = tuple(x.shape[a] for a in axes)
    if inputs.multiplier.shape != lengths:
        raise ValueError(
            "inputs.multiplier must have the shape of the contracted axes; got "
            f"{inputs.multiplier.shape} for axes {axes} of an operand of shape {x.shape}."
        )
    ascending = inputs.multiplier.transpose(np.argsort(axes))
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    return x * ascending.reshape(shape).astype(x.dtype)


def _quantize_inputs(x, inputs, axes):
    config = inputs.config
    if config is None:
        return x
    if inputs.scale is not None:
        return quantize_with_scale(x, inputs.scale, inputs.zero_point, config)
    if config.axis is not None:
        shared = tuple(sorted(axes))
        config = dataclasses.replace(config, axis=shared[0] if len(shared) == 1 else shared)
    return quantize(x, config)
