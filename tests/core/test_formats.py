import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
from scipy import special

from jaxquant import (
    FORMATS,
    NF4,
    AbsMax,
    ArrayConfig,
    Format,
    MinMSE,
    Percentile,
    einsum,
    matmul,
    quantize,
)
from jaxquant.core import BNB_FP4, IQ2_NL, IQ3_NL, IQ4_NL, bits_of
from jaxquant.core.config import SCALE_DTYPES
from jaxquant.training.power_formats import POSITIVE_8, SIGNED_8
from jaxquant.tree.internal import histogram

from .. import cases, checks

each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


@each_format
def test_the_outermost_codes_are_those_of_the_dtype_or_of_the_codebook(format):
    if format.codebook is not None:
        assert (format.qmin, format.qmax) == (format.codebook[0], format.codebook[-1])
    elif format.rounds:
        info = ml_dtypes.iinfo(format.dtype)
        assert format.qmax == info.max
        assert format.qmin in (info.min, -info.max)
    else:
        info = ml_dtypes.finfo(format.dtype)
        assert (format.qmin, format.qmax) == (float(info.min), float(info.max))


@each_format
def test_bits_are_those_in_the_name_of_the_dtype(format):
    assert format.bits == checks.ml_dtypes_bits(format.dtype)
    assert bits_of(format.scale_dtype) == checks.ml_dtypes_bits(format.scale_dtype)
    assert str(format) == format.name


@each_format
def test_zero_is_a_point_of_every_format(format):
    config = next(iter(cases.cases_of(format).values())).config
    points = checks.points_of(config)
    assert 0 in points
    assert np.all(np.diff(points) > 0)


@pytest.mark.parametrize("name", cases.CASES)
def test_bytes_are_the_stated_bits(name):
    checks.check_true_bytes(cases.CASES[name], cases.gaussian())


def test_codes_of_all_formats_have_their_dtype():
    for name, case in cases.FEW.items():
        codes = jax.eval_shape(lambda case=case: quantize(cases.gaussian(), *case).codes)
        assert codes.dtype == case.config.format.dtype, name


def test_nf4_holds_quantiles_of_a_normal_distribution():
    # Dettmers et al. 2023, appendix E: eight quantiles above zero, seven below, and zero.
    offset = 0.9677083
    positive = special.ndtri(np.linspace(offset, 0.5, 9)[:-1])
    negative = -special.ndtri(np.linspace(offset, 0.5, 8)[:-1])
    expected = np.sort([*positive, 0, *negative]) / positive.max()
    np.testing.assert_allclose(np.asarray(NF4.codebook), expected, atol=1e-5)


@pytest.mark.parametrize(
    "row, text",
    [
        (("a", "int5", -1, 1), "a: dtype must be the name of a JAX dtype.*got 'int5'"),
        (("a", "int4", -9, 7), "both within the range of int4, -8 to 7; got -9 and 7"),
        (("a", "int8", 5, 5), "qmin must be less than qmax.* got 5 and 5"),
        (("a", "float8_e4m3fn", -448.0, 449.0), "both within the range of float8_e4m3fn"),
        (
            ("a", "uint2", -1.0, 1.0, (-1.0, 0.0, 0.2, 0.5, 1.0)),
            r"at most 4, the number of uint2 codes",
        ),
        (("a", "uint4", -1.0, 1.0, (-1.0, 1.0, 0.0)), "codebook must be an ascending tuple"),
        (("a", "uint4", -2.0, 1.0, (-1.0, 0.0, 1.0)), "both within the codebook, -1.0 to 1.0"),
    ],
)
def test_a_format_is_checked_on_construction(row, text):
    with pytest.raises(ValueError, match=text):
        Format(*row)


def test_a_format_without_negative_codes_requires_zero_points():
    unsigned = Format("uint8", "uint8", 0, 255)
    with pytest.raises(ValueError, match=r"qmin < 0 < qmax; got 0 to 255.*pass symmetric=False"):
        ArrayConfig(format=unsigned)
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    q = quantize(x, ArrayConfig(format=unsigned, symmetric=False), axis=1)
    assert (np.abs(q.dequantize() - x) <= 0.5001 * checks.scale_of(q)).all()


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("format", [IQ2_NL, IQ3_NL, IQ4_NL, BNB_FP4], ids=str)
def test_codebooks_of_other_programs_are_rounded_to_the_nearest_value(format):
    x = np.random.default_rng(0).normal(size=(24, 8, 32)).astype(np.float32)
    config = ArrayConfig(format=format, group_size=32)
    errors = []
    for range in (AbsMax(), MinMSE(), MinMSE(mirrored=True)):
        q = quantize(x.reshape(24, -1), dataclasses.replace(config, range=range), axis=1)
        scale = np.asarray(q.scale, np.float64).reshape(24, 8, 1, 1)
        distance = np.abs(x[..., None] - scale * np.asarray(format.codebook))
        found = np.take_along_axis(distance, np.asarray(q.codes, int).reshape(*x.shape, 1), -1)
        np.testing.assert_allclose(found[..., 0], distance.min(-1), atol=1e-5)
        errors.append((found**2).sum((2, 3)))
        if range == AbsMax():
            np.testing.assert_allclose(scale[..., 0, 0], abs(x).max(-1) / format.qmax, rtol=1e-6)
        product = einsum("mk,nk->mn", x[:4].reshape(4, -1), q)
        expected = x[:4].reshape(4, -1) @ q.dequantize().T
        np.testing.assert_allclose(product, expected, rtol=1e-5, atol=1e-4)
    plain, searched, mirrored = errors
    assert (searched <= plain).all()
    assert (mirrored <= searched * (1 + 1e-5)).all()
    assert (mirrored < searched).any() == (format != BNB_FP4)


@pytest.mark.some_rows(5)
@pytest.mark.parametrize("range", [AbsMax(), MinMSE(mirrored=True), Percentile(75)], ids=str)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES[1:])  # The first needs 64-bit JAX.
def test_groups_of_zeros_stay_near_zero_in_formats_without_one(range, scale_dtype):
    x = np.zeros((3, 8), np.float32)
    x[1] = np.arange(8) - 3
    x[2, 0] = 5  # Above the percentile.
    for format in (IQ2_NL, IQ4_NL):
        config = ArrayConfig(format=format, range=range, scale_dtype=scale_dtype)
        q = jax.jit(lambda x, config=config: quantize(x, config, axis=1))(x)
        assert np.all(checks.scale_of(q) != 0)
        found = np.asarray(q.dequantize())
        assert np.isfinite(found).all()
        assert np.abs(found[0]).max() < 0.01
        assert np.abs(found[1]).max() > 1


def test_codes_of_a_signed_dtype_are_the_bits_of_the_index():
    """As TensorStore keeps them, which does not know uint4."""
    x = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    for format, dtype in ((NF4, "int4"), (SIGNED_8, "int8"), (POSITIVE_8, "int8")):
        signed = dataclasses.replace(format, name="signed", dtype=dtype)
        q, other = (quantize(x, ArrayConfig(format=f, group_size=16)) for f in (format, signed))
        assert other.codes.dtype == dtype
        bits = jax.lax.bitcast_convert_type(other.codes, q.codes.dtype)
        np.testing.assert_array_equal(bits, q.codes)
        np.testing.assert_array_equal(other.dequantize(), q.dequantize())
        np.testing.assert_array_equal(matmul(x.T, other), matmul(x.T, q))
        assert histogram(other) == histogram(q)
