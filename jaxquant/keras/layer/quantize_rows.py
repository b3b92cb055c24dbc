"""Quantizes small weights of many shapes by a few compiled programs.

XLA compiles a program for each shape. That takes 0.3 s of a CPU core, and quantizing a weight of a
convolution net takes much less. So the groups of a weight become the rows of a matrix, which are
padded with zeros to one of a few lengths and quantized a fixed number at a time. Codes, scales and
zero points are those of `quantize` bit for bit.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import AbsMax, ArrayConfig, QTensor, blocks_between, largest_magnitude, quantize
from ...jaxprs import is_tracer

# Elements of one call, and of the largest weight: above it, compilation is a small part.
CALL_SIZE = 2**17
LARGEST = 2**22
# Lengths that rows are padded to.
LENGTHS = tuple(4**k for k in range(1, 9))


class Noise(NamedTuple):
    """What quantization has changed.

    Attributes:
        is_finite: whether all elements were finite.
        relative: the norm of the quantization error, relative to that of the weight.
    """

    is_finite: bool
    relative: float


def fits_rows(x: Any, config: ArrayConfig, like: QTensor) -> bool:
    """Whether `quantize_rows` gives the codes of `quantize`.

    The weight must be small and on one device, have scales that do not depend on other groups,
    and a range that zeros beside a group do not change.
    """
    is_array = isinstance(x, np.ndarray) or (
        isinstance(x, jax.Array) and not is_tracer(x) and len(x.devices()) == 1
    )
    is_plain = isinstance(like.scale, jax.ShapeDtypeStruct) and like.offset is None
    if not (is_array and is_plain and config.range == AbsMax()):
        return False
    return 0 < like.size <= LARGEST and _length(config, like) is not None


def quantize_rows(
    x: jax.Array | np.ndarray, config: ArrayConfig, like: QTensor
) -> tuple[QTensor, Noise]:
    """Quantizes x, padded with zeros to the shape of `like`, where `fits_rows` is True.

    Args:
        x: floating-point array.
        config: that of `like`.
        like: shapes and dtypes of the result, and the order of its axes.

    Returns:
        The QTensor, of NumPy arrays, and what it has changed.
    """
    logical = jax.eval_shape(lambda q: q.reorder(None), like)
    blocks = blocks_between(like.shape, logical.scale.shape)
    rows = _to_rows(np.asarray(x), like.shape, blocks)
    count, group = rows.shape
    length = _length(config, like)
    assert length is not None, "asked for a weight that does not fit"
    config = dataclasses.replace(config, group_size=None, per_tensor=False)
    height = max(CALL_SIZE // length, 1)
    parts = [_quantize_rows(part, group, config) for part in _parts(rows, height, length)]
    codes, scale, zero, *sums = (
        np.concatenate([np.asarray(y) for y in part])[:count] for part in zip(*parts, strict=True)
    )
    q = dataclasses.replace(
        logical,
        codes=_from_rows(codes[:, :group], like.shape, blocks),
        scale=scale.reshape(logical.scale.shape),
        zero_point=None if like.zero_point is None else zero.reshape(logical.scale.shape),
        inputs=None,
    )
    return q.reorder(like.order), _noise(*sums)


def _length(config: ArrayConfig, like: QTensor) -> int | None:
    """The length of padded rows; None if groups are longer than any."""
    group = like.size // like.scale.size
    if config.format.group_size is not None:
        return group
    return next((n for n in LENGTHS if n >= group), None)


def _to_rows(x: np.ndarray, shape: tuple[int, ...], blocks: tuple[int, ...]) -> np.ndarray:
    """(groups, elements per group) of an array padded with zeros to `shape`."""
    if x.shape != shape:
        x = np.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])
    pairs = [(n // b, b) for n, b in zip(shape, blocks, strict=True)]
    split = x.reshape([n for pair in pairs for n in pair])
    places = [*range(0, split.ndim, 2), *range(1, split.ndim, 2)]
    return split.transpose(places).reshape(-1, int(np.prod(blocks, dtype=np.int64)))


def _from_rows(rows: np.ndarray, shape: tuple[int, ...], blocks: tuple[int, ...]) -> np.ndarray:
    """Undoes `_to_rows`, without the padding."""
    counts = [n // b for n, b in zip(shape, blocks, strict=True)]
    split = rows.reshape(*counts, *blocks)
    places = [p for axis in range(len(shape)) for p in (axis, len(shape) + axis)]
    return split.transpose(places).reshape(shape)


def _parts(rows: np.ndarray, height: int, length: int) -> Iterator[np.ndarray]:
    """The rows in matrices of one shape, padded with zeros."""
    for start in range(0, len(rows), height):
        part = rows[start : start + height]
        padded = np.zeros((height, length), rows.dtype)
        padded[: len(part), : part.shape[1]] = part
        yield padded


@partial(jax.jit, static_argnames="config")
def _quantize_rows(rows: jax.Array, group: jax.Array | int, config: ArrayConfig) -> tuple[Any, ...]:
    """Codes, scale and zero point of each row of `group` elements, and its part of `_noise`."""
    q = quantize(rows, config, axis=1)
    dtype = rows.dtype if rows.dtype == jnp.float64 else jnp.float32
    # XLA would skip the rounding of scales and values to bfloat16 in between.
    values = lax.optimization_barrier(lax.optimization_barrier(q).dequantize())
    x, values = rows.astype(dtype), values.astype(dtype)
    largest = largest_magnitude(x, (1,))
    is_inside = jnp.arange(rows.shape[1])[None] < group
    # In units of the largest magnitude: squares of 1e-20 or 1e20 do not fit float32.
    unit = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    error = jnp.where(is_inside, (values - x) / unit, jnp.zeros_like(x))
    sums = (jnp.sum(jnp.square(y), 1) for y in (x / unit, error))
    zero = q.scale if q.zero_point is None else q.zero_point
    return q.codes, q.scale, zero, largest[:, 0], *sums


def _noise(largest: np.ndarray, signal: np.ndarray, error: np.ndarray) -> Noise:
    """The sum over rows, whose parts are in units of their largest magnitude."""
    if not np.all(np.isfinite(largest)):
        return Noise(False, float("nan"))
    squares = np.square(largest.astype(np.float64))
    signals, errors = (float(np.sum(squares * x)) for x in (signal, error))
    return Noise(True, float(np.sqrt(errors / signals)) if signals > 0 else 0.0)
