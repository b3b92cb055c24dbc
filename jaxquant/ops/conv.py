"""Convolution of quantized operands."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import QTensor, scale_values
from . import dispatch
from .dispatch import Implementation, Operand
from .operands import (
    as_array,
    check_operands,
    refuses_codes,
    refuses_length,
    result_dtype,
    stored_axes,
    with_dequantized_gradient,
)


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """What `conv_general_dilated` is asked for, hashable, with axes as they are stored."""

    dimension_numbers: lax.ConvDimensionNumbers
    options: tuple[tuple[str, Any], ...]
    dtype: np.dtype

    def run(self, lhs: jax.Array, rhs: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The convolution of plain arrays."""
        return lax.conv_general_dilated(
            lhs,
            rhs,
            dimension_numbers=self.dimension_numbers,
            preferred_element_type=dtype,
            **dict(self.options),
        )


def conv_general_dilated(
    lhs: Operand,
    rhs: Operand,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    out_sharding: jax.sharding.NamedSharding | jax.P | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` on arrays and QTensors, in any mixture.

        out = conv(dequantize(lhs), dequantize(rhs))

    Symmetric codes of whole numbers, with one scale per example and one per output channel,
    are convolved as integers: out = scale_l * scale_r * conv(c_l, c_r). A float operand that
    meets a QTensor with `inputs` is first treated as these say, per example; their multiplier
    has one factor per input channel.

    Args:
        lhs: images, rhs: kernels; float arrays or QTensors.
        preferred_element_type: floating dtype of the result; None for what promotion gives.
        implementation: "integer" (by int8 codes), "images" (the same, for channels last with
            one or two spatial axes) or "dequantize", to force one; None to choose.
        Others: as for `jax.lax.conv_general_dilated`.

    Returns:
        Array in the layout that `dimension_numbers` gives the result.

    Raises:
        ValueError: `implementation` cannot run these operands, or a dtype is not floating.

    Gradients: as for `dot_general`.
    Error: integer sums are exact in int32, and rounded once.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.2.
    """
    options: dict[str, Any] = {
        "window_strides": _hashable(window_strides),
        "padding": _hashable(padding),
        "lhs_dilation": _hashable(lhs_dilation),
        "rhs_dilation": _hashable(rhs_dilation),
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
        "out_sharding": out_sharding,
    }
    check_operands((lhs, rhs), implementation)
    if not (isinstance(lhs, QTensor) or isinstance(rhs, QTensor)):
        return lax.conv_general_dilated(
            jnp.asarray(lhs),
            jnp.asarray(rhs),
            **options,
            dimension_numbers=dimension_numbers,
            preferred_element_type=preferred_element_type,
        )
    logical = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    stored = lax.ConvDimensionNumbers(
        stored_axes(lhs, logical.lhs_spec), stored_axes(rhs, logical.rhs_spec), logical.out_spec
    )
    dtype = result_dtype(lhs, rhs, preferred_element_type)
    spec = ConvSpec(stored, tuple(options.items()), dtype)
    return _conv(lhs, rhs, spec, implementation)


def _hashable(x):
    if x is None or isinstance(x, str):
        return x
    return tuple(tuple(map(int, p)) if np.ndim(p) else int(p) for p in x)


@partial(jax.jit, static_argnames=("spec", "implementation"))
def _conv(lhs, rhs, spec, implementation):
    (_, *lhs_summed), (_, *rhs_summed), _ = spec.dimension_numbers
    return with_dequantized_gradient(
        lambda lhs, rhs: dispatch.run(_TABLE, lhs, rhs, spec, implementation),
        lambda lhs, rhs: _dequantized(lhs, rhs, spec),
        (lhs, rhs),
        (tuple(lhs_summed), tuple(rhs_summed)),
        channels=((lhs_summed[0],), (rhs_summed[0],)),
    )


def _dequantized(lhs, rhs, spec):
    dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    # The transpose rule of lax's convolution wants one dtype throughout.
    out = spec.run(as_array(lhs).astype(dtype), as_array(rhs).astype(dtype), None)
    return out.astype(spec.dtype)


def _integer(lhs, rhs, spec):
    acc = spec.run(lhs.codes.astype(jnp.int8), rhs.codes.astype(jnp.int8), jnp.int32)
    compute = jnp.float64 if spec.dtype == jnp.float64 else jnp.float32
    out = acc.astype(compute)
    for x, axis in zip((lhs, rhs), spec.dimension_numbers.out_spec, strict=False):
        shape = [-1 if a == axis else 1 for a in range(out.ndim)]
        out = out * scale_values(x.scale).astype(compute).reshape(shape)
    return out.astype(spec.dtype)


def _refuses_integer(lhs, rhs, spec):
    for x, axes in zip((lhs, rhs), spec.dimension_numbers, strict=False):
        why_not = refuses_codes(x)
        if why_not is not None or x.zero_point is not None:
            return why_not or "padding has no zero point"
        if (
            x.scale.size not in (1, x.codes.shape[axes[0]])
            or x.scale.shape[axes[0]] != x.scale.size
        ):
            return f"scales {x.scale.shape} change within an example or an output channel"
    if dict(spec.options)["batch_group_count"] != 1:
        return "batch groups mix the scales of examples"
    length = math.prod(rhs.codes.shape[a] for a in spec.dimension_numbers.rhs_spec[1:])
    return refuses_length(length, lhs, rhs)


def _integer_images(lhs, rhs, spec):
    """`_integer`, with rows of pixels as images one pixel high."""
    if len(spec.dimension_numbers.lhs_spec) > 3:
        return _integer(lhs, rhs, spec)
    images, kernels = (0, 3, 1, 2), (3, 2, 0, 1)
    ones = {"window_strides": (1,), "rhs_dilation": (1,), "padding": ((0, 0),)}
    options = tuple(
        (k, ones[k] + v if k in ones and isinstance(v, tuple) else v) for k, v in spec.options
    )
    numbers = lax.ConvDimensionNumbers(images, kernels, images)
    high = dataclasses.replace(spec, dimension_numbers=numbers, options=options)
    lhs, rhs = (
        dataclasses.replace(
            x, codes=jnp.expand_dims(x.codes, axis), scale=jnp.expand_dims(x.scale, axis)
        )
        for x, axis in ((lhs, 1), (rhs, 0))
    )
    return _integer(lhs, rhs, high).squeeze(1)


def _refuses_images(lhs, rhs, spec):
    """XLA on CPU has a fast int8 convolution for (B, H, W, C) by (H, W, I, O), and no other.

    4 x 64 x 28 x 28 by 3 x 3: 2 ms so, 14 in float32, 60 to 130 with channels first. One axis as
    such takes 89 ms for 4 x 200 x 128, as an image 1; three axes, or dilated images, 4 to 6 times
    float32. (2 cores, AVX512-VNNI.)
    """
    rank = len(spec.dimension_numbers.lhs_spec) - 2
    images = (0, rank + 1, *range(1, rank + 1))
    is_channels_last = spec.dimension_numbers == (images, (rank + 1, rank, *range(rank)), images)
    if rank not in (1, 2) or not is_channels_last:
        return "the layout is not one that XLA on CPU convolves fast"
    if any(d != 1 for d in dict(spec.options)["lhs_dilation"] or ()):
        return "images are dilated"
    return _refuses_integer(lhs, rhs, spec)


_TABLE = (
    Implementation("images", _integer_images, _refuses_images, platforms=("cpu",)),
    # XLA's GPU backend has no convolution of int8 to int32 (jax#7637).
    Implementation("integer", _integer, _refuses_integer, platforms=("tpu",)),
    Implementation("dequantize", _dequantized, lambda lhs, rhs, spec: None),
)
