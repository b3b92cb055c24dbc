"""Blocks of reshaped arrays, against a search over all block shapes."""

import itertools
import math

import numpy as np
import pytest

from jaxquant.lift.reshaped import paired_axes, reshaped_blocks

SIZES = (1, 12, 16, 24, 36)


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


def shapes(size, rank):
    """All shapes of a size, of up to `rank` axes, with at most one axis of length 1."""
    every = itertools.chain(
        *(itertools.product(divisors(size), repeat=r) for r in range(1, rank + 1))
    )
    return [s for s in every if math.prod(s) == size and s.count(1) <= 1]


def block_numbers(shape, blocks):
    """For each element the number of its block."""
    numbers = np.zeros(shape, int)
    for places, n, block in zip(np.indices(shape), shape, blocks, strict=True):
        numbers = numbers * (n // block) + places // block
    return numbers


@pytest.mark.parametrize("seed", range(300))
def test_blocks_hold_the_same_elements_and_lie_in_the_same_order(seed):
    random = np.random.default_rng(seed)
    size = int(random.choice(SIZES))
    source, target = (shapes(size, 3)[i] for i in random.integers(len(shapes(size, 3)), size=2))
    blocks = [int(random.choice(divisors(n))) for n in source]

    found = reshaped_blocks(source, blocks, target)

    numbers = block_numbers(source, blocks).reshape(target)
    if found is not None:
        np.testing.assert_array_equal(block_numbers(target, found), numbers)
    elif all(a % b == 0 or b % a == 0 for a in _ends(source) for b in _ends(target)):
        # Only shapes that cannot be divided into the same pieces may be given up.
        every = itertools.product(*map(divisors, target))
        assert not any((block_numbers(target, b) == numbers).all() for b in every)


def _ends(shape):
    return list(itertools.accumulate(reversed(shape), lambda a, b: a * b))


@pytest.mark.parametrize(
    "source, target, runs",
    [
        ((4, 6), (4, 2, 3), [((0,), (0,)), ((1,), (1, 2))]),
        ((2, 3, 4), (6, 4), [((0, 1), (0,)), ((2,), (1,))]),
        ((4,), (1, 4, 1), [((0,), (0, 1, 2))]),
        ((6, 4), (4, 6), [((0, 1), (0, 1))]),
        ((1,), (), [((0,), ())]),
    ],
)
def test_axes_are_paired_in_the_shortest_runs(source, target, runs):
    assert [(tuple(a), tuple(b)) for a, b in paired_axes(source, target)] == runs


@pytest.mark.parametrize("blocks, expected", [((1, 1), (1, 1)), ((6, 4), (4, 6)), ((6, 1), None)])
def test_one_block_and_one_per_element_fit_any_shape(blocks, expected):
    assert reshaped_blocks((6, 4), blocks, (4, 6)) == expected
