"""Loads the native kernels and registers them with XLA.

They are a shared library that does not use Python, so one file is for all versions of Python. It is
part of a wheel, or compiled when the package is installed from source, if there is a C++ compiler.
Without it, or on a processor without its instruction sets, `unavailable` says why, and XLA computes
instead. JAXQUANT_CPU_INSTRUCTIONS=AVX2 leaves out better sets than AVX2, and "none" all of them.
"""

import ctypes
import functools
import os
import pathlib
import zlib
from typing import Any

import jax
import jaxlib.version
import numpy as np

# The library, as setup.py names it.
_PATH = pathlib.Path(__file__).parents[1] / "_cpu.so"
_KERNELS = (
    *("quantize_rows", "dot_int8", "dot_groups", "dot_lookup", "dot_widen", "ragged_dot"),
    *("attend", "slice", "update_blocks"),
)
# The version of jaxlib that runs here.
JAXLIB: tuple[int, ...] = jaxlib.version.__version_info__
# Instruction sets, the best first, in the order of `kSets` in handlers.cc.
INSTRUCTIONS = ("AMX", "AVX512-VNNI", "AVX2", "NEON")
_VARIABLE = "JAXQUANT_CPU_INSTRUCTIONS"


def unavailable() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    return _loaded()[0]


def instruction_sets() -> tuple[str, ...]:
    """Names of the instruction sets that can be used here, the best first."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[str | None, tuple[str, ...]]:
    """Loads the library. Returns why that failed, and the supported instruction sets."""
    if not _PATH.exists():
        return "the native kernels were not built at installation: they need a C++ compiler", ()
    try:
        library = ctypes.CDLL(str(_PATH))
    except OSError as error:
        return f"{_PATH.name} cannot be loaded: {error}", ()
    built_with = tuple(library.jaxquant_jaxlib(i) for i in range(3))
    if built_with > JAXLIB:
        # Registered nevertheless, they would keep JAX from using CPUs at all.
        wanted, found = (".".join(map(str, version)) for version in (built_with, JAXLIB))
        return f"{_PATH.name} was built for jaxlib {wanted} or later, and this is {found}", ()
    allowed = _allowed()
    if not allowed:
        return f"{_VARIABLE} is none", ()
    # Only those: a process that asks whether it may use AMX may use it from then on.
    found = [name for name in allowed if library.jaxquant_has(INSTRUCTIONS.index(name))]
    if not found:
        return f"this processor supports none of {', '.join(allowed)}", ()
    # Handlers may have other arguments now.
    if not hasattr(library, "jaxquant_sources") or not _is_of_sources(library):
        return f"{_PATH.name} was compiled from other sources: install the package again", ()
    for name in _KERNELS:
        handler = jax.ffi.pycapsule(getattr(library, f"jaxquant_{name}"))
        jax.ffi.register_ffi_target(f"jaxquant_{name}", handler, platform="cpu")
    return None, tuple(found)


def _is_of_sources(library: Any) -> bool:
    """Whether the library was compiled from the sources beside this file; wheels have none."""
    here = pathlib.Path(__file__).parent
    files = sorted(here.glob("*.cc")) + sorted(here.glob("*.h"))
    library.jaxquant_sources.restype = ctypes.c_uint
    checksum = zlib.crc32(b"".join(file.read_bytes() for file in files))
    return not files or library.jaxquant_sources() == checksum


def _allowed() -> tuple[str, ...]:
    """The instruction sets that the environment allows.

    Raises:
        ValueError: the variable names none of them.
    """
    sets = {name: INSTRUCTIONS[i:] for i, name in enumerate(INSTRUCTIONS)} | {"none": ()}
    best = os.environ.get(_VARIABLE) or INSTRUCTIONS[0]
    if best not in sets:
        raise ValueError(
            f"{_VARIABLE} must be the best instruction set to use ({', '.join(INSTRUCTIONS)}) or "
            f"none; got {best!r}."
        )
    return sets[best]


def call_kernel(
    name: str,
    result: Any,
    instructions: str | None,
    *args: jax.Array,
    vmap_method: str = "sequential",
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> Any:
    """The results of a kernel, by an instruction set or by the best of this processor.

    Args:
        name: of the handler.
        result: shapes and dtypes.
        instructions: name of the set; None for the best one.
        args: arrays.
        vmap_method, aliases, attributes: as for `jax.ffi.ffi_call` and its result.
    """
    assert unavailable() is None, unavailable()
    instructions = instructions or instruction_sets()[0]
    assert instructions in instruction_sets(), instructions
    call = jax.ffi.ffi_call(
        f"jaxquant_{name}", result, vmap_method=vmap_method, input_output_aliases=aliases
    )
    return call(*args, set=np.int64(INSTRUCTIONS.index(instructions)), **attributes)
