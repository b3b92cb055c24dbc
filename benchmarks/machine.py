"""The machine of a benchmark, its memory bandwidth and its arithmetic throughput."""

import datetime
import os
import pathlib
import platform
import re
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

PACKAGES = ("jaxquant", "jax", "jaxlib", "keras", "qwix", "aqtp", "onnxruntime", "torchao", "numpy")
PACKAGES += ("libtpu",)


def description() -> dict[str, Any]:
    """Machine, versions and date, for tables and JSON."""
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


def peaks() -> dict[str, float]:
    """What the machine achieves, the reference for shares."""
    return {"bytes_per_second": bandwidth(), "operations_per_second": multiplication()}


def bandwidth(size: int = 2**28, rounds: int = 10) -> float:
    """Bytes per second of a sum over `size` bytes of float32, the best of some rounds."""
    call, size = summation(size)
    return size / _fastest(call, rounds)


def summation(size: int) -> tuple[Callable[[], jax.Array], int]:
    """A call that sums `size` bytes of float32, and the exact number of bytes."""
    x, add = jnp.ones(size // 4, jnp.float32), jax.jit(jnp.sum)
    return lambda: add(x), 4 * x.size


def multiplication(length: int = 2048, rounds: int = 5, dtype: str = "float32") -> float:
    """Operations per second of multiplying square matrices, the best of some rounds."""
    x = jnp.ones((length, length), dtype)
    return 2 * length**3 / _fastest(lambda: jax.jit(jnp.matmul)(x, x), rounds)


def _fastest(call, rounds):
    """The fastest of several calls in seconds, after one that compiles."""
    jax.block_until_ready(call())
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        best = min(best, time.perf_counter() - start)
    return best
