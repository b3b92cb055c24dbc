"""Loads the native kernels and registers them with XLA.

They are compiled when the package is installed, if there is a C++ compiler. Without them, or on a
processor without their instruction sets, `unavailable` says why, and XLA computes instead.
"""

import ctypes
import functools
import importlib.machinery
import pathlib

import jax

# The folder that the kernels are built into.
_FOLDER = pathlib.Path(__file__).parents[1]
_KERNELS = ("quantize_rows", "dot_int8", "dot_groups", "dot_lookup", "dot_widen", "slice")
# Instruction sets, the best first, in the order of `kSets` in handlers.cc.
INSTRUCTIONS = ("AVX512-VNNI", "AVX2", "NEON")


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    return _loaded()[0]


def instruction_sets() -> tuple[str, ...]:
    """Names of the instruction sets that can be used here, the best first."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[str | None, tuple[str, ...]]:
    """Loads the library. Returns why that failed, and the supported instruction sets."""
    files = [_FOLDER / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((p for p in files if p.exists()), None)
    if path is None:
        return "the native kernels were not built at installation: they need a C++ compiler", ()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}", ()
    found = [name for number, name in enumerate(INSTRUCTIONS) if library.jaxquant_has(number)]
    if not found:
        return f"this processor supports none of {', '.join(INSTRUCTIONS)}", ()
    for name in _KERNELS:
        handler = jax.ffi.pycapsule(getattr(library, f"jaxquant_{name}"))
        jax.ffi.register_ffi_target(f"jaxquant_{name}", handler, platform="cpu")
    return None, tuple(found)
