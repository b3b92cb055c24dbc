import jax
import numpy as np
import pytest

from jaxquant import NF4, Format, Percentile

from . import cases, checks

INT6 = Format("int6", "int8", -31, 31)
# A codebook with as many entries as a byte has values.
SQUARES = tuple(float(np.sign(i) * i * i) for i in range(-128, 128))
SQUARES8 = Format("squares8", "uint8", -16129.0, 16129.0, codebook=SQUARES)

# MinMSE tries every ratio with every entry, for NF4 too, which has fewer.
OF_CODEBOOKS = [n for n in cases.VARIANTS_OF[NF4] if n != "min_mse"]

CASES = cases.cases_of(INT6, cases.SHORT) | cases.cases_of(SQUARES8, OF_CODEBOOKS)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@each_case
def test_a_format_of_one_line_passes_every_check(case):
    x = cases.gaussian()
    checks.check_matches_the_oracle(case, x)
    checks.check_is_nearest(case, x)
    checks.check_non_finite_marks_its_group(case, x)
    checks.check_zeros_are_exact(case, x)
    checks.check_true_bytes(case, x)
    if case.config.format.rounds:
        checks.check_error_bound(case, x)
    if not isinstance(case.config.range, Percentile):
        checks.check_grid_round_trip(case, seed=0)


@pytest.mark.slow
def test_a_format_of_one_line_runs_under_jit_and_vmap():
    checks.check_jit_and_eager_agree(CASES[f"{INT6}-asym_blocks"], cases.gaussian())
    checks.check_vmap_is_a_loop(CASES[f"{INT6}-asym_g32"], cases.gaussian((3, *cases.SHAPE)))


def test_a_format_is_static_and_shares_compilations_by_value():
    traces = []

    @jax.jit
    def name_of(format):
        traces.append(format)
        return format

    for _ in range(3):
        name_of(Format("int6", "int8", -31, 31))
    assert len(traces) == 1
