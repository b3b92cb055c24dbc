"""A choice between ways to compute, by the TPU generation that a program is compiled for."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.interpreters import mlir

from .lowering import Function, choose_when_lowered

# Generations by what JAX calls their devices.
_GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
}

# Those with choices of their own, for which the compiler's estimates were compared.
TUNED = ("v5e", "v6e")


def tpu_generation(device: Any) -> str | None:
    """Generation of a device ("v5e", "v6e", "7x"), or None if it is no TPU, or an unknown one."""
    return _GENERATIONS.get(getattr(device, "device_kind", None) or "")


def generation() -> str | None:
    """The generation of this process' TPUs; None for others, and without one.

    A program may be compiled for another one: `by_generation` asks for that.
    """
    return tpu_generation(jax.devices()[0])


def by_generation(branches: Mapping[str, Function], default: Function, *args: Any) -> Any:
    """branches[generation](*args), by the TPU that the program is compiled for, or default(*args).

    Decided when the program is lowered, so right for TPUs that are described and not there. A
    program that `jax.export` writes can go anywhere: it takes the default.

    Args:
        branches: functions by generation.
        default: function for all others. All give results of one structure.
        args: arrays.
    """
    names = (*branches, None)

    def pick(context):
        chip = generation() if context is None else target(context.module_context)
        return names.index(chip if chip in branches else None)

    return choose_when_lowered((*branches.values(), default), pick, *args)


def target(module: mlir.ModuleContext) -> str | None:
    """The generation that a program is compiled for: all devices of a backend are of one kind."""
    if module.backend is None or module.lowering_parameters.for_export:
        return None
    return tpu_generation(module.backend.devices()[0])
