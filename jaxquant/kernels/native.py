"""Products on the CPU by machine code of our own, called through XLA's FFI.

`cpu.cc` is compiled when the package is installed, where there is a C++ compiler. Without it, or
on a processor that lacks its instructions, `unavailable` says why, and XLA computes.
"""

import ctypes
import functools
import importlib.machinery
import pathlib

import jax
import jax.numpy as jnp

# Elements of a 4-bit weight that the kernels take at a time.
BLOCK = 128
_KERNELS = ("int8", "int4", "lookup", "widen")


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    folder = pathlib.Path(__file__).parent
    files = [folder / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((p for p in files if p.exists()), None)
    if path is None:
        return "cpu.cc was not compiled as jaxquant was installed: it takes a C++ compiler"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    if not library.jaxquant_can_run():
        return "this processor has no AVX512-VNNI"
    for name in _KERNELS:
        handler = jax.ffi.pycapsule(getattr(library, f"jaxquant_dot_{name}"))
        jax.ffi.register_ffi_target(f"jaxquant_dot_{name}", handler, platform="cpu")
    return None


def refuses_groups(length: int, groups: int) -> str | None:
    """Why 4-bit weights with so many groups along `length` elements cannot be read, or None."""
    size = length // max(groups, 1)
    if length % BLOCK or (BLOCK % max(size, 1) and size % BLOCK) or size % 32:
        return f"groups of {size} along {length} elements do not fit blocks of {BLOCK}"
    return None


def int8_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T of int8 codes, (M, K) by (N, K), exact in int32: at most 131071 elements long."""
    return _call("int8", jnp.int32, w.shape[0], x, w)


def int4_dot(x: jax.Array, w: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    """Sums over groups of scale * sum of x * (w - zero), in float32.

    Args:
        x: int8, (M, K).
        w: int4, (N, K), in groups that `refuses_groups` admits.
        scale, zero: (N, groups); a zero point of None is 0.

    Error: sums within a group are exact; those of groups are rounded as float32 sums are.
    """
    return _call("int4", jnp.float32, w.shape[0], x, w, *_floats(scale, zero))


def lookup_dot(
    x: jax.Array, w: jax.Array, scale: jax.Array, zero: jax.Array | None, table: jax.Array
) -> jax.Array:
    """x @ ((table[bits of w] - zero) * scale).T in float32: x (M, K), the others as `int4_dot`.

    Args:
        table: (16,), what each pattern of 4 bits stands for.
    """
    table = jnp.asarray(table, jnp.float32)
    return _call("lookup", jnp.float32, w.shape[0], _float(x), w, *_floats(scale, zero), table)


def widen_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T in float32, of floats (M, K) and int8 codes (N, K)."""
    return _call("widen", jnp.float32, w.shape[0], _float(x), w)


def _float(x):
    return x.astype(jnp.float32)


def _floats(scale, zero):
    none = jnp.zeros((0, scale.shape[1]), jnp.float32)
    return _float(scale), none if zero is None else _float(zero)


def _call(name, dtype, columns, x, *others):
    reason = unavailable()
    assert reason is None, reason
    result = jax.ShapeDtypeStruct((x.shape[0], columns), dtype)
    call = jax.ffi.ffi_call(f"jaxquant_dot_{name}", result, vmap_method="sequential")
    return call(x, *others)
