import jax
import numpy as np
import pytest

from jaxquant import Format, Percentile

from . import cases, checks

INT6 = Format("int6", "int8", -31, 31)
# A codebook with as many entries as a byte has values.
SQUARES = tuple(float(np.sign(i) * i * i) for i in range(-128, 128))
SQUARES8 = Format("squares8", "uint8", -16129.0, 16129.0, codebook=SQUARES)

CONFIGS = cases.configs_of(INT6, is_alike=True) | cases.configs_of(SQUARES8)
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each_config
def test_a_format_of_one_line_passes_every_check(config):
    x = cases.gaussian()
    checks.check_matches_the_oracle(config, x)
    checks.check_is_nearest(config, x)
    checks.check_non_finite_marks_its_group(config, x)
    checks.check_zeros_are_exact(config, x)
    checks.check_true_bytes(config, x)
    if config.format.rounds:
        checks.check_error_bound(config, x)
    if not isinstance(config.range, Percentile):
        checks.check_grid_round_trip(config, seed=0)


@pytest.mark.parametrize("name", ["row", "asym_g32", "asym_blocks"])
def test_a_format_of_one_line_runs_under_jit_and_vmap(name):
    config = CONFIGS[f"{INT6}-{name}"]
    checks.check_jit_and_eager_agree(config, cases.gaussian())
    checks.check_vmap_is_a_loop(config, cases.gaussian((3, *cases.SHAPE)))


def test_a_format_is_static_and_shares_compilations_by_value():
    traces = []

    @jax.jit
    def name_of(format):
        traces.append(format)
        return format

    for _ in range(3):
        name_of(Format("int6", "int8", -31, 31))
    assert len(traces) == 1
