"""Each rule of `lift` against the function on the dequantized array."""

import functools

import jax
import numpy as np
import pytest

import jaxquant as jq

from . import cases

# Every function meets a parameter with all that a QTensor can have: groups, zero points, offsets.
# Those that treat scales in different ways meet the other formats too.
MOST = "int4 g16 asymmetric"
OF_ALL = ("dot_general", "transpose", "gather", "slice of groups", "scan")
OF_ALL += ("reshape of groups", "conv_general_dilated")
PAIRS = [
    (name, quantized)
    for name in cases.ANY_GROUPS
    for quantized in cases.QUANTIZED
    if quantized == MOST or name in OF_ALL
]


jitted = functools.cache(jax.jit)


def both(fn, q, **options):
    """Results of the lifted function, and of the function on the dequantized array."""
    lifted = jax.jit(jq.lift(fn, implementation="dequantize", **options))
    return lifted(q), jitted(fn)(jitted(jq.dequantize)(q))


@pytest.mark.slow
@pytest.mark.some_rows(17)
@pytest.mark.parametrize("name, quantized", PAIRS)
def test_results_are_those_on_the_dequantized_array(name, quantized):
    fn = cases.ANY_GROUPS[name]
    found, expected = both(fn, cases.parameter(quantized))
    # The two programs may round products and sums in another order.
    is_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(is_close, found, expected)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", cases.ANY_GROUPS)
@pytest.mark.parametrize("quantized", ["int4 g32", "nf4 g32 nested", MOST])
def test_nothing_is_dequantized_before_its_product(name, quantized):
    jax.eval_shape(jq.lift(cases.ANY_GROUPS[name], strict=True), cases.parameter(quantized))
    assert not jq.explain(jq.lift(cases.ANY_GROUPS[name]), cases.parameter(quantized)).dequantized


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", cases.SCALING)
@pytest.mark.parametrize("quantized", ["int8 per tensor", "nf4 g32 nested", MOST])
def test_a_factor_becomes_part_of_the_scale(name, quantized):
    found, expected = both(cases.SCALING[name], cases.parameter(quantized), strict=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", cases.DEQUANTIZED)
def test_other_operations_dequantize_and_say_so(name):
    fn, q = cases.DEQUANTIZED[name], cases.parameter("int4 g32")
    found, expected = both(fn, q)
    # XLA fuses the operation with the dequantization, and may then sum in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert jq.explain(jq.lift(fn), q).dequantized
    with pytest.raises(ValueError, match=r"strict=True does not allow to dequantize a parameter"):
        jax.eval_shape(jq.lift(fn, strict=True), q)
