"""Operands of an operation: their types and checks."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

from ..core import LowRank, QTensor, TrainedArray

Operand = jax.Array | np.ndarray | QTensor
# The types that an operation accepts as an operand.
OperandLike = Operand | TrainedArray | LowRank
AxesOfBoth = tuple[tuple[int, ...], tuple[int, ...]]


def as_operands(
    given: Sequence[OperandLike], implementation: str | None
) -> tuple[Operand | LowRank, ...]:
    """Arrays, QTensors and arrays with adapters, checked; trained arrays are quantized.

    Raises:
        ValueError: an operand is neither an array nor quantized, or `implementation` is given
            although no operand is quantized.
    """
    operands = tuple(map(_as_operand, given))
    for x in operands:
        if not isinstance(x, jax.Array | np.ndarray | np.generic | QTensor | LowRank):
            raise ValueError(
                f"Operands must be arrays or QTensors; got {type(x).__name__}. Use jnp.asarray."
            )
    if implementation is not None and not any(map(is_quantized, operands)):
        shapes = " and ".join(f"{x.dtype} {x.shape}" for x in operands)
        raise ValueError(
            f"implementation={implementation!r} needs a QTensor; got {shapes}. Quantize an "
            "operand, or leave it None."
        )
    return operands


def _as_operand(x):
    if isinstance(x, TrainedArray):
        return x.quantize()
    # The norm of each output needs the whole array.
    has_norm = isinstance(x, LowRank) and x.magnitude is not None
    return x.dequantize() if has_norm else x


def without_adapters(
    given: Sequence[OperandLike], implementation: str | None
) -> tuple[Operand, ...]:
    """`as_operands` for an operation that does not support adapters.

    Raises:
        ValueError: an operand has adapters, or as for `as_operands`.
    """
    for x in given:
        if isinstance(x, LowRank):
            raise ValueError(
                "Only matmul, einsum, dot_general and take support adapters; got "
                f"{x!r}. Merge it first, with jaxquant.training.merge."
            )
    return as_operands(given, implementation)  # pyright: ignore[reportReturnType] (checked)


def has_symbolic_shape(x: Operand) -> bool:
    """Whether a dimension is not known, as in programs that `jax.export` writes for any batch."""
    return any(is_symbolic_dim(n) for n in np.shape(x))


def as_array(x: Operand) -> jax.Array | np.ndarray:
    """The operand as a float array in its stored axis order."""
    return x.decode() if isinstance(x, QTensor) else x


def as_stored(x: Operand) -> Any:
    """The operand as an array in its stored axis order: the codes of a QTensor."""
    return x.codes if isinstance(x, QTensor) else x


def stored_axes(x: Operand, axes: Iterable[int]) -> tuple[int, ...]:
    """The stored axes of the operand's logical axes, counted from 0."""
    return x.stored_axes(axes) if isinstance(x, QTensor) else tuple(a % x.ndim for a in axes)


def repeat_groups(values: jax.Array, shape: Sequence[int], axes: Iterable[int]) -> jax.Array:
    """Scales or zero points, one per group, repeated to one per element along `axes` of `shape`."""
    for axis in axes:
        if values.shape[axis] != shape[axis]:
            values = jnp.repeat(values, shape[axis] // values.shape[axis], axis)
    return values


def is_quantized(x: Operand | LowRank) -> bool:
    """Whether an operand is a QTensor, perhaps with adapters."""
    return isinstance(x, QTensor | LowRank)


def result_dtype(lhs: Operand, rhs: Operand, preferred: jax.typing.DTypeLike | None) -> np.dtype:
    """The dtype of the product of the dequantized operands in `jnp`.

    Raises:
        ValueError: the preferred dtype is not a floating-point one.
    """
    if preferred is None:
        return jax.dtypes.canonicalize_dtype(jnp.promote_types(lhs.dtype, rhs.dtype))
    if not jnp.issubdtype(preferred, jnp.floating):
        raise ValueError(
            "preferred_element_type must be a floating-point dtype, because QTensors dequantize to "
            f"floating-point values; got {preferred}. To multiply integers, use their `codes`."
        )
    return jax.dtypes.canonicalize_dtype(preferred)


def why_unsupported_codes(x: Operand) -> str | None:
    """Why the operand does not have integer codes that int8 can hold, or None."""
    if not isinstance(x, QTensor):
        return f"an operand of {x.dtype} does not have codes"
    if not x.format.rounds or jnp.iinfo(x.format.dtype).max > 127:
        return f"{x.format} codes are not integers within int8"
    return None if x.offset is None else "an offset is added to the codes"


def why_unsupported_length(length: int, lhs: QTensor, rhs: QTensor) -> str | None:
    """Why int32 may not hold sums of so many products of codes less zero points, or None."""
    largest = length * _largest(lhs) * _largest(rhs)
    return None if largest < 2**31 else f"sums of {length} codes may leave int32"


def _largest(x: QTensor) -> int:
    """The largest magnitude of code less zero point: 128 for int8, 255 with a zero point."""
    info = jnp.iinfo(x.format.dtype)
    return max(-info.min, info.max) if x.zero_point is None else info.max - info.min
