"""The row that convolves each channel by itself, as a sum of shifted images.

XLA on CPU takes 10 to 20 times as long for a kernel of one channel per group
(`python -m benchmarks.convolutions`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..dispatch import Implementation
from ..operands import Operand, as_array, as_stored
from . import conv_integer
from .kernel import why_unsupported_shardings
from .windows import Windows

# Each pixel of a window is an operation of the program.
_MOST_PIXELS = 64
# Of each channel; XLA multiplies by more of them faster.
_MOST_OUTPUTS = 4


def run(lhs: Any, rhs: Any, spec: Any) -> jax.Array:
    """out[..., o] = sum over pixels p of a window of images[p, ..., o // m] * kernel[p, o]."""
    if _is_integer(lhs, rhs, spec):
        images, kernel = (x.codes.astype(jnp.int8) for x in (lhs, rhs))
        return conv_integer.scaled(_sum(images, kernel, spec, jnp.int32), lhs, rhs, spec)
    compute = jnp.float64 if jnp.float64 in (lhs.dtype, rhs.dtype) else jnp.float32
    out = _sum(jnp.asarray(as_array(lhs)), jnp.asarray(as_array(rhs)), spec, compute)
    return out.astype(spec.dtype)


def _sum(images: jax.Array, kernel: jax.Array, spec: Any, compute: Any) -> jax.Array:
    image_axes, (outputs, inputs, *spatial), out_axes = spec.dimension_numbers
    windows = Windows.of(spec, images.shape, kernel.shape)
    # XLA would compute what precedes the images once per pixel of a window.
    padded = lax.optimization_barrier(windows.padded(images, image_axes[2:]))
    repeats = kernel.shape[outputs] // max(images.shape[image_axes[1]], 1)
    if repeats > 1:
        padded = jnp.repeat(padded, repeats, image_axes[1])
    shape = [1] * images.ndim
    shape[image_axes[1]] = -1
    factors = kernel.transpose(*spatial, inputs, outputs).reshape(windows.count, -1)
    terms = windows.shifted(padded, image_axes[2:])
    products = (
        x.astype(compute) * factor.reshape(shape).astype(compute)
        for x, factor in zip(terms, factors, strict=True)
    )
    order = [0] * images.ndim
    for axis, place in zip(image_axes, out_axes, strict=True):
        order[place] = axis
    return sum(products, start=jnp.zeros((), compute)).transpose(order)


def _why_unsupported(lhs: Operand, rhs: Operand, spec: Any) -> str | None:
    images, kernel, found = as_stored(lhs), as_stored(rhs), spec.convolution(lhs, rhs)
    inputs = spec.dimension_numbers.rhs_spec[1]
    is_alone = found.groups == found.channels and kernel.shape[inputs] == 1
    if not is_alone or dict(spec.options)["batch_group_count"] != 1:
        return "channels are not convolved each by itself"
    if not 0 < found.pixels <= _MOST_PIXELS:
        return f"windows of {found.pixels} pixels, not of 1 to {_MOST_PIXELS}"
    return why_unsupported_shardings(images, kernel, spec)


def _is_integer(lhs: Operand, rhs: Operand, spec: Any) -> bool:
    return conv_integer.why_unsupported(lhs, rhs, spec) is None


def _why_slower(lhs: Operand, rhs: Operand, spec: Any, _: str | None) -> str | None:
    outputs = as_stored(rhs).shape[spec.dimension_numbers.rhs_spec[0]]
    repeats = outputs // spec.convolution(lhs, rhs).groups
    if repeats <= _MOST_OUTPUTS:
        return None
    return f"{repeats} outputs per channel, more than {_MOST_OUTPUTS}"


ROW = Implementation(
    "shifted", run, _why_unsupported, ("cpu",), _why_slower, is_integer=_is_integer
)
