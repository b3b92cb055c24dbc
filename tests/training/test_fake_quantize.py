"""`fake_quantize`: values of `quantize`, and gradients against the equations."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import FP8_E4M3, INT4, INT8, NF4, ArrayConfig, Percentile, quantize
from jaxquant.training import LearnedRange, LearnedStep, fake_quantize

from .. import cases, checks, oracles

# test_prepare.py tests, for all schemes, that values are equal under all optimizations.

SHAPE = (6, 32)
GROUPED = cases.along(1, format=INT4, group_size=8)
STEPS = {
    "int4 grouped": GROUPED,
    "int8 per row": cases.along(1, format=INT8),
    "int4 per tensor": cases.along(0, format=INT4, per_tensor=True),
    "int4 in blocks": cases.along((0, 1), format=INT4, group_size=(3, 16)),
}
RANGES = {
    "int4 grouped": cases.along(1, format=INT4, group_size=8, symmetric=False),
    "int8 per tensor": cases.along(0, per_tensor=True, symmetric=False),
    "in a narrower range": cases.along(1, symmetric=False, value_range=(3, 40)),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, COTANGENT = normal(*SHAPE) + np.float32(0.2), normal(*SHAPE, seed=1)


def counts_of(case):
    return tuple(oracles.blocks(SHAPE, *case)[0])


def gradients(x, case, learned, cotangent, key=None):
    """Values, and the gradients of x and of the learned parameters."""
    config, axis = case
    values, pullback = jax.vjp(lambda x, p: fake_quantize(x, config, axis, p, key), x, learned)
    return values, *pullback(cotangent)


IN_BFLOAT16 = ("int8-row", "int4-asym_min_mse", "mxfp4-row")


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16" if name in IN_BFLOAT16 else "float32") for name in cases.FEW],
)
def test_values_equal_quantize_and_the_gradient_is_one_up_to_half_a_step_beyond_the_range(
    name, dtype
):
    case, x = cases.FEW[name], jnp.asarray(cases.gaussian(), dtype)
    cotangent = jnp.asarray(normal(*x.shape, seed=2), dtype)

    values, of_x, _ = jax.jit(gradients, static_argnums=(1, 2))(x, case, None, cotangent)

    q = quantize(x, *case)
    assert values.dtype == of_x.dtype == dtype
    np.testing.assert_array_equal(values, q.dequantize())
    points = checks.points_of(case.config)
    low, high = points[0] - (points[1] - points[0]) / 2, points[-1] + (points[-1] - points[-2]) / 2
    step, zero = (
        oracles.repeat_groups(f(q), x.shape) for f in (checks.scale_of, checks.zero_point_of)
    )
    placed = np.asarray(x).astype(np.float64) / step + zero
    is_clear = np.minimum(np.abs(placed - low), np.abs(placed - high)) > 1e-3
    is_inside = (placed > low) & (placed < high)
    assert is_inside.mean() > 0.9
    assert not (name in ("int4-percentile", "mxfp4-row") and is_inside.all())
    want = np.where(is_inside, np.asarray(cotangent), 0)
    np.testing.assert_array_equal(np.asarray(of_x)[is_clear], want[is_clear])


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", STEPS)
def test_a_learned_step_follows_lsq_and_clips_gradients_at_the_outermost_codes(name, sign):
    case = STEPS[name]
    config = case.config
    counts, (qmin, qmax) = counts_of(case), oracles.bounds(config)
    # A sixth of the values are clipped, and some lie within half a step beyond the ends.
    step = np.abs(normal(*counts, seed=3)) / 4 + np.float32(1 / qmax)
    steps = oracles.repeat_groups(step, SHAPE)
    x = X.copy()
    x[0, :4] = [(qmax + 0.3), (qmin - 0.4), (qmax + 0.6), (qmin - 5)] * steps[0, :4]

    learned = LearnedStep(jnp.asarray(sign * step))
    values, of_x, of_step = gradients(x, case, learned, COTANGENT)

    value, mask, of_scale, _ = oracles.straight_through(x, steps, np.zeros(SHAPE), config)
    assert 0 < mask.sum() < mask.size
    np.testing.assert_allclose(values, value, rtol=1e-6)
    np.testing.assert_array_equal(of_x, COTANGENT * mask)
    # LSQ, section 2.2: g = 1 / sqrt(N qmax), with N elements per step.
    g = 1 / np.sqrt(X.size / np.prod(counts) * qmax)
    want = sign * g * oracles.sum_blocks(COTANGENT * of_scale, counts)
    np.testing.assert_allclose(of_step.scale, want, rtol=2e-3, atol=2e-5)


def surrogate(x, ends, config, moved):
    """`fake_quantize` with rounding frozen: its offsets of codes and zero points are constants."""
    low, high = ends
    qmin, qmax = oracles.bounds(config)
    step = (high - low) / (qmax - qmin)
    zero = qmin - low / step + moved[1]
    codes = x / step + zero
    is_inside = (codes >= qmin) & (codes <= qmax)
    codes = np.where(is_inside, codes + moved[0], np.clip(codes, qmin, qmax))
    return (codes - zero) * step


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", RANGES)
def test_a_learned_range_matches_finite_differences_of_a_float_surrogate(name):
    case = RANGES[name]
    config = case.config
    counts, (qmin, qmax) = counts_of(case), oracles.bounds(config)
    low, high = (sign * (0.4 + np.abs(normal(*counts, seed=i))) for i, sign in ((4, -1), (5, 1)))
    ends = [oracles.repeat_groups(np.asarray(e, np.float64), SHAPE) for e in (low, high)]
    step = (ends[1] - ends[0]) / (qmax - qmin)
    zero = np.round(qmin - ends[0] / step)

    learned = LearnedRange(jnp.asarray(low), jnp.asarray(high))
    values, of_x, got = gradients(X, case, learned, COTANGENT)

    value, mask, *_ = oracles.straight_through(X, step, zero, config)
    np.testing.assert_allclose(values, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(of_x, COTANGENT * mask)
    assert 0.1 < mask.mean() < 0.98
    codes = X / step + zero
    moved = np.round(codes) - codes, zero - (qmin - ends[0] / step)
    g = 1 / np.sqrt(X.size / np.prod(counts) * (qmax - qmin))
    for i, gradient in enumerate((got.low, got.high)):
        up, down = ([e + s * 1e-7 * (i == j) for j, e in enumerate(ends)] for s in (1, -1))
        change = surrogate(X, up, config, moved) - surrogate(X, down, config, moved)
        want = g * oracles.sum_blocks(COTANGENT * change / 2e-7, counts)
        np.testing.assert_allclose(gradient, want, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_a_range_end_on_the_wrong_side_of_zero_counts_as_zero():
    case = cases.along(0, format=INT4, per_tensor=True, symmetric=False)
    for low, high, wanted in [(0.5, 3.0, (0.0, 3.0)), (-3.0, -1.0, (-3.0, 0.0))]:
        learned = LearnedRange(jnp.float32(low), jnp.float32(high))
        values, _, of_range = gradients(X, case, learned, COTANGENT)
        want = fake_quantize(X, *case, LearnedRange(*map(jnp.float32, wanted)))
        np.testing.assert_array_equal(values, want)
        assert (of_range.low == 0) == (low > 0)
        assert (of_range.high == 0) == (high < 0)
    empty = LearnedRange(jnp.float32(1), jnp.float32(-1))
    values, _, of_range = gradients(X, case, empty, COTANGENT)
    assert np.isfinite([of_range.low, of_range.high]).all()
    np.testing.assert_array_equal(values, np.clip(np.round(X), 0, 15))


@pytest.mark.slow
@pytest.mark.parametrize("format", [FP8_E4M3, NF4], ids=str)
def test_learned_steps_of_float_and_codebook_formats_get_the_rounding_error_as_gradient(format):
    case = cases.along(1, format=format)
    step = np.abs(X).max(1, keepdims=True) * np.float32(0.7 / format.qmax)
    values, of_x, of_step = gradients(X, case, LearnedStep(jnp.asarray(step)), COTANGENT)
    placed = X / step
    is_inside = np.abs(placed) <= format.qmax
    assert not is_inside.all()
    np.testing.assert_array_equal(of_x, COTANGENT * is_inside)
    slope = np.asarray(values) / step - np.where(is_inside, placed, 0)
    g = 1 / np.sqrt(SHAPE[1] * format.qmax)
    want = g * np.sum(COTANGENT * slope, 1, keepdims=True)
    np.testing.assert_allclose(of_step.scale, want, rtol=1e-3, atol=1e-4)


def test_bfloat16_weights_give_float32_gradients_to_steps():
    case, step = STEPS["int8 per row"], np.full((6, 1), 1 / 64, np.float32)
    x = jnp.asarray(X, jnp.bfloat16)
    cotangent = jnp.asarray(COTANGENT, jnp.bfloat16)
    _, of_x, of_step = gradients(x, case, LearnedStep(jnp.asarray(step)), cotangent)
    wide = [np.asarray(a).astype(np.float64) for a in (x, cotangent)]
    steps = oracles.repeat_groups(step, SHAPE)
    _, mask, of_scale, _ = oracles.straight_through(wide[0], steps, np.zeros(SHAPE), case.config)
    want = np.sum(wide[1] * of_scale, 1, keepdims=True) / np.sqrt(SHAPE[1] * 127)
    assert of_x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(of_x).astype(np.float64), wide[1] * mask)
    np.testing.assert_allclose(of_step.scale, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_key_rounds_stochastically_without_changing_the_gradient():
    key = jax.random.key(0)
    values, of_x, _ = gradients(X, GROUPED, None, COTANGENT, key)
    np.testing.assert_array_equal(values, quantize(X, *GROUPED, key).dequantize())
    assert np.any(values != fake_quantize(X, *GROUPED))
    np.testing.assert_array_equal(of_x, COTANGENT)

    step = np.full((6, 4), 0.3, np.float32)
    values, _, of_step = gradients(X, GROUPED, LearnedStep(jnp.asarray(step)), COTANGENT, key)
    steps = oracles.repeat_groups(step, SHAPE)
    is_inside = (X / steps >= -8) & (X / steps <= 7)
    slope = values / steps - np.where(is_inside, X / steps, 0)
    want = oracles.sum_blocks(COTANGENT * slope, (6, 4)) / np.sqrt(8 * 7)
    np.testing.assert_allclose(of_step.scale, want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_gradients_agree_under_all_transformations_and_compile_once():
    config, traces = ArrayConfig(format=INT4, group_size=8), []
    learned = LearnedStep(jnp.full((6, 4), 0.3))

    def of_row(row, step, cotangent, function: Any = fake_quantize):
        traces.append(row)
        return jax.vjp(lambda row, step: function(row, config, 0, step), row, step)[1](cotangent)

    rows = jnp.asarray(X), learned, jnp.asarray(COTANGENT)
    want = [of_row(*jax.tree.map(lambda a, i=i: a[i], rows)) for i in range(len(X))]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *want)
    remat = jax.checkpoint(fake_quantize, static_argnums=(1, 2))
    traces.clear()
    jitted = jax.jit(jax.vmap(of_row))
    results = {
        "jit and vmap": [jitted(*rows) for _ in range(3)][-1],
        "scan": jax.lax.scan(lambda c, row: (c, of_row(*row)), 0, rows)[1],
        "remat": jax.vmap(partial(of_row, function=remat))(*rows),
    }
    assert len(traces) == 3
    for name, got in results.items():
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


def test_steps_of_empty_arrays_have_zero_gradients():
    case = cases.along(1)
    learned = LearnedStep(jnp.ones((3, 1)))
    empty = jnp.zeros((3, 0))
    values, of_x, of_step = gradients(empty, case, learned, empty)
    assert values.shape == of_x.shape == (3, 0)
    np.testing.assert_array_equal(of_step.scale, jnp.zeros((3, 1)))


@pytest.mark.slow
def test_no_gradient_flows_through_the_range_of_x():
    # Otherwise the largest element of each row would get the gradients of the whole row.
    config = ArrayConfig(format=INT4, range=Percentile(100))
    of_x = jax.grad(lambda x: jnp.sum(fake_quantize(x, config, axis=1) * COTANGENT))(X)
    np.testing.assert_array_equal(of_x, COTANGENT)


@pytest.mark.parametrize(
    "case, learned, text",
    [
        (
            RANGES["int4 grouped"],
            LearnedStep(jnp.ones((6, 4))),
            r"A LearnedStep needs symmetric=True; got ArrayConfig\(.*Use a LearnedRange",
        ),
        (
            GROUPED,
            LearnedRange(-jnp.ones((6, 4)), jnp.ones((6, 4))),
            r"A LearnedRange needs symmetric=False; got ArrayConfig\(.*Use a LearnedStep",
        ),
        (GROUPED, LearnedStep(jnp.ones((6, 1))), r"shape of the scales, \(6, 4\); got \(6, 1\)"),
        (GROUPED, jnp.ones((6, 4)), "learned must be a LearnedStep, a LearnedRange or None; got"),
        ((INT4, 0), None, r"config must be an ArrayConfig; got int4"),
    ],
)
def test_invalid_arguments_raise(case, learned, text):
    config, axis = case
    with pytest.raises(ValueError, match=text):
        fake_quantize(X, config, axis, learned)


def test_a_key_in_place_of_the_axis_is_named():
    key: Any = jax.random.key(0)
    with pytest.raises(ValueError, match=r"axis must be an int.*got an array.*by name: key=key"):
        fake_quantize(X, ArrayConfig(), key)
