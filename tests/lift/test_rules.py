"""Each rule of `lift` against the function on the dequantized array."""

import functools

import jax
import numpy as np
import pytest

import jaxquant as jq

from . import cases

# Formats with 4-bit floats have the scales of other cases: one per group, and nested.
NARROW_FLOATS = ("mxfp4", "nvfp4")
OF_NARROW_FLOATS = ("dot_general", "transpose", "gather", "slice of groups", "scan")
OF_NARROW_FLOATS += ("reshape of groups", "conv_general_dilated")
PAIRS = [
    (name, quantized)
    for name in cases.ANY_GROUPS
    for quantized in cases.QUANTIZED
    if quantized not in NARROW_FLOATS or name in OF_NARROW_FLOATS
]
each_quantized = pytest.mark.parametrize("quantized", cases.QUANTIZED)


jitted = functools.cache(jax.jit)


def both(fn, q, **options):
    """Results of the lifted function, and of the function on the dequantized array."""
    lifted = jax.jit(jq.lift(fn, implementation="dequantize", **options))
    return lifted(q), jitted(fn)(jitted(jq.dequantize)(q))


@pytest.mark.parametrize("name, quantized", PAIRS)
def test_results_are_those_on_the_dequantized_array(name, quantized):
    fn = cases.ANY_GROUPS[name]
    found, expected = both(fn, cases.parameter(quantized))
    # Programs with 4-bit floats are compiled in another way: see tests/conftest.py.
    rtol = 1e-5 if quantized in NARROW_FLOATS else 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol), found, expected)


@pytest.mark.parametrize("name", cases.ANY_GROUPS)
@pytest.mark.parametrize("quantized", ["int4 g32", "nf4 g32 nested", "int4 g16 asymmetric"])
def test_nothing_is_dequantized_before_its_product(name, quantized):
    jax.eval_shape(jq.lift(cases.ANY_GROUPS[name], strict=True), cases.parameter(quantized))
    assert not jq.explain(jq.lift(cases.ANY_GROUPS[name]), cases.parameter(quantized)).dequantized


@pytest.mark.parametrize("name", cases.SCALING)
@each_quantized
def test_a_factor_becomes_part_of_the_scale(name, quantized):
    found, expected = both(cases.SCALING[name], cases.parameter(quantized), strict=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", cases.DEQUANTIZED)
def test_other_operations_dequantize_and_say_so(name):
    fn, q = cases.DEQUANTIZED[name], cases.parameter("int4 g32")
    found, expected = both(fn, q)
    # XLA fuses the operation with the dequantization, and may then sum in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert jq.explain(jq.lift(fn), q).dequantized
    with pytest.raises(ValueError, match=r"strict=True does not allow to dequantize a parameter"):
        jax.eval_shape(jq.lift(fn, strict=True), q)
