"""Modules that are imported when they are first used."""

import importlib
from typing import Any


class LazyModule:
    """Stands for a module that is slow to import, and imports it when an attribute is read.

    Args:
        name: of the module, absolute.

    Example:
        >>> LazyModule("fractions").Fraction(1, 2)
        Fraction(1, 2)
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
