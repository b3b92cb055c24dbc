"""Quantization in training, on real data: `python -m benchmarks --suite training`."""

import importlib.util
from typing import Any

# Of a language model of 135 million parameters; the others are small.
SMOLLM2, DISTILLATION = "smollm2", "distillation"
UPDATES = "updates"
PARTS = ("qat", "products", "optimizers", "qlora", "gradients", UPDATES, SMOLLM2, DISTILLATION)


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds.

    Raises:
        SystemExit: optax is not installed; the other suites do not need it.
    """
    if importlib.util.find_spec("optax") is None:
        raise SystemExit("The suite training needs optax, and found none: pip install optax.")
    from .. import machine
    from . import distillation, finetuning, parts, saved, updates

    others = {
        UPDATES: updates.run_all,
        SMOLLM2: finetuning.run_all,
        DISTILLATION: distillation.run_all,
    }
    asked, found = arguments.parts or list(PARTS), saved.parts_in(arguments.json)
    small = [name for name in asked if name not in others]
    if small:
        found |= parts.run_all(arguments, small)
    for name in (name for name in others if name in asked):
        found |= others[name](arguments, {"machine": machine.description()})
    return found
