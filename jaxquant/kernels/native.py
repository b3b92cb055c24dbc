"""Native kernels for CPUs, called through XLA's FFI.

The sources in `cpu/` are compiled when the package is installed, if there is a C++ compiler.
Without them, or on a processor with none of their instruction sets, `unavailable` says why, and
XLA computes instead.
"""

import ctypes
import functools
import importlib.machinery
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..core import bits_of

# Elements of a 4-bit weight that the kernels take at a time, at most.
BLOCK = 128
_KERNELS = ("quantize_rows", "dot_int8", "dot_int4", "dot_lookup", "dot_widen", "slice")
# Instruction sets, the best first, in the order of `kSets` in cpu/handlers.cc.
_INSTRUCTIONS = ("AVX512-VNNI", "AVX2", "NEON")


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    return _library()[0]


def instruction_sets() -> tuple[str, ...]:
    """Names of the sets of instructions that can be used here, the best first."""
    return _library()[1]


@functools.cache
def _library() -> tuple[str | None, tuple[str, ...]]:
    """Loads the library: why that failed, and the sets of instructions that it can use."""
    folder = pathlib.Path(__file__).parent
    files = [folder / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((p for p in files if p.exists()), None)
    if path is None:
        return (
            "no native kernels were built when jaxquant was installed: they need a C++ compiler",
            (),
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}", ()
    found = [name for number, name in enumerate(_INSTRUCTIONS) if library.jaxquant_has(number)]
    if not found:
        return f"this processor has none of {', '.join(_INSTRUCTIONS)}", ()
    for name in _KERNELS:
        handler = jax.ffi.pycapsule(getattr(library, f"jaxquant_{name}"))
        jax.ffi.register_ffi_target(f"jaxquant_{name}", handler, platform="cpu")
    return None, tuple(found)


def refuses_groups(length: int, groups: int) -> str | None:
    """Why 4-bit weights with so many groups along `length` elements cannot be read, or None."""
    size = length // max(groups, 1)
    if length % BLOCK or (BLOCK % max(size, 1) and size % BLOCK) or size % 8:
        return f"groups of {size} along {length} elements do not fit blocks of {BLOCK}"
    return None


def quantize_rows(
    x: jax.Array, qmin: int = -127, qmax: int = 127, instructions: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of each row, by its largest magnitude, while the row is in the cache.

        scale = max|x| / min(-qmin, qmax)        codes = clip(round(x / scale), qmin, qmax)

    This and those below take the best instructions that there are, or those that are named.

    Args:
        x: float32 or bfloat16, (..., K).
        qmin, qmax: the outermost codes.

    Returns:
        codes, int8 (..., K), and scale, float32 (..., 1): the bits that `core.quantize` gives
        under `jax.jit`. A row of zeros has scale 1, one with NaN or Inf scale NaN, and both have
        codes of 0.
    """
    codes = jax.ShapeDtypeStruct(x.shape, jnp.int8)
    scale = jax.ShapeDtypeStruct((*x.shape[:-1], 1), jnp.float32)
    bounds = {"qmin": np.int64(qmin), "qmax": np.int64(qmax)}
    # Rows are quantized one by one, however many axes they have.
    one_call = "broadcast_all"
    result = codes, scale
    return _call("quantize_rows", result, instructions, x, vmap_method=one_call, **bounds)


def int8_dot(x: jax.Array, w: jax.Array, instructions: str | None = None) -> jax.Array:
    """x @ w.T of int8 codes, (M, K) by (N, K), exact in int32: at most 131071 elements long."""
    none = jnp.zeros(0, jnp.float32)
    return _call("dot_int8", _result(x, w, jnp.int32), instructions, x, w, none, none)


def scaled_int8_dot(
    x: jax.Array,
    w: jax.Array,
    row: jax.Array,
    column: jax.Array,
    dtype: jax.typing.DTypeLike = jnp.float32,
    instructions: str | None = None,
) -> jax.Array:
    """`int8_dot`, rounded to float32, times the scales of rows, times those of columns.

    Args:
        x, w: as for `int8_dot`.
        row, column: (M,) and (N,).
        dtype: of the result, float32 or bfloat16.
    """
    scales = _float(row), _float(column)
    return _call("dot_int8", _result(x, w, dtype), instructions, x, w, *scales)


def int4_dot(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    row: jax.Array | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    instructions: str | None = None,
) -> jax.Array:
    """Sums over groups of scale * sum of x * (w - zero), in float32, times the scales of rows.

    Args:
        x: int8, (M, K).
        w: int4, (N, K), in groups that `refuses_groups` admits.
        scale, zero: (N, groups); a zero point of None is 0.
        row: (M,); None for 1.
        dtype: of the result, float32 or bfloat16.

    Error: sums within a group are exact; those of groups are rounded as float32 sums are.
    """
    row = jnp.zeros(0, jnp.float32) if row is None else _float(row)
    others = w, *_floats(scale, zero), row
    return _call("dot_int4", _result(x, w, dtype), instructions, x, *others)


def lookup_dot(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    table: jax.Array,
    instructions: str | None = None,
) -> jax.Array:
    """x @ ((table[bits of w] - zero) * scale).T in float32: x (M, K), the others as `int4_dot`.

    Args:
        table: (16,), what each pattern of 4 bits stands for.
    """
    others = w, *_floats(scale, zero), _float(table)
    return _call("dot_lookup", _result(x, w, jnp.float32), instructions, _float(x), *others)


def widen_dot(x: jax.Array, w: jax.Array, instructions: str | None = None) -> jax.Array:
    """x @ w.T in float32, of floats (M, K) and int8 codes (N, K)."""
    return _call("dot_widen", _result(x, w, jnp.float32), instructions, _float(x), w)


def take_slice(stack: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
    """`jax.lax.dynamic_index_in_dim(stack, index, axis, keepdims=False)`, copied as bytes.

    Args:
        stack: elements of any width; those below one index of `axis` fill whole bytes.
        index: int32, a scalar; from -1 down it counts from the end.
        axis: from 0 up, at least 1 long.
    """
    assert unavailable() is None, unavailable()
    *outer, count = stack.shape[: axis + 1]
    inner = stack.shape[axis + 1 :]
    bits = math.prod(inner) * bits_of(stack.dtype)
    assert bits % 8 == 0, f"{stack.dtype}{list(inner)} is no whole number of bytes"
    assert count > 0, f"there is nothing along axis {axis} of {stack.shape}"

    @jax.custom_batching.custom_vmap
    def copy(stack, index):
        result = jax.ShapeDtypeStruct((*outer, *inner), stack.dtype)
        sizes = {"outer": math.prod(outer), "count": count, "bytes": bits // 8}
        call = jax.ffi.ffi_call("jaxquant_slice", result)
        return call(stack, index, **{name: np.int64(size) for name, size in sizes.items()})

    @copy.def_vmap
    def _(length, is_batched, stack, index):
        if is_batched[1]:
            axes = [0 if b else None for b in is_batched]
            plain = functools.partial(lax.dynamic_index_in_dim, axis=axis, keepdims=False)
            return jax.vmap(plain, axes)(stack, index), True
        return take_slice(stack, index, axis + 1), True

    return copy(stack, index)


def _float(x):
    return jnp.asarray(x, jnp.float32)


def _floats(scale, zero):
    none = jnp.zeros((0, scale.shape[1]), jnp.float32)
    return _float(scale), none if zero is None else _float(zero)


def _result(x, w, dtype):
    return jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), dtype)


def _call(name, result, instructions, *args, vmap_method="sequential", **attributes):
    assert unavailable() is None, unavailable()
    instructions = instructions or instruction_sets()[0]
    assert instructions in instruction_sets(), instructions
    call = jax.ffi.ffi_call(f"jaxquant_{name}", result, vmap_method=vmap_method)
    return call(*args, set=np.int64(_INSTRUCTIONS.index(instructions)), **attributes)
