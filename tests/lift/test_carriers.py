"""Rearranged QTensors against rearranged arrays: equal, or unsupported. No product in between."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant.core import scale_values
from jaxquant.jaxprs import walk
from jaxquant.lift import carriers
from jaxquant.lift.parameter import Unsupported

from . import cases

LENGTHS = st.sampled_from([1, 4, 6, 16])
SETTINGS = hypothesis.settings(max_examples=10, deadline=None, derandomize=True)


def equal_or_unsupported(found, expected):
    """Checks that found() dequantizes to the array, unless it raises Unsupported."""
    try:
        q = found()
    except Unsupported:
        return False
    assert q.shape == expected.shape
    np.testing.assert_array_equal(q.dequantize(), expected)
    return True


@functools.cache
def quantized(shape, group_size, symmetric, axis, order):
    x = np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)
    config = jq.ArrayConfig(format=jq.INT4, group_size=group_size, symmetric=symmetric)
    q = jq.quantize(x, config, axis)
    # Those with an odd number of axes have an offset, too.
    offset = -scale_values(q.scale) / 3 if len(shape) % 2 else None
    return dataclasses.replace(q, offset=offset).reorder(order)


@st.composite
def quantized_arrays(draw):
    shape = tuple(draw(st.lists(LENGTHS, min_size=1, max_size=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    sizes = [None, *(d for d in (1, 2, 4, 8) if shape[axis] % d == 0)]
    order = draw(st.sampled_from([None, *([(-1, -2)] if len(shape) > 1 else [])]))
    return quantized(shape, draw(st.sampled_from(sizes)), draw(st.booleans()), axis, order)


@pytest.mark.slow
@SETTINGS
@hypothesis.given(q=quantized_arrays(), data=st.data())
def test_reshaped_arrays_are_equal_or_unsupported(q, data):
    splits = [
        data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0])) for n in q.shape
    ]
    split = [m for n, d in zip(q.shape, splits, strict=True) for m in (d, n // d)]
    start = data.draw(st.integers(0, len(split) - 1))
    stop = data.draw(st.integers(start + 1, len(split)))
    shape = [*split[:start], int(np.prod(split[start:stop])), *split[stop:]]
    equal_or_unsupported(lambda: carriers.reshape(q, shape), q.dequantize().reshape(shape))


@pytest.mark.slow
@SETTINGS
@hypothesis.given(q=quantized_arrays(), data=st.data())
def test_sliced_arrays_are_equal_or_unsupported(q, data):
    starts = [data.draw(st.integers(0, n - 1)) for n in q.shape]
    limits = [data.draw(st.integers(s + 1, n)) for s, n in zip(starts, q.shape, strict=True)]
    strides = [data.draw(st.integers(1, 3)) for _ in q.shape]
    expected = lax.slice(q.dequantize(), starts, limits, strides)
    equal_or_unsupported(lambda: carriers.slice(q, starts, limits, strides), expected)


@pytest.mark.slow
@SETTINGS
@hypothesis.given(q=quantized_arrays(), data=st.data())
def test_transposed_arrays_are_equal(q, data):
    permutation = data.draw(st.permutations(range(q.ndim)))
    expected = q.dequantize().transpose(permutation)
    assert equal_or_unsupported(lambda: carriers.transpose(q, permutation), expected)
    assert carriers.transpose(q, permutation).codes is q.codes


def test_a_slice_divides_groups_into_no_fewer_than_8_elements():
    q = cases.parameter("int4 g32")
    expected = q.dequantize()[16:40]
    assert equal_or_unsupported(lambda: carriers.slice(q, (16, 0), (40, 96), None), expected)
    with pytest.raises(Unsupported, match="3:40:1 does not keep the blocks of 32 whole"):
        carriers.slice(q, (3, 0), (40, 96), None)
    # Within one group nothing has to be divided.
    expected = q.dequantize()[3:30]
    assert equal_or_unsupported(lambda: carriers.slice(q, (3, 0), (30, 96), None), expected)


def test_a_dynamic_slice_moves_scales_along_or_keeps_one_for_all():
    for name in ("int8", "int8 per tensor", "int4 g32"):
        q = cases.parameter(name)
        expected = lax.dynamic_slice(q.dequantize(), (0, 5), (64, 7))
        found = carriers.dynamic_slice(q, (jnp.int32(0), jnp.int32(5)), (64, 7))
        np.testing.assert_array_equal(found.dequantize(), expected)
    with pytest.raises(Unsupported, match="it starts anywhere in blocks of 32"):
        carriers.dynamic_slice(q, (jnp.int32(0), jnp.int32(5)), (32, 96))


def test_arrays_in_different_orders_can_be_joined():
    q = cases.parameter("int4 g32")
    swapped = q.reorder((-1, -2))
    for axis in (0, 1):
        found = carriers.concatenate([q, swapped], axis)
        expected = jnp.concatenate([q.dequantize()] * 2, axis)
        np.testing.assert_array_equal(found.dequantize(), expected)


def test_many_arrays_of_2_bits_are_joined():
    """Their codes in 8 bits: XLA for CPUs ends the process when it joins many of 2 bits."""
    config = jq.ArrayConfig(format=jq.INT2, symmetric=False)
    q = jq.quantize(jnp.asarray(np.eye(8), jnp.float32), config, axis=0)
    found = carriers.concatenate([q] * 9, 1)
    np.testing.assert_array_equal(found.dequantize(), np.tile(q.dequantize(), 9))


@pytest.mark.parametrize("other", ["int8", "int4 g16 asymmetric"])
def test_arrays_that_are_quantized_differently_are_not_joined(other):
    text = rf"its operands are not quantized alike: QTensor\(int4 .* and QTensor\({other[:4]} "
    with pytest.raises(Unsupported, match=text):
        carriers.concatenate([cases.parameter("int4 g32"), cases.parameter(other)], 0)


def test_a_factor_per_element_of_a_group_is_unsupported():
    q = cases.parameter("int4 g32")
    with pytest.raises(Unsupported, match=r"a factor of shape \(64, 1\) differs within blocks"):
        carriers.multiply(q, jnp.ones((64, 1)), lax.mul)


@pytest.mark.slow
def test_values_in_training_are_carried_along():
    prepared = jq.training.prepare({"w": jnp.ones((64, 96)) / 3}, jq.W8A16)["w"]

    def loss(w):
        q = carriers.multiply(w.quantize(), jnp.float32(0.5), lax.mul)
        q = carriers.slice(carriers.transpose(q, (1, 0)), (8, 0), (24, 64), None)
        return jnp.sum(carriers.reshape(q, (4, 4, 64)).dequantize())

    gradient = jax.grad(loss)(prepared).weight
    expected = np.zeros((64, 96), np.float32)
    expected[:, 8:24] = 0.5
    np.testing.assert_allclose(gradient, expected)


def test_only_index_0_is_in_bounds_along_an_axis_that_is_gathered_whole():
    q = cases.parameter("int8")
    starts = jnp.array([[3, 0], [3, 1], [-1, 0], [64, 0]])
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
    )

    def gather(w):
        return lax.gather(w, starts, numbers, (1, 96), mode="fill")

    found = jax.jit(jq.lift(gather, strict=True))(q)
    np.testing.assert_array_equal(found, gather(q.dequantize()))
    assert np.isnan(found).any(axis=1).tolist() == [False, True, True, True]


@pytest.mark.slow
def test_layers_that_share_a_scale_can_be_scanned():
    x = np.random.default_rng(0).normal(size=(4, 8, 16)).astype(np.float32)
    rows = cases.rows(8)

    def apply(w):
        return lax.scan(lambda c, layer: (c + rows @ layer, None), jnp.zeros((3, 16)), w)[0]

    for config in (jq.ArrayConfig(per_tensor=True), jq.ArrayConfig(symmetric=False)):
        for axis, order in ((0, None), ((0, 1), None), (0, (-1, -3, -2)), (1, (-2, -1, -3))):
            q = jq.quantize(x, config, axis).reorder(order)
            found = jax.jit(jq.lift(apply, strict=True))(q)
            np.testing.assert_allclose(found, apply(q.dequantize()), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_keeps_its_policy_and_a_switch_its_branches():
    policy = jax.checkpoint_policies.dots_saveable

    @functools.partial(jax.checkpoint, policy=policy)
    def apply(w):
        return lax.platform_dependent(
            w, cpu=lambda w: cases.rows() @ w, tpu=lambda w: -cases.rows() @ w,
            default=lambda w: 2 * (cases.rows() @ w),
        )  # fmt: skip

    program = jax.make_jaxpr(jq.lift(apply))(cases.parameter("int8"))
    params = [site.eqn.params for site in walk(program)]
    assert [p["policy"] for p in params if "policy" in p] == [policy]
    platforms = [p["branches_platforms"] for p in params if p.get("branches_platforms")]
    assert (("cpu",), ("tpu",), None) in platforms


def test_axes_that_are_stored_swapped_are_joined_in_their_logical_order():
    q = cases.parameter("int8 per tensor", is_swapped=True)
    expected = q.dequantize().reshape(-1)
    assert equal_or_unsupported(lambda: carriers.reshape(q, (expected.size,)), expected)


@pytest.mark.slow
def test_axes_in_their_order_are_not_stored_in_another():
    q = cases.parameter("int8")
    assert carriers.transpose(q, (0, 1)).order is None
    assert carriers.transpose(carriers.transpose(q, (1, 0)), (1, 0)).order is None
