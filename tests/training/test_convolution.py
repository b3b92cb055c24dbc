"""Convolutions and ragged products that are quantized forward and in both gradients."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant import training
from jaxquant.training import FP8_TRAINING, INT8_TRAINING, DelayedScaling, ProductConfig

from . import products

NEAREST = dataclasses.replace(INT8_TRAINING, rounds_stochastically=False)
FOUR = jq.ArrayConfig(group_size=4)
GROUPED = ProductConfig(lhs=FOUR, rhs=FOUR, gradient=FOUR)
BLOCKS = ProductConfig(lhs=jq.ArrayConfig(group_size=(2, 3)), rhs=jq.ArrayConfig(group_size=(2, 3)))
LAYOUT = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0, dtype="float32"):
    x = np.random.default_rng(seed).normal(size=shape)
    x *= np.linspace(0.3, 3, shape[-1]) if shape else 1
    return np.asarray(x, jnp.dtype(dtype))


# Images, kernel, strides, padding, dilation and groups. Lengths that no two axes have in common.
CONVOLUTIONS = {
    "plain": ((2, 5, 4, 6), (3, 2, 6, 7), (1, 1), ((1, 1), (0, 1)), (1, 1), 1),
    "strided": ((3, 7, 6, 5), (3, 2, 5, 4), (2, 1), ((1, 0), (1, 1)), (1, 2), 1),
    "depthwise": ((2, 5, 4, 3), (2, 3, 1, 6), (1, 2), ((0, 0), (1, 1)), (1, 1), 3),
}


def pulled(product, x, w, gradient):
    @jax.jit
    def run(x, w, gradient):
        out, pull = jax.vjp(product, x, w)
        return out, *pull(gradient)

    return run(x, w, gradient)


def expected_convolutions(quantized, case, x, w, gradient):
    """By the definition; `quantized` is (array, axes that are summed over) -> values."""
    _, _, *how = case
    oracle = products.Convolution(*how)
    return (
        oracle.out(quantized(x, (1, 2, 3)), quantized(w, (0, 1, 2)), gradient.shape),
        oracle.of_images(quantized(gradient, (1, 2, 3)), quantized(w, (0, 1, 3)), x.shape),
        oracle.of_kernel(quantized(gradient, (0, 1, 2)), quantized(x, (0, 1, 2)), w.shape),
    )


def convolution(case, config, **options):
    _, _, strides, padding, dilation, groups = case
    return lambda x, w: training.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=LAYOUT,
        feature_group_count=groups,
        config=config,
        **options,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_each_convolution_quantizes_its_own_operands(name, dtype):
    case = CONVOLUTIONS[name]
    x, w = normal(*case[0], dtype=dtype), normal(*case[1], seed=1, dtype=dtype)
    run = convolution(case, NEAREST)
    gradient = normal(*jax.eval_shape(run, x, w).shape, seed=2, dtype=dtype)

    def quantized(x, axes):
        x = np.asarray(x, np.float64)
        return products.int8(x, products.shared_along(x.ndim, axes))

    found = pulled(run, x, w, gradient)
    tolerance = 3e-5 if dtype == "float32" else 3e-2
    for a, b in zip(found, expected_convolutions(quantized, case, x, w, gradient), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(np.float32), b, tolerance, tolerance * np.abs(b).max())


def test_groups_of_a_convolution_run_along_channels():
    """6 and 7 channels in groups of 4, of which the last is shorter; images for the kernel."""
    case = CONVOLUTIONS["plain"]
    x, w = normal(5, *case[0][1:]), normal(*case[1], seed=1)
    run = convolution(case, GROUPED)
    gradient = normal(*jax.eval_shape(run, x, w).shape, seed=2)
    along = {(1, 2, 3): 3, (0, 1, 2): 2, (0, 1, 3): 3}

    def quantized(x, axes):
        # Kernels (0, 1, 2) have their input channels there, images and gradients their images.
        axis = 0 if axes == (0, 1, 2) and x.shape[0] == 5 else along[axes]
        return products.int8(x, products.shared_along(x.ndim, axes, 4, axis))

    found = pulled(run, x, w, gradient)
    for a, b in zip(found, expected_convolutions(quantized, case, x, w, gradient), strict=True):
        np.testing.assert_allclose(a, b, 3e-5, 3e-5 * np.abs(b).max())


def test_blocks_of_a_convolution():
    """2 input channels by 3 images or output channels, in all three convolutions."""
    case = CONVOLUTIONS["plain"]
    x, w = normal(5, *case[0][1:]), normal(*case[1], seed=1)
    run = convolution(case, BLOCKS)
    gradient = normal(*jax.eval_shape(run, x, w).shape, seed=2)
    blocks = {x.shape: {0: 3, 1: 1, 2: 1, 3: 2}, w.shape: {0: 1, 1: 1, 2: 2, 3: 3}}

    def quantized(a, axes):
        return products.int8(a, blocks[a.shape]) if a.shape in blocks else a

    found = pulled(run, x, w, gradient)
    for a, b in zip(found, expected_convolutions(quantized, case, x, w, gradient), strict=True):
        np.testing.assert_allclose(a, b, 3e-5, 3e-5 * np.abs(b).max())


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_without_a_config_are_those_of_lax(name):
    case = CONVOLUTIONS[name]
    x, w = normal(*case[0]), normal(*case[1], seed=1)
    run = convolution(case, ProductConfig())
    gradient = normal(*jax.eval_shape(run, x, w).shape, seed=2)

    def plain(x, w):
        return lax.conv_general_dilated(
            x, w, *case[2:4], None, case[4], LAYOUT, feature_group_count=case[5]
        )

    for a, b in zip(pulled(run, x, w, gradient), pulled(plain, x, w, gradient), strict=True):
        np.testing.assert_array_equal(a, b)


def test_strides_and_padding_may_be_arrays():
    x, w = jnp.asarray(normal(2, 3, 5, 4)), jnp.asarray(normal(6, 3, 2, 3, seed=1))
    run: Any = partial(training.conv_general_dilated, x, w, config=NEAREST)
    found = run(np.array([2, 1]), np.array([[1, 0], [0, 2]]), rhs_dilation=np.array([1, 2]))
    expected = run((2, 1), ((1, 0), (0, 2)), rhs_dilation=(1, 2))
    np.testing.assert_array_equal(found, expected)


def test_codes_of_convolutions_are_multiplied_as_integers():
    case = CONVOLUTIONS["plain"]
    x, w = jnp.asarray(normal(*case[0])), jnp.asarray(normal(*case[1], seed=1))

    def gradients(x, w):
        return jax.grad(lambda x, w: convolution(case, NEAREST)(x, w).sum(), (0, 1))(x, w)

    rows = jq.explain(gradients, x, w).rows
    assert [(row.operation, row.is_integer) for row in rows] == [("conv_general_dilated", True)] * 3


def test_a_rotation_along_images_keeps_the_gradient():
    case = CONVOLUTIONS["plain"]
    x, w = normal(5, *case[0][1:]), normal(*case[1], seed=1)
    runs = [convolution(case, ProductConfig(rhs_gradient_rotation=n)) for n in (None, 4)]
    gradient = normal(*jax.eval_shape(runs[0], x, w).shape, seed=2)
    plain, turned = (pulled(run, x, w, gradient) for run in runs)
    np.testing.assert_allclose(plain[2], turned[2], 1e-4, 1e-4)
    assert not np.array_equal(plain[2], turned[2])
    for a, b in zip(plain[:2], turned[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    # Groups of channels would mix, and are not rotated.
    config = ProductConfig(rhs_gradient_rotation=4)
    case = CONVOLUTIONS["depthwise"]
    x, w = normal(*case[0]), normal(*case[1], seed=1)
    gradient = normal(*jax.eval_shape(convolution(case, config), x, w).shape, seed=2)
    pairs = [pulled(convolution(case, c), x, w, gradient) for c in (config, ProductConfig())]
    jax.tree.map(np.testing.assert_array_equal, *pairs)


def test_vmap_and_eager_calls_of_convolutions_agree():
    case = CONVOLUTIONS["strided"]
    x, w = normal(2, *case[0]), normal(*case[1], seed=1)
    run = convolution(case, NEAREST)
    gradient = normal(2, *jax.eval_shape(run, x[0], w).shape, seed=2)
    found = jax.jit(jax.vmap(partial(pulled, run), (0, None, 0)))(x, w, gradient)
    for i in range(2):
        one = jax.vjp(run, x[i], w)
        expected = one[0], *one[1](gradient[i])
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a[i], b, 1e-5, 1e-5)


def test_delayed_scaling_of_a_convolution():
    case = CONVOLUTIONS["plain"]
    x, w = normal(*case[0]), normal(*case[1], seed=1)
    states = DelayedScaling.init(3)

    def loss(w, states):
        return jnp.sum(convolution(case, FP8_TRAINING, scaling=states)(x, w))

    _, observed = jax.jit(jax.grad(loss, (0, 1)))(w, states)
    assert observed.lhs[0] == np.abs(x).max()
    assert observed.rhs[0] == np.abs(w).max()
    assert observed.gradient[0] == 1


@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (2, 5, 4, 0)], ids=["images", "channels"])
def test_empty_convolutions(shape):
    case = CONVOLUTIONS["plain"]
    x, w = np.ones(shape, np.float32), np.ones((3, 2, shape[-1], 7), np.float32)
    run = convolution(case, NEAREST)
    gradient = np.ones(jax.eval_shape(run, x, w).shape, np.float32)
    out, of_x, of_w = pulled(run, x, w, gradient)
    assert not np.any(out)
    assert (of_x.shape, of_w.shape) == (x.shape, w.shape)
    assert not np.any(of_w)


SIZES = np.array([4, 0, 5, 1])


def ragged(config, **options):
    return lambda x, w: training.ragged_dot(x, w, SIZES, config=config, **options)


def slow_ragged(quantized, x, w, gradient):
    """By the definition, one row at a time. Rows beyond the last group are zeros."""
    groups = np.repeat(np.arange(len(SIZES)), SIZES)
    qx, qw = quantized(x, (1,)), quantized(w, (1,))
    out = np.zeros(gradient.shape)
    of_x, of_w = np.zeros(x.shape), np.zeros(w.shape)
    g, other = quantized(gradient, (1,)), quantized(w, (2,))
    g_rows, x_rows = quantized(gradient, (0,)), quantized(x, (0,))
    for row, group in enumerate(groups):
        out[row] = qx[row] @ qw[group]
        of_x[row] = g[row] @ other[group].T
        of_w[group] += np.outer(x_rows[row], g_rows[row])
    return out, of_x, of_w


@pytest.mark.parametrize("size", [None, 4], ids=["whole", "groups"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_products_quantize_their_own_operands(dtype, size):
    x, w = normal(12, 7, dtype=dtype), normal(4, 7, 6, seed=1, dtype=dtype)
    gradient = normal(12, 6, seed=2, dtype=dtype)

    def quantized(x, axes):
        x = np.asarray(x, np.float64)
        return products.int8(x, products.shared_along(x.ndim, axes, size))

    found = pulled(ragged(NEAREST if size is None else GROUPED), x, w, gradient)
    tolerance = 3e-5 if dtype == "float32" else 3e-2
    for a, b in zip(found, slow_ragged(quantized, x, w, gradient), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(np.float32), b, tolerance, tolerance * np.abs(b).max())


def test_blocks_of_ragged_products():
    """2 along K by 3 rows or columns, in all three products."""
    x, w, gradient = normal(12, 7), normal(4, 7, 6, seed=1), normal(12, 6, seed=2)
    blocks = {x.shape: {0: 3, 1: 2}, w.shape: {0: 1, 1: 2, 2: 3}}

    def quantized(a, axes):
        return products.int8(a, blocks[a.shape]) if a.shape in blocks else a

    found = pulled(ragged(BLOCKS), x, w, gradient)
    for a, b in zip(found, slow_ragged(quantized, x, w, gradient), strict=True):
        np.testing.assert_allclose(a, b, 3e-5, 3e-5 * np.abs(b).max())


def test_ragged_products_without_a_config_are_those_of_lax():
    x, w, gradient = normal(12, 7), normal(4, 7, 6, seed=1), normal(12, 6, seed=2)
    plain = pulled(lambda x, w: lax.ragged_dot(x, w, jnp.asarray(SIZES)), x, w, gradient)
    for a, b in zip(pulled(ragged(ProductConfig()), x, w, gradient), plain, strict=True):
        np.testing.assert_array_equal(a, b)


def test_stochastic_gradients_of_ragged_products_are_unbiased():
    coarse = jq.ArrayConfig(value_range=(-7, 7))
    config: Any = ProductConfig(gradient=coarse, rounds_stochastically=True)
    x, w, gradient = normal(12, 7), normal(4, 7, 6, seed=1), normal(12, 6, seed=2)

    def gradients(key):
        _, pull = jax.vjp(ragged(config, key=key), x, w)
        return pull(gradient)

    keys = jax.random.split(jax.random.key(0), 500)
    samples = jax.jit(partial(lax.map, gradients))(keys)
    exact = pulled(ragged(ProductConfig()), x, w, gradient)[1:]
    for found, wanted in zip(samples, exact, strict=True):
        noise = np.std(found, 0) / 500**0.5
        assert np.any(noise > 0)
        # A step is up to 5; one that is taken once in 500 samples, or never, shows little noise.
        assert np.all(np.abs(np.mean(found, 0) - wanted) <= 5 * noise + 0.03)
