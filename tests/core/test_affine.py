import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import ArrayConfig, Percentile, quantize

from .. import cases, checks

GRID = {n: c for n, c in cases.CASES.items() if not isinstance(c.config.range, Percentile)}


@pytest.mark.slow
@pytest.mark.some_rows(10)
@pytest.mark.parametrize("case", GRID.values(), ids=GRID)
def test_values_on_the_grid_come_back_exactly(case):
    checks.check_grid_round_trip(case, seed=0)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", [n for n in cases.FEW if n in GRID])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_values_on_the_grid_come_back_exactly(name, seed):
    checks.check_grid_round_trip(GRID[name], seed)


def test_asymmetric_values_at_a_tie_between_zero_point_and_code_stay_within_half_a_step():
    x = np.array([[-3.5, 11.5, 0.0, 5.5]], np.float32)
    config = ArrayConfig(format=cases.INT4, symmetric=False)
    q = quantize(x, config, axis=1)
    np.testing.assert_array_equal(q.scale, 1)
    assert np.all(np.abs(q.dequantize() - x) <= 0.5)


def test_ties_are_rounded_to_even():
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0]], np.float32)
    q = quantize(x, ArrayConfig(), axis=1)
    np.testing.assert_array_equal(q.scale, 1)
    np.testing.assert_array_equal(q.codes, [[127, 0, 2, 2, 0, -2, -2, 0]])
