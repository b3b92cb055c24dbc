"""Alternating timing of several ways to do the same work."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

Name = TypeVar("Name")


def by_turns(calls: Mapping[Name, Callable[[], Any]], rounds: int = 30) -> dict[Name, list[float]]:
    """Seconds of each call in each round. A first round, which compiles, is not counted.

    Each round has a new random order, because threads of a library that keep spinning after its
    turn slow down the next contender.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for number in range(rounds + 1):
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            times[name] += [time.perf_counter() - start] * (number > 0)
        shuffle(order)
    return times


def ratio(times: Mapping[Name, list[float]], name: Name, reference: Name) -> float:
    """The time of one call relative to another: the median over the rounds."""
    pairs = zip(times[name], times[reference], strict=True)
    return statistics.median(a / b for a, b in pairs)
