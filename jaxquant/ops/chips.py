"""Which chip programs of this process are compiled for, as far as choices depend on it."""

import jax

_GENERATIONS = {
    "TPU v4": "v4",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "TPU7x",
}


def generation() -> str | None:
    """The generation of this process' TPUs, such as "v6e"; None for others, and without one."""
    return _GENERATIONS.get(jax.devices()[0].device_kind)
