"""What a benchmark ran on, and how fast that reads memory."""

import datetime
import os
import pathlib
import platform
import re
import time
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

PACKAGES = ("jaxquant", "jax", "jaxlib", "keras", "qwix", "numpy", "libtpu")


def description() -> dict[str, Any]:
    """The machine, the versions and the date, for tables and JSON."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": found,
        "date": datetime.date.today().isoformat(),
    }


def _processor():
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor()


def bandwidth(size: int = 2**28, rounds: int = 10) -> float:
    """Bytes per second of a sum over `size` bytes of float32, the best of some rounds."""
    x = jnp.ones(size // 4, jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        total(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return size / best
