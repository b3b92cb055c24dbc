"""PartitionSpecs of the arrays of a QTensor."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import INT4, NVFP4, ArrayConfig, Inputs, quantize, specs

P = jax.P
X = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)


def mesh(*lengths):
    names = ("a", "b")[: len(lengths)]
    kinds = (jax.sharding.AxisType.Auto,) * len(lengths)
    return jax.make_mesh(lengths, names, axis_types=kinds)


def test_codes_are_divided_in_the_order_in_which_they_are_stored():
    q = quantize(X, ArrayConfig(format=INT4, group_size=16), axis=0)
    found = specs(q, P("a", "b"))
    assert (found.codes, found.scale) == (P("a", "b"), P("a", "b"))
    swapped = specs(q.reorder((-1, -2)), P("a", "b"))
    assert (swapped.codes, swapped.scale) == (P("b", "a"), P("b", "a"))
    assert specs(q, P("a")).codes == P("a", None)


def test_block_scales_are_divided_along_axes_with_several_blocks():
    q = quantize(X, ArrayConfig(symmetric=False), axis=0)
    q = dataclasses.replace(q, offset=q.scale, inputs=Inputs(multiplier=jnp.ones(64)))
    found = specs(q, P("a", "b"))
    assert found.scale == found.zero_point == found.offset == P(None, "b")
    assert found.inputs.multiplier == P()


def test_nested_scales_are_divided_like_their_codes():
    found = specs(quantize(X, ArrayConfig(format=NVFP4), axis=0), P("a", "b"))
    assert found.scale.codes == P("a", "b")
    assert found.scale.scale == P(None, None)


def test_scales_that_the_devices_cannot_share_are_replicated():
    q = quantize(X, ArrayConfig(format=INT4, group_size=32), axis=0)
    found = specs(q, P("a", "b"), mesh(4, 2))
    assert (found.codes, found.scale) == (P("a", "b"), P(None, "b"))
    both = specs(q, P(("a", "b"), None), mesh(4, 2))
    assert (both.codes, both.scale) == (P(("a", "b"), None), P(None, None))


@pytest.mark.parametrize(
    ("spec", "on", "text"),
    [
        (P("a", None, "b"), None, r"spec must name at most 2 axes, .*; got P"),
        (P(None, "a"), mesh(7), r"7 devices along mesh axis 'a' cannot share 24 elements evenly"),
        (P(("a", "c")), mesh(4, 2), r"must name axes of the mesh \('a', 'b'\); got 'c' in P"),
        (P(P.UNCONSTRAINED), mesh(4, 2), r"mesh \('a', 'b'\); got UNCONSTRAINED in P"),
        ("ab", None, r"expects a QTensor and a jax\.P; got QTensor and str ab\."),
    ],
)
def test_specs_that_do_not_fit_are_errors(spec, on, text):
    with pytest.raises(ValueError, match=text):
        specs(quantize(X, ArrayConfig(), axis=0), spec, on)


def test_an_array_without_codes_is_an_error():
    with pytest.raises(ValueError, match=r"expects a QTensor and a jax\.P; got ndarray and"):
        specs(X, P("a"))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("spec", [P("a", None), P(None, "a"), P("a", "b")], ids=str)
def test_divided_arrays_dequantize_to_the_same_values(spec):
    q = quantize(X, ArrayConfig(format=INT4, group_size=32, symmetric=False), axis=0)
    q = q.reorder((-1, -2))
    on = mesh(4, 2)
    shardings = jax.tree.map(lambda s: jax.NamedSharding(on, s), specs(q, spec, on))
    placed = jax.device_put(q, shardings)
    np.testing.assert_array_equal(placed.dequantize(), q.dequantize())
