"""The row that convolves by the native kernels for CPUs: patches of images times a matrix."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core import QTensor, scale_values
from ...jaxprs import on_one_cpu
from ..dispatch import Implementation, Table
from ..dot_spec import DotSpec
from ..operands import Operand, as_stored, why_unsupported_codes
from . import cpu_native
from .kernel import kernel_or_xla, why_unsupported_shardings
from .matrix import about
from .windows import Windows

# With AVX512-VNNI, kernels of several pixels had 0.2 to 1.5 times the speed of "images" for fewer
# outputs, and 0.9 to 2.3 times for more.
_LEAST_OUTPUTS = 128
# Weights from which on the kernels were faster than XLA's best form, by whether images are int8
# codes: 1.2 to 1.5 times in most cases, with AVX512-VNNI.
_LEAST_WEIGHTS = {True: 2**13, False: 2**11}
# Of the patches, which hold each pixel once per pixel of a window.
_MOST_BYTES = 2**28


def row(fallback: Table) -> Implementation:
    """The row "native", with rows of XLA for programs that cannot hold kernels."""
    return Implementation(
        "native",
        partial(kernel_or_xla, kernel=_run, where=on_one_cpu, fallback=fallback, platform="cpu"),
        _why_unsupported,
        ("cpu",),
        _why_slower,
        is_integer=_is_integer,
        reads_packed=True,
        fallback=fallback,
    )


def _run(lhs: Operand, rhs: QTensor, spec: Any) -> jax.Array:
    out = cpu_native.run(*_as_product(lhs, rhs, spec))
    outputs, channels, *spatial = spec.dimension_numbers.out_spec
    return out.transpose(np.argsort((outputs, *spatial, channels)).tolist())


def _as_product(lhs: Operand, rhs: QTensor, spec: Any) -> tuple[Operand, QTensor, DotSpec]:
    """Patches (B, spatial..., window..., C) by kernels (O, window..., C)."""
    (batch, channels, *pixels), kernel_axes, _ = spec.dimension_numbers
    windows = Windows.of(spec, as_stored(lhs).shape, rhs.codes.shape)
    images = jnp.transpose(as_stored(lhs), (batch, *pixels, channels))
    axes = range(1, images.ndim - 1)
    parts = list(windows.shifted(windows.padded(images, axes), axes))
    codes = parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
    codes = codes.reshape(*codes.shape[:-1], *windows.lengths, images.shape[-1])
    patches: Operand = codes
    if isinstance(lhs, QTensor):
        scale = scale_values(lhs.scale).reshape(-1, *(1,) * (codes.ndim - 1))
        patches = dataclasses.replace(lhs, codes=codes, scale=scale, inputs=None, order=None)
    rhs = dataclasses.replace(rhs, inputs=None, order=None)
    rhs = rhs.reorder(tuple(a - rhs.ndim for a in _last(kernel_axes)))
    rows, count = images.ndim - 1, rhs.ndim - 1
    dot = DotSpec(
        contract=(tuple(range(rows, rows + count)), tuple(range(1, rhs.ndim))),
        batch=((), ()),
        permutation=tuple(range(rows + 1)),
        dtype=spec.dtype,
        precision=dict(spec.options)["precision"],
        out_sharding=None,
    )
    return patches, rhs, dot


def _last(kernel_axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a kernel with those that are contracted last."""
    outputs, inputs, *spatial = kernel_axes
    return outputs, *spatial, inputs


def _why_unsupported(lhs: Operand, rhs: Any, spec: Any) -> str | None:
    options, (image_axes, kernel_axes, _) = dict(spec.options), spec.dimension_numbers
    if not isinstance(rhs, QTensor):
        return "the kernel is not quantized"
    if (options["feature_group_count"], options["batch_group_count"]) != (1, 1):
        return "channels or images are in groups"
    if rhs.format.bits < 8 and _last(kernel_axes) != tuple(range(rhs.ndim)):
        return "the kernel is not stored with its output axis first and its input axis last"
    if isinstance(lhs, QTensor):
        is_per_image = lhs.scale.shape[image_axes[0]] == lhs.scale.size
        if why_unsupported_codes(lhs) or lhs.zero_point is not None or not is_per_image:
            return "the images do not have symmetric int8 codes with one scale each"
    why_not = why_unsupported_shardings(lhs, rhs, spec)
    return why_not or _on_product(cpu_native.why_unable, lhs, rhs, spec)


def _why_slower(lhs: Operand, rhs: QTensor, spec: Any, _: str | None) -> str | None:
    """Small kernels, and patches, which are copied unless a window is one pixel."""
    least = _LEAST_WEIGHTS[_is_integer(lhs, rhs, spec)]
    if rhs.size < least:
        return f"fewer than {least} weights"
    windows = Windows.of(spec, as_stored(lhs).shape, rhs.codes.shape)
    if windows.why_slower is not None or windows.count == 1:
        return windows.why_slower
    if not isinstance(lhs, QTensor):
        return "patches of floats take longer to copy than to convolve"
    if rhs.codes.shape[spec.dimension_numbers.rhs_spec[0]] < _LEAST_OUTPUTS:
        return (
            f"patches take longer to copy than to convolve to fewer than {_LEAST_OUTPUTS} outputs"
        )
    size = _on_product(lambda patches, *_: patches.size, lhs, rhs, spec)
    return f"patches would take {size} bytes" if size > _MOST_BYTES else None


def _is_integer(lhs: Operand, rhs: QTensor, spec: Any) -> bool:
    return _on_product(cpu_native.is_integer, lhs, rhs, spec)


def _on_product(question: Callable[..., Any], lhs: Operand, rhs: QTensor, spec: Any) -> Any:
    """The answer to a question about the product."""
    return about(question, partial(_as_product, spec=spec), lhs, rhs)
