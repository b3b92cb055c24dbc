"""The row that runs the native kernels for CPUs, on arrays as they are stored."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...core import Format, QTensor, bits_of, scale_values
from ...kernels import cpu
from ..dispatch import Implementation, Table
from ..dot_spec import DotSpec, in_result, to_logical_order
from ..operands import Operand, as_array, repeat_groups, why_unsupported_codes
from . import integer
from .kernel import kernel_on_parts, why_unsupported_float64, why_unsupported_shardings
from .matrix import about, as_matrix, by_matrix, why_not_a_matrix
from .parts import parts_of

# Smaller weights were not measured; XLA computes them.
_LEAST_SIZE = 2**15
# Rows of activations up to which the kernels beat XLA, by bits of the weights and whether the
# activations are codes, if there is a limit. Measured on 2 cores, as speeds in units of XLA's
# float32, kernels against XLA's best form of the same product. AVX512, 4096 x 4096: codes by 8 bits
# 3.0 against 1.7 at 64 rows, 3.8 against 1.7 at 512; float32 1.1 against 0.9 at 512. AVX2, 576 x
# 576 to 4096 x 4096: codes by 8 bits 1.2 to 2.4 against 1.1 to 1.4 at 64, 1.3 to 1.7 against 0.9 to
# 1.1 at 512; by 4 bits 1.4 to 2.1 against 0.5 to 0.8 at 64, 1.1 to 1.8 against 0.8 to 1.0 at 512;
# float32 by 8 bits 1.4 against 1.3 at 8, 0.9 against 1.1 at 16, and by 4 bits 1.0 against 0.7 at 8,
# 0.6 against 0.7 at 16. AMX, 4096 x 4096: codes by 8 bits 9 against 3.5 at 128, 7 against 4.6 at
# 512; float32 by AVX512. NEON was not measured; it does not have kernels for many rows.
_FEW_FLOATS = {(8, False): 8, (4, False): 8}
_FEW_ROWS = {(8, True): 8, (4, True): 32, **_FEW_FLOATS}
_MOST_ROWS = {"AMX": {}, "AVX512-VNNI": {}, "AVX2": _FEW_FLOATS, "NEON": _FEW_ROWS}
# (rows, least): more float rows than these by fewer weights, or by fewer columns, had 0.47 to 0.85
# of the speed of XLA's float32, with AVX512 (`--suite random`).
_LEAST_WEIGHTS, _LEAST_COLUMNS = (8, 2**16), (64, 128)
# Dtypes in which the kernels write their results.
_RESULTS = (jnp.float32, jnp.bfloat16)


def row(fallback: Table) -> Implementation:
    """The row "native", with rows of XLA for programs and parts for which there are no kernels."""
    return Implementation(
        "native",
        partial(kernel_on_parts, kernel=run, why_unsupported=why_unsupported, fallback=fallback),
        why_unsupported,
        ("cpu",),
        is_integer=is_integer,
        reads_packed=True,
        fallback=fallback,
        parts=parts_of,
    )


def run(lhs: Any, rhs: QTensor, spec: DotSpec) -> jax.Array:
    """(..., K) by (..., K): int8 codes by int8 codes, or rows by 4-bit or 8-bit weights."""
    return by_matrix(_run, lhs, rhs, spec)


def _run(lhs: Any, rhs: QTensor, spec: DotSpec) -> jax.Array:
    if integer.is_of_8_bits(lhs, rhs, spec):
        return native_int8(lhs, rhs, spec)
    out = _by_weights(lhs, rhs, spec)
    return to_logical_order(out.astype(spec.dtype), spec)


def native_int8(lhs: QTensor, rhs: QTensor, spec: DotSpec) -> jax.Array:
    """int8 codes by int8 codes, exact in int32, then scaled."""
    zeros = lhs.zero_point, rhs.zero_point
    if spec.dtype == jnp.float64 or any(zero is not None for zero in zeros):
        return integer.run(lhs, rhs, spec, _int8_dot)
    left, right = (x.codes.astype(jnp.int8) for x in (lhs, rhs))
    row_scale, column_scale = (
        in_result(scale_values(x.scale), side, (lhs, rhs), spec)
        for side, x in enumerate((lhs, rhs))
    )
    out = cpu.scaled_int8_dot(
        _rows(left),
        _in_stack(right, "codes", spec),
        _per_row(row_scale, left.shape),
        jnp.broadcast_to(column_scale.reshape(-1), right.shape[:1]),
        native_dtype(spec.dtype),
    )
    out = out.reshape(*left.shape[:-1], right.shape[0])
    return to_logical_order(out.astype(spec.dtype), spec)


def why_unsupported(lhs: Operand, rhs: Any, spec: DotSpec) -> str | None:
    """Why the kernels do not compute this, or XLA is faster for such sizes; or None."""
    return why_unable(lhs, rhs, spec) or _on_matrix(_why_small, lhs, rhs, spec)


def why_unable(lhs: Operand, rhs: Any, spec: DotSpec) -> str | None:
    """`why_unsupported` for weights of any size."""
    why_not = why_not_a_matrix(lhs, rhs, spec) or why_unsupported_shardings(lhs, rhs, spec)
    return why_not or _on_matrix(_why_unable, lhs, rhs, spec)


def _why_unable(lhs: Operand, rhs: QTensor, spec: DotSpec) -> str | None:
    by_codes = _multiplies_by_codes(lhs, rhs, spec)
    if not integer.is_of_8_bits(lhs, rhs, spec):
        lengths = rhs.codes.shape[1], rhs.scale.shape[1]
        why_not = why_unsupported_float64(spec) or why_unsupported_weights(rhs, by_codes, lengths)
        if why_not is not None:
            return why_not
    if cpu.unavailable() is not None:
        return cpu.unavailable()
    if rhs.size == 0:
        return "there are no weights"
    instructions, bits = cpu.instruction_sets()[0], rhs.format.bits
    most = _MOST_ROWS[instructions].get((bits, by_codes), math.inf)
    if math.prod(lhs.shape[:-1]) <= most:
        return None
    kind = "int8" if by_codes else "float"
    return f"more than {most} {kind} rows by {bits}-bit weights, with {instructions}"


def _why_small(lhs: Operand, rhs: QTensor, spec: DotSpec) -> str | None:
    """Why XLA is faster for so few weights, or None."""
    if rhs.size < _LEAST_SIZE:
        return f"fewer than {_LEAST_SIZE} weights"
    rows, columns = math.prod(lhs.shape[:-1]), rhs.codes.shape[0]
    limits = (("weights", rhs.size, _LEAST_WEIGHTS), ("columns", columns, _LEAST_COLUMNS))
    for unit, size, (few, least) in () if _multiplies_by_codes(lhs, rhs, spec) else limits:
        if rows > few and size < least:
            return f"fewer than {least} {unit} for more than {few} float rows"
    return None


def _multiplies_by_codes(lhs: Operand, rhs: QTensor, spec: DotSpec) -> bool:
    """`is_integer` for a matrix."""
    return integer.is_of_8_bits(lhs, rhs, spec) or multiplies_codes(lhs, rhs)


def multiplies_codes(lhs: Operand, rhs: QTensor) -> bool:
    """Whether the kernel for groups multiplies the codes of the left operand."""
    if not isinstance(lhs, QTensor) or lhs.zero_point is not None:
        return False
    # The kernel makes codes unsigned by an offset.
    is_signed = jnp.issubdtype(rhs.format.dtype, jnp.signedinteger)
    is_integer = why_unsupported_codes(lhs) is None and rhs.format.rounds
    return is_integer and is_signed and lhs.scale.shape[-1] == 1


def is_integer(lhs: Operand, rhs: QTensor, spec: DotSpec) -> bool:
    """Whether the kernels multiply codes by codes."""
    return _on_matrix(_multiplies_by_codes, lhs, rhs, spec)


def _on_matrix(question: Callable[..., Any], lhs: Operand, rhs: QTensor, spec: DotSpec) -> Any:
    """The answer to a question about rows times a matrix."""
    if rhs.ndim == 2:
        return question(lhs, rhs, spec)
    return about(question, partial(as_matrix, spec=spec), lhs, rhs)


def _int8_dot(lhs: jax.Array, rhs: jax.Array, *_: Any) -> jax.Array:
    """`integer_dot` by the native kernel: (..., K) by (N, K), in int32."""
    return cpu.int8_dot(_rows(lhs), rhs).reshape(*lhs.shape[:-1], rhs.shape[0])


def _by_weights(lhs: Any, rhs: QTensor, spec: DotSpec) -> jax.Array:
    """(..., K) by 4-bit or 8-bit weights (N, K), in float32 or already in the result's dtype."""
    columns = partial(repeat_groups, shape=rhs.codes.shape, axes=[0])
    if isinstance(rhs.scale, QTensor) or rhs.scale.shape[0] != rhs.codes.shape[0]:
        scale = columns(scale_values(rhs.scale))
    else:
        scale = _in_stack(rhs.scale, "scale", spec)
    zero = None if rhs.zero_point is None else columns(rhs.zero_point)
    x = as_array(lhs)
    if rhs.dtype != jnp.bfloat16:
        x = x.astype(jnp.float32)  # The kernels may round weights to bfloat16, as those are.
    codes = _in_stack(rhs.codes, "codes", spec)
    if multiplies_codes(lhs, rhs):
        x = lhs.codes.astype(jnp.int8)
        row_scale = _per_row(in_result(scale_values(lhs.scale), 0, (lhs, rhs), spec), x.shape)
        out = cpu.grouped_dot(_rows(x), codes, scale, zero, row_scale, native_dtype(spec.dtype))
    elif rhs.format.bits == 4:
        table = jnp.asarray(values_of_codes(rhs.format))
        out = cpu.lookup_dot(_rows(x), codes, scale, zero, table)
    else:
        out = cpu.widen_dot(_rows(x), codes, scale, zero)
    return out.reshape(*x.shape[:-1], rhs.codes.shape[0])


def _in_stack(part: jax.Array, name: str, spec: DotSpec) -> jax.Array | cpu.InStack:
    """An array of a matrix; if that is a slice of a stack, where it is in it."""
    is_whole = part.size * bits_of(part.dtype) % 8 == 0
    if spec.stack is None or spec.layer is None or not is_whole:
        return part
    stack, shape = getattr(spec.stack, name), (spec.stack.codes.shape[0], *part.shape)
    if stack.size != math.prod(shape):
        return part  # The scales of the matrix were repeated.
    return cpu.InStack(part, stack.reshape(shape), spec.layer)


def why_unsupported_weights(rhs: QTensor, by_codes: bool, lengths: tuple[int, int]) -> str | None:
    """Why the kernels do not multiply by these weights, or None.

    Args:
        rhs: the weights.
        by_codes: whether activations are codes.
        lengths: of a row of codes, and of its scales.
    """
    if rhs.format.bits not in (4, 8):
        return f"{rhs.format} weights have codes of neither 4 nor 8 bits"
    is_wide = rhs.format.bits == 8
    why_not = why_unsupported_codes(rhs) if is_wide else None
    return why_not or cpu.why_unsupported_groups(*lengths, is_widened=is_wide and not by_codes)


def _rows(x: jax.Array | np.ndarray) -> jax.Array:
    return jnp.asarray(x).reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _per_row(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(scale, (*shape[:-1], 1)).reshape(-1)


def native_dtype(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """The dtype in which the kernels write a result that will have another."""
    return dtype if dtype in _RESULTS else jnp.float32


def values_of_codes(format: Format) -> np.ndarray:
    """The value of each 4-bit pattern before it is scaled."""
    bits = np.arange(16, dtype=np.uint8)
    if not jnp.issubdtype(format.dtype, jnp.integer):
        return bits.view(jnp.dtype(format.dtype)).astype(np.float32)
    is_signed = jnp.issubdtype(format.dtype, jnp.signedinteger)
    codes = (bits ^ 8).astype(np.int32) - 8 if is_signed else bits.astype(np.int32)
    if format.codebook is None:
        return codes
    # A codebook may have fewer entries: the other patterns do not occur.
    return np.take(np.asarray(format.codebook), bits, mode="clip")
