"""The choice under a budget against the exact optimum, by dynamic programming."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxquant.allocation.knapsack import choose


def optimum(bits, scores, budget):
    """The least score within the budget, by dynamic programming over bits."""
    best = np.zeros(budget + 1)
    for size, score in zip(bits, scores, strict=True):
        new = np.full(budget + 1, np.inf)
        for b, s in zip(size, score, strict=True):
            if b <= budget:
                new[b:] = np.minimum(new[b:], best[: budget + 1 - b] + s)
        best = new
    return best[budget]


@st.composite
def problems(draw):
    count = draw(st.integers(1, 6))
    options = [draw(st.integers(1, 5)) for _ in range(count)]
    bits = [draw(st.lists(st.integers(1, 12), min_size=n, max_size=n)) for n in options]
    score = st.floats(0, 10, allow_subnormal=False) | st.just(float("inf"))
    scores = [draw(st.lists(score, min_size=n, max_size=n)) for n in options]
    for row in scores:
        row[draw(st.integers(0, len(row) - 1))] = draw(st.floats(0, 10, allow_subnormal=False))
    known = [
        min(b for b, s in zip(*pair, strict=True) if np.isfinite(s))
        for pair in zip(bits, scores, strict=True)
    ]
    return bits, scores, sum(known) + draw(st.integers(0, 40))


@pytest.mark.slow
@hypothesis.given(problems())
@hypothesis.settings(max_examples=300)
def test_the_choice_is_within_one_item_of_the_optimum_and_in_the_budget(problem):
    bits, scores, budget = problem
    chosen = choose(bits, scores, budget)
    assert sum(b[c] for b, c in zip(bits, chosen, strict=True)) <= budget
    found = sum(s[c] for s, c in zip(scores, chosen, strict=True))
    assert np.isfinite(found)
    spans = [np.ptp([s for s in row if np.isfinite(s)]) for row in scores]
    assert found <= optimum(bits, scores, budget) + max(spans) + 1e-9


def test_many_items_come_close_to_the_optimum():
    random = np.random.default_rng(0)
    sizes = random.integers(1, 9, 60)
    bits = [[int(n * b) for b in (2, 3, 4, 6, 8)] for n in sizes]
    scores = [
        [a * n * 4.0**-b for b in (2, 3, 4, 6, 8)]
        for a, n in zip(random.lognormal(0, 2, 60), sizes, strict=True)
    ]
    budget = int(4.2 * sizes.sum())
    chosen = choose(bits, scores, budget)
    found = sum(s[c] for s, c in zip(scores, chosen, strict=True))
    assert sum(b[c] for b, c in zip(bits, chosen, strict=True)) <= budget
    assert found <= 1.02 * optimum(bits, scores, budget)
    uniform = sum(s[2] for s in scores)
    assert found < 0.7 * uniform


def test_high_rate_theory():
    # score a 2^(-2 b): b_i is the mean of b plus log2(a_i / geometric mean) / 2.
    a = 4.0 ** np.array([0, 1, 2, 3])
    options = range(1, 12)
    bits = [[*options]] * 4
    scores = [[x * 4.0**-b for b in options] for x in a]
    chosen = choose(bits, scores, 4 * 5 + 2)
    assert [c + 1 for c in chosen] == [4, 5, 6, 7]


def test_budgets_below_the_smallest_options_are_errors():
    with pytest.raises(ValueError, match="got 5 bits, and they take 6"):
        choose([[2, 4], [4, 8]], [[1, 0], [1, 0]], 5)
