"""The choice of one option per item with the least total score within a budget."""

import itertools
from collections.abc import Sequence

import numpy as np


def choose(
    bits: Sequence[Sequence[float]], scores: Sequence[Sequence[float]], budget: float
) -> list[int]:
    """One option per item: the least sum of scores whose bits are within the budget, nearly.

    One multiplier serves all items: each takes the option that minimizes score + m * bits, for the
    smallest m that fits. What is left of the budget is then spent greedily.

    Args:
        bits: of each option of each item.
        scores: likewise; inf for options that an item does not have.
        budget: the sum of bits that is not exceeded.

    Returns:
        The index of the option of each item. The score is above the optimum by less than the
        difference between the scores of two options of one item.

    Raises:
        ValueError: the smallest options exceed the budget.

    Source: Everett 1963, Generalized Lagrange multiplier method; Sinha and Zoltners 1979, The
        multiple-choice knapsack problem.
    """
    hulls = [_hull(b, s) for b, s in zip(bits, scores, strict=True)]
    chosen = [hull[0] for hull in hulls]
    spent = sum(b[c] for b, c in zip(bits, chosen, strict=True))
    if spent > budget:
        raise ValueError(
            f"the budget must hold the smallest option of each item; got {budget:.0f} bits, and "
            f"they take {spent:.0f}"
        )
    # The steps along all hulls in order of their slopes: m falls from infinity.
    steps = [
        ((s[a] - s[b]) / (size[b] - size[a]), i, b)
        for i, (hull, size, s) in enumerate(zip(hulls, bits, scores, strict=True))
        for a, b in itertools.pairwise(hull)
    ]
    for _, i, option in sorted(steps, key=lambda step: -step[0]):
        cost = bits[i][option] - bits[i][chosen[i]]
        if spent + cost > budget:
            break
        spent, chosen[i] = spent + cost, option
    return _filled(bits, scores, budget - spent, chosen)


def _hull(bits: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Options on the lower convex hull of (bits, score), by increasing bits."""
    order = sorted(range(len(bits)), key=lambda c: (bits[c], scores[c]))
    hull: list[int] = []
    for c in order:
        if not np.isfinite(scores[c]) or (hull and scores[c] >= scores[hull[-1]]):
            continue
        while len(hull) > 1 and not _turns(hull[-2], hull[-1], c, bits, scores):
            hull.pop()
        hull.append(c)
    return hull


def _turns(a: int, b: int, c: int, bits: Sequence[float], scores: Sequence[float]) -> bool:
    """Whether option b lies below the line from a to c."""
    first = (scores[a] - scores[b]) * (bits[c] - bits[b])
    return first > (scores[b] - scores[c]) * (bits[b] - bits[a])


def _filled(
    bits: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    left: float,
    chosen: list[int],
) -> list[int]:
    """The choice after the upgrades that still fit, those that gain most per bit first."""
    while True:
        upgrades = [
            ((s[now] - s[c]) / max(size[c] - size[now], 1e-9), i, c)
            for i, (size, s, now) in enumerate(zip(bits, scores, chosen, strict=True))
            for c in range(len(s))
            if s[c] < s[now] and size[c] - size[now] <= left
        ]
        if not upgrades:
            return chosen
        _, i, option = max(upgrades)
        left -= bits[i][option] - bits[i][chosen[i]]
        chosen[i] = option
