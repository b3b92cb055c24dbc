"""Quantization in training, on real data: `python -m benchmarks --suite training`."""

import importlib.util
from typing import Any

PARTS = ("qat", "products", "optimizers", "qlora", "gradients")


def suite(arguments: Any) -> dict[str, Any]:
    """Runs the suite, prints its tables, and returns what the JSON file holds.

    Raises:
        SystemExit: optax is not installed; the other suites do not need it.
    """
    if importlib.util.find_spec("optax") is None:
        raise SystemExit("The suite training needs optax, and found none: pip install optax.")
    from . import parts

    return parts.run_all(arguments)
