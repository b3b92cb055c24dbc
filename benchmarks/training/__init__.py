"""Quantization in training, on real data: `python -m benchmarks --suite training`."""

import importlib.util
from typing import Any

# `smollm2` is a language model of 135 million parameters; the others are small.
SMOLLM2 = "smollm2"
PARTS = ("qat", "products", "optimizers", "qlora", "gradients", SMOLLM2)


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds.

    Raises:
        SystemExit: optax is not installed; the other suites do not need it.
    """
    if importlib.util.find_spec("optax") is None:
        raise SystemExit("The suite training needs optax, and found none: pip install optax.")
    from .. import machine
    from . import finetuning, parts

    asked, found = arguments.parts or list(PARTS), {}
    small = [name for name in asked if name != SMOLLM2]
    if small:
        found |= parts.run_all(arguments, small)
    if SMOLLM2 in asked:
        found |= finetuning.run_all(arguments, {"machine": machine.description()})
    return found
