"""Selection between computations by the TPU generation that a program is compiled for."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.interpreters import mlir

from .lowering import Function, lowering_switch

# Generations by the `device_kind` of their devices.
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

# Generations that are selected for separately: their estimates by the compiler were compared.
TUNED = ("v5e", "v6e")


def tpu_generation(device: Any) -> str | None:
    """Generation of a device ("v5e", "v6e", "7x"); None for other devices and unknown TPUs."""
    return _GENERATIONS.get(getattr(device, "device_kind", None) or "")


def generation() -> str | None:
    """The generation of this process' TPUs; None if it has none, or unknown ones.

    A program may be compiled for another generation: `by_generation` selects by that one.
    """
    return tpu_generation(jax.devices()[0])


def by_generation(branches: Mapping[str, Function], default: Function, *args: Any) -> Any:
    """branches[generation](*args) for the TPU that the program is compiled for, or default(*args).

    Selected when the program is lowered, so it is right for TPUs that are only described, too.
    Exported programs can run anywhere, so they use the default.

    Args:
        branches: functions by generation.
        default: function for all others. All return results of the same structure.
        args: pytrees of arrays.
    """
    names = (*branches, None)

    def select(context: Any) -> int:
        chip = generation() if context is None else target(context.module_context)
        return names.index(chip if chip in branches else None)

    return lowering_switch((*branches.values(), default), select, *args)


def target(module: mlir.ModuleContext) -> str | None:
    """The generation that a program is compiled for; all devices of a backend are of one kind."""
    if module.backend is None or module.lowering_parameters.for_export:
        return None
    return tpu_generation(module.backend.devices()[0])
