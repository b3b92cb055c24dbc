"""The native kernels as functions of JAX arrays, one per handler of handlers.cc.

Each uses the best instruction set of this processor, or the one that is named.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import bits_of
from .library import call_kernel, instruction_sets, unavailable

# Elements of a group that kernels read at a time: floats by 8-bit codes, and all others.
_WIDENED_TOGETHER, _TOGETHER = 16, 8
# Instruction sets that multiply bfloat16, and how many rows at least.
_MULTIPLY_BFLOAT16, _BFLOAT16_ROWS = ("AMX",), 16
# Dtypes of scales that products of few rows read as they are stored, and how many rows at most.
_HALVES, _STORED_SCALES = (jnp.float16, jnp.bfloat16), 7
# Attention::Type of common.h; all others are kBytes.
_ATTENDED = {jnp.dtype(d): i for i, d in enumerate(("float32", "bfloat16", "int8", "int4"))}


class InStack(NamedTuple):
    """A slice that kernels read in its stack.

    Attributes:
        slice: a matrix.
        stack: of such matrices, each of which fills an integer number of bytes.
        index: int32 scalar, clipped to those that there are.
    """

    slice: jax.Array
    stack: jax.Array
    index: jax.Array


def why_unsupported_groups(length: int, groups: int, is_widened: bool = False) -> str | None:
    """Why weights with this many groups along `length` elements are unsupported, or None.

    Args:
        length, groups: of a row of weights.
        is_widened: whether `widen_dot` multiplies them.
    """
    size, multiple = length // max(groups, 1), _WIDENED_TOGETHER if is_widened else _TOGETHER
    if groups > 1 and size % multiple:
        return f"groups of {size} along {length} elements are not multiples of {multiple}"
    return None


def quantize_rows(
    x: jax.Array, qmin: int = -127, qmax: int = 127, instructions: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Quantizes each row by its largest magnitude, while the row is in the cache.

        scale = max|x| / min(-qmin, qmax)        codes = clip(round(x / scale), qmin, qmax)

    Args:
        x: float32 or bfloat16, (..., K).
        qmin, qmax: smallest and largest code.
        instructions: name of an instruction set, or None for the best one.

    Returns:
        codes, int8 (..., K), and scale, float32 (..., 1), bit for bit those of `core.quantize`
        under `jax.jit`. A row of zeros has scale 1, a row with NaN or Inf scale NaN; both have
        codes of 0.
    """
    codes = jax.ShapeDtypeStruct(x.shape, jnp.int8)
    scale = jax.ShapeDtypeStruct((*x.shape[:-1], 1), jnp.float32)
    bounds: dict[str, Any] = {"qmin": np.int64(qmin), "qmax": np.int64(qmax)}
    # Rows are quantized one at a time, whatever the number of leading axes.
    one_call = "broadcast_all"
    result = codes, scale
    return call_kernel("quantize_rows", result, instructions, x, vmap_method=one_call, **bounds)


def int8_dot(x: jax.Array, w: jax.Array, instructions: str | None = None) -> jax.Array:
    """x @ w.T of int8 codes, (M, K) by (N, K), exact in int32 for K up to 131071."""
    none = jnp.zeros(0, jnp.float32)
    return _dot("dot_int8", jnp.int32, instructions, x, w, none, none)


def scaled_int8_dot(
    x: jax.Array,
    w: jax.Array | InStack,
    row: jax.Array,
    column: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
    instructions: str | None = None,
) -> jax.Array:
    """`int8_dot`, rounded to float32, times the scale of the row, times that of the column.

    Args:
        x, w: as for `int8_dot`; w may be in a stack.
        row, column: scales, (M,) and (N,).
        dtype: of the result, float32 or bfloat16.
        instructions: as for `quantize_rows`.
    """
    scales = _float(row), _float(column)
    return _dot("dot_int8", dtype, instructions, x, w, *scales)


def grouped_dot(
    x: jax.Array,
    w: jax.Array | InStack,
    scale: jax.Array | InStack,
    zero: jax.Array | None,
    row: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    instructions: str | None = None,
) -> jax.Array:
    """row * the sum over groups of scale * sum(x * (w - zero)), summed in float32.

    Args:
        x: int8, (M, K).
        w: int4 or int8, (N, K), in groups that `why_unsupported_groups` accepts; may be in a stack.
        scale, zero: (N, groups); a zero of None means 0. Scales may be in a stack with w.
        row: scales of rows, (M,); None means 1.
        dtype: of the result, float32 or bfloat16.
        instructions: as for `quantize_rows`.

    Error: for integer zero points, sums of 8 neighboring elements (4 of int8) are exact. They are
        multiplied by their scale and added in float32, also within a group: the error before `row`
        is at most (K / 32 + groups + 8) * 2**-24 (K / 16 for int8) * sum of
        |x * (w - zero) * scale|, and not 0 where the sum of a group cancels.
    """
    row = jnp.zeros(0, jnp.float32) if row is None else _float(row)
    return _dot("dot_groups", dtype, instructions, x, w, *_floats(x, scale, zero), row)


def lookup_dot(
    x: jax.Array,
    w: jax.Array | InStack,
    scale: jax.Array | InStack,
    zero: jax.Array | None,
    table: jax.Array,
    instructions: str | None = None,
) -> jax.Array:
    """x @ ((table[bits of w] - zero) * scale).T in float32.

    Args:
        x: floats, (M, K). AMX multiplies 16 and more rows of bfloat16 by weights that are rounded
            to bfloat16.
        w, scale, zero, instructions: as for `grouped_dot`.
        table: (16,), the value of each pattern of 4 bits.
    """
    others = *_floats(x, scale, zero), _float(table)
    x = _multiplied(x, instructions)
    return _dot("dot_lookup", jnp.float32, instructions, x, w, *others)


def widen_dot(
    x: jax.Array,
    w: jax.Array | InStack,
    scale: jax.Array | InStack,
    zero: jax.Array | None,
    instructions: str | None = None,
) -> jax.Array:
    """x @ ((w - zero) * scale).T in float32, for floats (M, K) and int8 codes (N, K).

    Args:
        x: as for `lookup_dot`.
        w, scale, zero, instructions: as for `grouped_dot`.
    """
    x = _multiplied(x, instructions)
    return _dot("dot_widen", jnp.float32, instructions, x, w, *_floats(x, scale, zero))


def ragged_dot(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    sizes: jax.Array,
    row: jax.Array | None = None,
    table: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    instructions: str | None = None,
) -> jax.Array:
    """The rows of each expert times it: by the function here that multiplies such arrays.

    Args:
        x: int8 or floats, (M, K).
        w: int4 or int8, (E, N, K).
        scale, zero: (E, N, groups); a zero of None means 0.
        sizes: integers (E,), the rows of each expert, in order. Rows beyond their sum give zeros.
        row: scales of int8 rows, (M,); None means 1.
        table: of `lookup_dot`, for floats by int4.
        dtype: of the result: float32, or bfloat16 if x is int8.
        instructions: as for `quantize_rows`.
    """
    none = jnp.zeros(0, jnp.float32)
    is_int8 = x.dtype == jnp.int8
    x = x if is_int8 else _float(x)
    zeros = none.reshape(0, 0, 0) if zero is None else _float(zero)
    others = [none if a is None else _float(a) for a in (row, table)]
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), dtype)
    arrays = (x, w, _float(scale), zeros, *others, sizes.astype(jnp.int32))
    return call_kernel("ragged_dot", result, instructions, *arrays)


def attend(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    dtype: jax.typing.DTypeLike,
    key_scale: jax.Array | None,
    value_scale: jax.Array | None,
    starts: jax.Array,
    layer: jax.Array,
    instructions: str | None = None,
) -> jax.Array:
    """softmax(query . keys * key_scale) * value_scale times values, of the positions seen.

    Args:
        query: float32, (B, T, N, D): N / H heads for each of H key heads.
        keys, values: (L, B, H, S, D) as they are stored: the bits of `dtype`, 4-bit codes two to a
            byte along D.
        dtype: float32, bfloat16, int8, int4, or another one of 8 bits.
        key_scale, value_scale: (B, H, S); None means 1.
        starts: int32 (B,). Token t of sequence b sees the positions up to starts[b] + t.
        layer: int32 scalar, clipped to those that there are; a negative one counts from the end.
        instructions: as for `quantize_rows`.

    Returns:
        float32 (B, T, N, D). NaN and Inf are those of the formula.

    Error: that of float32 sums, and 2 ulp of each exponential.
    """
    kind = np.int64(_ATTENDED.get(jnp.dtype(dtype), len(_ATTENDED)))
    # The values of all bytes of such another dtype.
    table = np.arange(256, dtype=np.uint8).view(dtype) if kind == len(_ATTENDED) else None
    none = jnp.zeros(0, jnp.float32)
    others = [none if x is None else _float(x) for x in (table, key_scale, value_scale)]
    arrays = (query, keys, values, *others, starts, layer)
    result = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    return call_kernel("attend", result, instructions, *arrays, type=kind)


def take_slice(stack: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
    """`jax.lax.dynamic_index_in_dim(stack, index, axis, keepdims=False)`, copied as bytes.

    Args:
        stack: of any dtype; what one index of `axis` selects must fill an integer number of bytes.
        index: int32 scalar; a negative one counts from the end.
        axis: not negative; its length must not be 0.
    """
    assert unavailable() is None, unavailable()
    *outer, count = stack.shape[: axis + 1]
    inner = stack.shape[axis + 1 :]
    bits = math.prod(inner) * bits_of(stack.dtype)
    assert bits % 8 == 0, f"{stack.dtype}{list(inner)} does not fill whole bytes"
    assert count > 0, f"axis {axis} of {stack.shape} is empty"

    @jax.custom_batching.custom_vmap
    def copy(stack: jax.Array, index: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((*outer, *inner), stack.dtype)
        sizes = {"outer": math.prod(outer), "count": count, "bytes": bits // 8}
        call = jax.ffi.ffi_call("jaxquant_slice", result)
        return call(stack, index, **{name: np.int64(size) for name, size in sizes.items()})

    @copy.def_vmap
    def _(
        length: int, is_batched: Any, stack: jax.Array, index: jax.Array
    ) -> tuple[jax.Array, bool]:
        if is_batched[1]:
            axes = [0 if b else None for b in is_batched]
            plain = functools.partial(lax.dynamic_index_in_dim, axis=axis, keepdims=False)
            return jax.vmap(plain, axes)(stack, index), True
        return take_slice(stack, index, axis + 1), True

    return copy(stack, index)


def _multiplied(x: jax.Array | np.ndarray, instructions: str | None) -> jax.Array:
    """Activations in the dtype in which they are multiplied by weights."""
    is_many = x.dtype == jnp.bfloat16 and x.shape[0] >= _BFLOAT16_ROWS and x.size > 0
    if is_many and (instructions or instruction_sets()[0]) in _MULTIPLY_BFLOAT16:
        return jnp.asarray(x)
    return _float(x)


def _float(x: jax.Array | np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _floats(
    x: jax.Array, scale: jax.Array | InStack, zero: jax.Array | None
) -> tuple[jax.Array | InStack, jax.Array]:
    """Scales, which few rows of x are multiplied by as they are stored, and zero points."""
    own = _alone(scale)
    none = jnp.zeros((0, own.shape[1]), jnp.float32)
    is_stored = own.dtype == jnp.float32 or (x.shape[0] <= _STORED_SCALES and own.dtype in _HALVES)
    return scale if is_stored else _float(own), none if zero is None else _float(zero)


def _dot(
    name: str,
    dtype: jax.typing.DTypeLike,
    instructions: str | None,
    x: jax.Array,
    w: jax.Array | InStack,
    *others: jax.Array | InStack,
) -> jax.Array:
    """x (M, K) by weights (N, K), by the kernel of this name; all stacks have the same index."""
    result = jax.ShapeDtypeStruct((x.shape[0], _alone(w).shape[0]), dtype)
    call = functools.partial(call_kernel, name, result, instructions)
    if not isinstance(w, InStack):
        return call(x, w, jnp.zeros(0, jnp.int32), *map(_alone, others))

    def read(x: jax.Array, w: InStack, *others: jax.Array | InStack) -> jax.Array:
        arrays = (x.stack if isinstance(x, InStack) else x for x in others)
        return call(x, w.stack, w.index.reshape(1), *arrays)

    def alone(*args: Any) -> jax.Array:
        return _dot(name, dtype, instructions, *map(_alone, args))

    in_stack = jax.custom_batching.custom_vmap(read)

    @in_stack.def_vmap
    def _(length: int, is_batched: Any, *args: Any) -> tuple[jax.Array, bool]:
        # A loop over stacks would slice each of them.
        has_stacks = any(x.stack for x in is_batched if isinstance(x, InStack))
        run = alone if has_stacks else read
        axes = jax.tree.map(lambda batched: 0 if batched else None, is_batched)
        return jax.vmap(run, axes, axis_size=length)(*args), True

    return in_stack(x, w, *others)


def _alone(x: jax.Array | InStack) -> jax.Array:
    return x.slice if isinstance(x, InStack) else x
