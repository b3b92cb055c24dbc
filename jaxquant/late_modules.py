"""Modules of the package that are imported when they are first used, as `jq.training` is.

`jaxquant` has these two functions as its own, and Python calls them (PEP 562). Together the modules
take a third of the time of `import jaxquant`, and a program that runs a quantized model needs none.
"""

import importlib
import sys
import types

PACKAGE = __name__.rpartition(".")[0]
LATE = ("checkpoints", "training", "tuning")


def __getattr__(name: str) -> types.ModuleType:
    """The module of that name, imported."""
    if name not in LATE:
        raise AttributeError(f"module {PACKAGE!r} has no attribute {name!r}")
    return importlib.import_module(f"{PACKAGE}.{name}")


def __dir__() -> list[str]:
    """Public names, whether their modules are imported or not."""
    return sorted({*vars(sys.modules[PACKAGE]), *LATE} - {"TYPE_CHECKING"})
