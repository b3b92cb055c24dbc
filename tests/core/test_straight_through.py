"""Gradients through quantized values, against the equations of LSQ and LSQ+."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import INT4, ArrayConfig, quantize, quantize_with_scale
from jaxquant.core import FORMATS, affine, straight_through

from .. import checks, oracles

SHAPE, COUNTS = (6, 32), (6, 4)
SYMMETRIC = ArrayConfig(format=INT4, group_size=8)
ASYMMETRIC = ArrayConfig(format=INT4, group_size=8, symmetric=False)


def operands():
    """x with values inside, up to half a step beyond the codes, and far beyond; scales; zeros."""
    random = np.random.default_rng(0)
    scale = np.exp2(random.uniform(-3, 2, COUNTS)).astype(np.float32)
    codes = random.uniform(-12, 12, SHAPE)
    codes[:, 0], codes[:, 1], codes[:, 2] = 7.3, -8.4, 0
    zero = random.integers(-6, 5, COUNTS).astype(np.float32)
    x = (codes * oracles.repeat_groups(scale, SHAPE)).astype(np.float32)
    return x, scale, zero, random.normal(size=SHAPE).astype(np.float32)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("config", [SYMMETRIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_are_those_of_the_equations(config, dtype):
    x, scale, zero, cotangent = operands()
    x, cotangent = jnp.asarray(x, dtype), jnp.asarray(cotangent, dtype)
    zero = zero if not config.symmetric else np.zeros(COUNTS, np.float32)

    @jax.jit
    def derivatives(x, scale, zero):
        q = quantize_with_scale(x, scale, None if config.symmetric else zero, config)
        values, pullback = jax.vjp(
            lambda x, s, z: straight_through(x, q, config, s, z, margin=False),
            x,
            scale,
            zero,
        )
        return values, q.dequantize(), pullback(cotangent)

    values, wanted, got = derivatives(x, scale, zero)

    np.testing.assert_array_equal(values, wanted)
    assert values.dtype == got[0].dtype == dtype
    wide = [np.asarray(a).astype(np.float64) for a in (x, cotangent)]
    repeated = [oracles.repeat_groups(a.astype(np.float64), SHAPE) for a in (scale, zero)]
    value, of_x, of_scale, of_zero = oracles.straight_through(
        wide[0], repeated[0], repeated[1], config
    )
    assert 0 < of_x.sum() < of_x.size
    tolerance = 1e-5 if dtype == "float32" else 2.0**-8
    np.testing.assert_allclose(np.asarray(values).astype(np.float64), value, rtol=tolerance)
    np.testing.assert_array_equal(np.asarray(got[0]).astype(np.float64), wide[1] * of_x)
    for gradient, slope in zip(got[1:], (of_scale, of_zero), strict=True):
        want = oracles.sum_blocks(wide[1] * slope, COUNTS)
        np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-4)


def test_values_that_only_rounding_moves_past_the_ends_keep_their_gradient():
    x, scale, _, _ = operands()
    q = quantize_with_scale(x, scale, None, SYMMETRIC)
    for margin, edges in [(True, (-8.5, 7.5)), (False, (-8, 7))]:
        gradient = jax.grad(lambda x, m=margin: straight_through(x, q, SYMMETRIC, margin=m).sum())
        got = jax.jit(gradient)(x)
        codes = x / oracles.repeat_groups(scale, SHAPE)
        np.testing.assert_array_equal(got, (codes >= edges[0]) & (codes <= edges[1]))


def test_scalar_parameters_get_the_sum_of_all_groups():
    x, scale, _, cotangent = operands()
    q = quantize_with_scale(x, scale, None, SYMMETRIC)

    def loss(step):
        return jnp.vdot(
            straight_through(jnp.asarray(x), q, SYMMETRIC, step, margin=False), cotangent
        )

    _, _, of_scale, _ = oracles.straight_through(
        x, oracles.repeat_groups(scale, SHAPE), np.zeros(SHAPE), SYMMETRIC
    )
    got = jax.jit(jax.grad(loss))(np.float32(1))
    np.testing.assert_allclose(got, np.sum(of_scale * cotangent), rtol=1e-4)


def test_derivatives_are_the_same_in_every_transformation():
    config = ArrayConfig(format=INT4)
    rows = jnp.asarray(operands()[0])
    cotangent = jnp.asarray(operands()[3])

    def values(row):
        q = quantize_with_scale(row, jnp.float32(0.3), None, config)
        return straight_through(row, q, config)

    def gradient(row, cotangent, values=values):
        return jax.vjp(values, row)[1](cotangent)[0]

    want = np.where((rows >= -8.5 * 0.3) & (rows <= 7.5 * 0.3), cotangent, 0)
    assert 0 < (want == 0).sum() < want.size

    @jax.jit
    def transformed(rows, cotangent):
        return {
            "vmap": jax.vmap(gradient)(rows, cotangent),
            "scan": jax.lax.scan(lambda c, pair: (c, gradient(*pair)), 0, (rows, cotangent))[1],
            "remat": jax.vmap(partial(gradient, values=jax.checkpoint(values)))(rows, cotangent),
            "forward mode": jax.jvp(jax.vmap(values), (rows,), (cotangent,))[1],
        }

    for name, got in transformed(rows, cotangent).items():
        np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_the_edges_lie_half_a_step_beyond_the_outermost_codes(format):
    config = ArrayConfig(format=format)
    points = checks.points_of(config)
    low, high = affine.clip_edges(config)
    np.testing.assert_allclose(low, points[0] - (points[1] - points[0]) / 2)
    np.testing.assert_allclose(high, points[-1] + (points[-1] - points[-2]) / 2)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_arrays_without_elements(shape):
    config = ArrayConfig()
    x = jnp.zeros(shape)

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.sum(straight_through(x, quantize(x, config, axis=1), config))

    got = gradient(x)
    assert got.shape == shape


def test_a_group_with_nan_has_zero_gradients_and_a_nan_step_gradient():
    x, scale, _, _ = operands()
    x[2, 3] = np.nan

    def total(x, scale):
        q = quantize_with_scale(x, jax.lax.stop_gradient(scale), None, SYMMETRIC)
        return jnp.sum(straight_through(x, q, SYMMETRIC, scale, margin=False))

    of_x, of_scale = jax.jit(jax.grad(total, (0, 1)))(x, scale)
    is_spoiled = np.zeros(COUNTS, bool)
    is_spoiled[2, 0] = True
    np.testing.assert_array_equal(np.isnan(of_scale), is_spoiled)
    np.testing.assert_array_equal(np.asarray(of_x)[2, :8], 0)
