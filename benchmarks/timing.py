"""Times of several ways to do the same work, taken by turns in one run."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def by_turns(calls: Mapping[str, Callable[[], Any]], rounds: int = 30) -> dict[str, list[float]]:
    """Seconds of each call in each round; a first round, which compiles, is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name] += [time.perf_counter() - start] * (number > 0)
    return times


def ratio(times: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Time of one in units of another's: the median over the rounds."""
    pairs = zip(times[name], times[reference], strict=True)
    return statistics.median(a / b for a, b in pairs)
