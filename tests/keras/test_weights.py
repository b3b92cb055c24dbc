"""Splitting a weight into groups, and the declaration of weights."""

import dataclasses
import math

import jax.numpy as jnp
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import FORMATS, INT4, INT8, ArrayConfig, quantize
from jaxquant.core import block_shape
from jaxquant.keras import QuantizableMixin, QuantizationConfig, QuantizedWeight, layers
from jaxquant.keras.layer.weights import fit_groups, quantize_padded

PRESCRIBED = [f for f in FORMATS.values() if f.group_size is not None]
shapes = st.lists(st.integers(1, 300), min_size=1, max_size=4).map(tuple)


@st.composite
def shapes_and_axes(draw):
    """A shape, and some of its axes in any order, counted from either end."""
    shape = draw(shapes)
    axes = draw(st.permutations(range(len(shape))))
    axes = axes[: draw(st.integers(1, len(shape)))]
    return shape, tuple(a - len(shape) * draw(st.booleans()) for a in axes)


def last_axis(shape, axes):
    return axes[-1] % len(shape)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(shapes_and_axes(), st.integers(1, 200))
def test_groups_fit_in_the_block_size_and_tile_the_padded_shape(case, block_size):
    (shape, axes), config = case, ArrayConfig(format=INT4, group_size=block_size)
    fitted, fitted_axis, padded = fit_groups(shape, axes, config)
    blocks = block_shape(padded, fitted, fitted_axis)  # Raises unless the groups tile the shape.

    assert math.prod(blocks) <= block_size
    last = last_axis(shape, axes)
    assert [n for i, n in enumerate(padded) if i != last] == [
        n for i, n in enumerate(shape) if i != last
    ]
    assert shape[last] <= padded[last] < shape[last] + blocks[last]
    assert padded[last] == shape[last] or blocks[last] == block_size
    # As large as possible, without splitting an axis before the last axis is whole.
    others = [a % len(shape) for a in axes[:-1]]
    assert blocks[last] == shape[last] or all(blocks[a] == 1 for a in others)


@settings(max_examples=50, deadline=None)
@given(shapes_and_axes(), st.sampled_from(PRESCRIBED))
def test_formats_keep_their_own_group_size(case, format):
    (shape, axes), config = case, ArrayConfig(format=format)
    fitted, fitted_axis, padded = fit_groups(shape, axes, config)
    blocks = block_shape(padded, fitted, fitted_axis)

    last = last_axis(shape, axes)
    assert blocks[last] == format.group_size
    assert math.prod(blocks) == format.group_size
    assert shape[last] <= padded[last] < shape[last] + format.group_size
    assert padded[:last] + padded[last + 1 :] == shape[:last] + shape[last + 1 :]


@settings(max_examples=50, deadline=None)
@given(shapes_and_axes())
def test_without_a_group_size_one_scale_spans_the_axes(case):
    shape, axes = case
    fitted, fitted_axis, padded = fit_groups(shape, axes, ArrayConfig(format=INT8))
    assert padded == shape
    spanned = {a % len(shape) for a in axes}
    assert block_shape(padded, fitted, fitted_axis) == tuple(
        n if i in spanned else 1 for i, n in enumerate(shape)
    )


def test_one_scale_per_tensor_needs_no_axes():
    config = ArrayConfig(per_tensor=True)
    assert fit_groups((3, 5), (0,), config) == (config, (0,), (3, 5))


# Padding of more and of less than half a group, no padding, and shorter than a group.
@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("length", "columns", "block_size", "axis"),
    [(37, 3, 8, 0), (9, 4, 5, 1), (12, 2, 4, 1), (7, 3, 50, 0), (5, 1, 1, 0)],
)
def test_padding_changes_no_value(length, columns, block_size, axis):
    x = np.random.default_rng(length).normal(size=(length, columns)).astype(np.float32)
    x = x if axis == 0 else x.T
    config = ArrayConfig(format=INT4, group_size=block_size)
    config, axes, padded = fit_groups(x.shape, (axis,), config)
    q, is_finite, noise = quantize_padded(jnp.asarray(x), config, axes, padded, None)
    found = np.asarray(q.dequantize())[: x.shape[0], : x.shape[1]]

    # Each group quantized separately.
    wanted, size = np.empty_like(x), block_shape(padded, config, axes)[axis]
    for start in range(0, length, size):
        part = np.s_[start : start + size] if axis == 0 else np.s_[:, start : start + size]
        whole = dataclasses.replace(config, group_size=None)
        wanted[part] = quantize(jnp.asarray(x[part]), whole, axis).dequantize()
    np.testing.assert_array_equal(found, wanted)
    assert is_finite
    relative = np.linalg.norm(found - x) / np.linalg.norm(x)
    np.testing.assert_allclose(noise, relative, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_noise_is_accurate_where_squares_overflow_or_underflow(size):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)) * size, jnp.float32)
    _, is_finite, noise = quantize_padded(x, ArrayConfig(format=INT4), 0, x.shape, None)
    assert is_finite
    assert 0.02 < noise < 0.2


def test_empty_and_zero_weights_have_no_noise():
    for x in (jnp.zeros((4, 3)), jnp.zeros((0, 3)), jnp.zeros((3, 0))):
        _, is_finite, noise = quantize_padded(x, ArrayConfig(format=INT4), 0, x.shape, None)
        assert is_finite
        assert noise == 0


def test_reading_a_weight_before_it_is_created_raises():
    layer = layers.Dense(3)
    with pytest.raises(AttributeError, match=r"Dense has no 'kernel' yet; got .*built=False"):
        _ = layer.kernel
    assert isinstance(layers.Dense.kernel, QuantizedWeight)
    with pytest.raises(ValueError, match=r"has no quantized weight 'kernel'; got \[\]"):
        layer.quantized_weight("kernel")


def test_a_weight_must_be_created_under_its_declared_name():
    class Misnamed(QuantizableMixin, keras.layers.Layer):
        kernel = QuantizedWeight(axis=0)

        def build(self, input_shape):
            self.kernel = self.add_weight(name="weight", shape=(input_shape[-1],))

    with pytest.raises(ValueError, match=r"Misnamed.kernel is declared .*; got 'weight'\. Create"):
        Misnamed().build((None, 4))


def test_codes_of_every_layout_dequantize_to_the_weight_and_are_not_trainable():
    layer: keras.layers.Layer = layers.Dense(5)
    layer.build((None, 40))
    kernel = np.asarray(layer.kernel)
    layer.quantize(
        config=QuantizationConfig(ArrayConfig(format=INT4, group_size=32, symmetric=False))
    )
    assert layer.trainable_weights == [layer.bias]
    q = layer.quantized_weight("kernel")
    assert (q.codes.dtype, q.shape, q.reorder(None).scale.shape) == ("int4", (64, 5), (2, 5))
    assert [v.name for v in layer.non_trainable_weights] == [
        "kernel",
        "kernel_scale",
        "kernel_zero",
    ]
    np.testing.assert_array_equal(layer.kernel, q.dequantize()[:40])
    assert np.abs(np.asarray(layer.kernel) - kernel).max() <= 0.51 * np.asarray(q.scale).max()
