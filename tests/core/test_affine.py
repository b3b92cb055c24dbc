import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import ArrayConfig, Percentile, quantize
from jaxquant.core import block_shape

from .. import cases, checks

GRID = {n: c for n, c in cases.CONFIGS.items() if not isinstance(c.range, Percentile)}


@pytest.mark.parametrize("config", GRID.values(), ids=GRID)
def test_values_on_the_grid_come_back_exactly(config):
    checks.check_grid_round_trip(config, seed=0)


@pytest.mark.parametrize("name", [n for n in cases.FEW if n in GRID])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_values_on_the_grid_come_back_exactly(name, seed):
    checks.check_grid_round_trip(GRID[name], seed)


BLOCKS = [
    ((6, 8), {"axis": 0}, (6, 1)),
    ((6, 8), {"axis": -1, "group_size": 4}, (1, 4)),
    ((6, 8), {"axis": None}, (6, 8)),
    ((6, 8), {"axis": None, "group_size": 2}, (2, 2)),
    ((6, 8), {"axis": (1, 0), "group_size": (4, 3)}, (3, 4)),
    ((6, 8), {"axis": (1, 0), "group_size": (None, 3)}, (3, 8)),
    ((6, 8, 5), {"axis": (-1, 0)}, (6, 1, 5)),
    ((0, 8), {"axis": 0, "group_size": 4}, (4, 1)),
]


@pytest.mark.parametrize("shape, fields, expected", BLOCKS, ids=str)
def test_blocks_have_the_lengths_of_the_groups(shape, fields, expected):
    assert block_shape(shape, ArrayConfig(**fields)) == expected


INDIVISIBLE = [
    ((12, 7), 0, 5, r"axis 0; got group_size=5 for shape \(12, 7\)\. .* choose 4 or 6\."),
    ((12, 7), 1, 2, r"axis 1; got group_size=2 for shape \(12, 7\)\. .* choose 1 or 7\."),
    ((12, 7), -1, 9, r"axis 1; got group_size=9 for shape \(12, 7\)\. .* choose 7\."),
    ((12, 7), None, 4, r"axis 1; got group_size=4 for shape \(12, 7\)"),
    ((12, 7), (1, 0), 6, r"axis 1; got group_size=6"),
]


@pytest.mark.parametrize("shape, axis, group_size, message", INDIVISIBLE, ids=str)
def test_a_group_size_must_divide_and_the_error_says_which_would(shape, axis, group_size, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones(shape), ArrayConfig(axis=axis, group_size=group_size))


def test_an_axis_must_be_there():
    with pytest.raises(ValueError, match=r"axis must lie in -2 \.\. 1 for an array of 2 axes; got"):
        quantize(jnp.ones((4, 4)), ArrayConfig(axis=2))


def test_arrays_are_reached_by_splitting_axes_and_never_by_moving_them():
    for config in cases.FEW.values():
        jaxpr = jax.make_jaxpr(lambda x, c=config: quantize(x, c))(cases.gaussian())
        assert "transpose" not in str(jaxpr)


def test_asymmetric_values_at_a_tie_between_zero_point_and_code_stay_within_half_a_step():
    x = np.array([[-3.5, 11.5, 0.0, 5.5]], np.float32)
    config = ArrayConfig(format=cases.INT4, axis=1, symmetric=False)
    q = quantize(x, config)
    np.testing.assert_array_equal(q.scale, 1)
    assert np.all(np.abs(q.dequantize() - x) <= 0.5)
