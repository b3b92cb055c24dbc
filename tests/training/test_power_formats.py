import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import ArrayConfig, Format, quantize
from jaxquant.core import power_codebook
from jaxquant.training.power_formats import GRADIENT_8, POSITIVE_4, POSITIVE_8, SIGNED_4, SIGNED_8

from .. import cases, checks, oracles

FORMATS = {f.name: f for f in (GRADIENT_8, SIGNED_8, SIGNED_4, POSITIVE_8, POSITIVE_4)}
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def case_of(format):
    return cases.along(1, format=format, group_size=64)


@pytest.mark.some_rows(2)
@each_format
def test_codes_are_the_nearest_entries_of_the_codebook(format):
    case, x = case_of(format), cases.gaussian()
    x *= np.exp2(np.random.default_rng(1).integers(-20, 1, x.shape)).astype(np.float32)
    checks.check_matches_the_oracle(case, x)
    checks.check_non_finite_marks_its_group(case, x)
    checks.check_zeros_are_exact(case, x)
    checks.check_true_bytes(case, x)
    if format.has_negative:
        checks.check_is_nearest(case, x)


@pytest.mark.parametrize(
    ("format", "smallest"),
    [
        (SIGNED_8, 127**-4),
        (POSITIVE_8, 255**-4),
        (SIGNED_4, 7**-2),
        (POSITIVE_4, 15**-2),
        (GRADIENT_8, 127**-2),
    ],
    ids=str,
)
def test_formats_of_averages_reach_smaller_values(format, smallest):
    """8-bit averages use fourth powers; 4-bit averages and gradient sums use squares."""
    assert min(v for v in format.codebook if v > 0) == pytest.approx(smallest, rel=1e-12)


@pytest.mark.some_rows(2)
@each_format
def test_every_code_survives_a_round_trip(format):
    """Each entry of the codebook, in a group that contains the largest."""
    book = np.resize(np.asarray(format.codebook), 256)
    book[::64] = 1
    q = quantize(jnp.asarray(book[None], jnp.float32), *case_of(format))
    np.testing.assert_array_equal(q.scale, np.ones((1, 4)))
    np.testing.assert_array_equal(oracles.code_values(q.codes, format)[0], book)
    np.testing.assert_allclose(q.dequantize()[0], book, rtol=5e-7)


@pytest.mark.slow
@pytest.mark.parametrize("format", [POSITIVE_8, POSITIVE_4], ids=str)
def test_positive_elements_never_become_zero(format):
    x = np.array([[0, 1e-30, 1e-9, 1.0], [0, 0, 0, 0], [-1, 0, -1e-9, 0.5]], np.float32)
    key = jax.random.key(0)
    for q in (quantize(x, ArrayConfig(format=format), 1, k) for k in (None, key)):
        assert q.codes[0, 1:3].astype(int).tolist() == [1, 1]
        assert np.asarray(q.dequantize())[[0, 1, 2], [0, 2, 1]].tolist() == [0, 0, 0]
        # Negative elements become zero.
        assert np.asarray(q.dequantize())[2, :3].tolist() == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.some_rows(2)
@each_format
def test_stochastic_rounding_is_unbiased_between_neighboring_codes(format):
    random = np.random.default_rng(0)
    wanted = np.append(random.uniform(0.05, 1, 15), 1)[:, None].astype(np.float32)
    wanted[:8] *= -1 if format.has_negative else 1
    x = np.concatenate([np.repeat(wanted, 1023, 1), np.ones((16, 1), np.float32)], 1)
    q = quantize(x, ArrayConfig(format=format), 1, jax.random.key(0))
    codes, values = checks.codes_of(q)[:, :-1], np.asarray(q.dequantize())[:, :-1]
    assert np.ptp(codes, 1).max() <= 1
    gaps = values.max(1) - values.min(1)
    assert np.all(np.abs(values.mean(1) - wanted[:, 0]) <= 4.5 * gaps / 2 / 32 + 1e-6)
    book = np.asarray(format.codebook)
    assert np.all(np.abs(values - x[:, :-1]) <= np.max(np.diff(book)))


@pytest.mark.parametrize("power, count", [(2, 127), (4, 255)])
def test_roots_of_a_power_codebook_are_equidistant(power, count):
    book = np.asarray(power_codebook(power, count, False))
    np.testing.assert_allclose(book ** (1 / power), np.arange(count + 1) / count, rtol=1e-12)
    both = np.asarray(power_codebook(power, count, True))
    np.testing.assert_array_equal(both[count:], book)
    np.testing.assert_array_equal(both, -both[::-1])


@pytest.mark.parametrize(
    "power, book", [(2, (-1.0, 0.0, 0.3, 1.0)), (3, (0.0, 0.125, 1.0)), (4, (0.0, 0.25, 1.0))]
)
def test_the_power_must_match_the_codebook(power, book):
    with pytest.raises(ValueError, match=rf"power must be 2 or 4, .*got {power} and \("):
        Format("a", "uint4", book[0], 1.0, codebook=book, power=power)
    with pytest.raises(ValueError, match=r"got 2 and \(\)"):
        Format("a", "int8", -127, 127, power=2)
