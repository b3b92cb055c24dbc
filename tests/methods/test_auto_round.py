import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import FP8_E4M3, INT4, MXFP4, NF4, NVFP4, ArrayConfig, quantize
from jaxquant.methods import (
    AWQ,
    GPTQ,
    HQQ,
    AutoRound,
    CrossMoment,
    Importance,
    Method,
    SecondMoment,
)
from jaxquant.methods.adjustable import AdjustableRounding, Adjustments
from jaxquant.methods.method import with_notes

from .. import oracles
from . import inputs

CASES = {
    "int4-g8": ArrayConfig(format=INT4, group_size=8),
    "int4-asym_g16": ArrayConfig(format=INT4, group_size=16, symmetric=False),
    "int4-row_bfloat16": ArrayConfig(format=INT4, scale_dtype="bfloat16"),
    "int4-nested": ArrayConfig(format=INT4, group_size=16, scale_dtype="float8_e4m3fn"),
    "int4-e8m0": ArrayConfig(format=INT4, group_size=16, scale_dtype="float8_e8m0fnu"),
    "nf4-g16": ArrayConfig(format=NF4, group_size=16),
    "fp8-row": ArrayConfig(format=FP8_E4M3),
    "mxfp4": ArrayConfig(format=MXFP4),
    "nvfp4": ArrayConfig(format=NVFP4),
    "int4-tensor": ArrayConfig(format=INT4, per_tensor=True),
}
each_case = pytest.mark.parametrize("name", CASES)
G8, SHAPE = CASES["int4-g8"], (6, 32)
FEW = AutoRound(iterations=20)


def few(weight, means):
    """A result without notes, which rounding to nearest has as a start."""
    q, notes = with_notes(FEW(weight, means, G8, 1))
    assert not notes
    return q


def axis_of(config):
    return (0, 1) if config.per_tensor else 1


def error(q, weight, x):
    return inputs.output_error(oracles.dequantize(q) - weight, x)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@each_case
def test_no_adjustment_gives_the_start(name):
    """The codes of error feedback, which are not the nearest ones."""
    config, weight = CASES[name], inputs.weights(SHAPE)
    second = inputs.means_of(inputs.activations(32))[SecondMoment]
    start, _ = GPTQ()(jnp.asarray(weight), {SecondMoment: second}, config, axis_of(config))
    rounding = AdjustableRounding.of(jnp.asarray(weight), start, config)
    q = jax.jit(lambda r: r.quantized(r.initial()))(rounding)
    nearest = quantize(jnp.asarray(weight), config, axis_of(config))
    assert np.any(np.asarray(nearest.codes) != np.asarray(start.codes))
    np.testing.assert_array_equal(
        oracles.code_values(q.codes, config.format), oracles.code_values(start.codes, config.format)
    )
    np.testing.assert_allclose(q.dequantize(), start.dequantize(), rtol=1e-5)
    values = rounding.values(rounding.initial())
    np.testing.assert_allclose(values, start.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.some_rows(1)
@each_case
def test_values_are_those_of_the_quantized_array(name):
    config, weight = CASES[name], jnp.asarray(inputs.weights(SHAPE))
    start = quantize(weight, config, axis_of(config))
    rounding = AdjustableRounding.of(weight, start, config)
    random = np.random.default_rng(3)
    adjustments = Adjustments(
        *(jnp.asarray(random.uniform(-0.5, 0.5, x.shape), jnp.float32) for x in rounding.initial())
    )
    adjustments = adjustments._replace(low=adjustments.low + 1, high=adjustments.high + 1)
    found = rounding.quantized(adjustments)
    np.testing.assert_allclose(rounding.values(adjustments), found.dequantize(), atol=2e-6)
    assert np.any(np.asarray(found.codes) != np.asarray(start.codes))


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_straight_through(symmetric):
    """d q / d v = scale, and d q / d range, from the definition in float64."""
    config = ArrayConfig(format=INT4, symmetric=symmetric)
    weight = inputs.weights((3, 16))
    start: Any = quantize(jnp.asarray(weight), config, 1)
    rounding = AdjustableRounding.of(jnp.asarray(weight), start, config)
    random = np.random.default_rng(0)
    offset = random.uniform(-0.5, 0.5, weight.shape).astype(np.float32)
    first = rounding.initial()
    factors = {"low": first.low * 0.8, "high": first.high * 0.7}
    adjustments = first._replace(offset=jnp.asarray(offset), **factors)
    upstream = random.normal(size=weight.shape)

    _, back = jax.vjp(rounding.values, adjustments)
    found = back(jnp.asarray(upstream, jnp.float32))[0]

    before = np.asarray(start.scale, np.float64)
    zero = 0.0 if symmetric else np.asarray(start.zero_point).astype(np.float64)
    ends = (0, 7) if symmetric else ((-8 - zero) * before, (7 - zero) * before)
    if symmetric:
        step, new_zero = 0.7 * before, 0.0
        slopes = {"high": before, "low": 0 * before}
    else:
        step = (0.7 * ends[1] - 0.8 * ends[0]) / 15
        new_zero = np.round(-8 - 0.8 * ends[0] / step)
        slopes = {"high": ends[1] / 15, "low": -ends[0] / 15}
    exact = weight / step + new_zero + offset
    is_inside = (exact >= -8) & (exact <= 7)
    assert 0 < is_inside.sum() < is_inside.size
    codes = np.clip(np.round(exact), -8, 7)
    np.testing.assert_allclose(found.offset, upstream * step * is_inside, rtol=1e-4, atol=1e-5)
    of_step = codes - new_zero - np.where(is_inside, weight / step, 0)
    for name, slope in slopes.items():
        expected = np.sum(upstream * of_step * slope, 1, keepdims=True)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.some_rows(1)
@each_case
def test_errors_fall(name):
    config, weight = CASES[name], inputs.weights(SHAPE)
    x = inputs.activations(32, rows=400)
    plain = quantize(jnp.asarray(weight), config, axis_of(config))
    found = AutoRound(60)(jnp.asarray(weight), inputs.means_of(x), config, axis_of(config))
    assert jax.tree.structure(found) == jax.tree.structure(plain)
    before, after = (error(q, weight, x) for q in (plain, found))
    # One range for all rows has little freedom.
    assert after.sum() < (0.95 if config.per_tensor else 0.8) * before.sum()
    if not config.per_tensor:
        assert np.all(after <= before * (1 + 1e-4))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0, 2),
    st.sampled_from(["int4-g8", "int4-asym_g16", "nf4-g16", "nvfp4"]),
    st.booleans(),
)
def test_no_row_is_worse_than_at_its_start(seed, spread, name, from_gptq):
    config, weight = CASES[name], inputs.weights(SHAPE, seed)
    x = inputs.activations(32, seed, spread)
    means = inputs.means_of(x)
    start = GPTQ() if from_gptq else Importance()
    plain = start(jnp.asarray(weight), means, config, 1)
    found = AutoRound(5, start)(jnp.asarray(weight), means, config, 1)
    plain, found = (with_notes(q)[0] for q in (plain, found))
    assert np.all(error(found, weight, x) <= error(plain, weight, x) * (1 + 1e-3) + 1e-9)


@pytest.mark.slow
def test_under_jit_and_vmap():
    stack = jnp.stack([jnp.asarray(inputs.weights(SHAPE, seed)) for seed in range(2)])
    second = jnp.stack(
        [inputs.means_of(inputs.activations(32, seed))[SecondMoment] for seed in range(2)]
    )

    def decoded(weight, second):
        return few(weight, {SecondMoment: second}).dequantize()

    mapped = jax.jit(jax.vmap(decoded))(stack, second)
    for i in range(2):
        alone = np.asarray(decoded(stack[i], second[i]))
        # A gradient near zero may change its sign with the order of a sum.
        assert np.mean(np.abs(mapped[i] - alone) > 1e-4) < 0.05


def test_nan_statistics_and_dead_channels():
    weight = jnp.asarray(inputs.weights(SHAPE))
    plain = quantize(weight, G8, 1)
    for means in (inputs.nan_means(32), inputs.means_of(np.zeros((4, 32), np.float32))):
        q = few(weight, means)
        np.testing.assert_array_equal(q.dequantize(), plain.dequantize())
    x = inputs.activations(32)
    x[:, :5] = 0
    q = few(weight, inputs.means_of(x))
    assert np.isfinite(q.dequantize()).all()
    broken = weight.at[2, 3].set(jnp.nan)
    found = few(broken, inputs.means_of(inputs.activations(32))).dequantize()
    assert np.array_equal(np.isnan(found), np.isnan(quantize(broken, G8, 1).dequantize()))


@pytest.mark.slow
def test_it_is_a_method_with_the_statistics_of_its_start():
    assert isinstance(AutoRound(), Method)
    assert AutoRound().statistics == (SecondMoment,)
    assert len(AutoRound(start=Importance()).statistics) == 2
    assert hash(AutoRound(start=GPTQ())) == hash(AutoRound(start=GPTQ()))
    means = inputs.means_of(inputs.activations(32))
    found = AutoRound(5, GPTQ())(jnp.asarray(inputs.weights(SHAPE)), means, G8, 1)
    notes = with_notes(found)[1]
    assert notes["damping"] < 0.1


def test_bad_settings_raise():
    with pytest.raises(ValueError, match="iterations must be a positive int; got 0"):
        AutoRound(0)
    for start in ("gptq", GPTQ, AWQ()):
        with pytest.raises(
            ValueError, match=rf"start must be a method, .*; got {re.escape(repr(start))}"
        ):
            AutoRound(start=start)
    with pytest.raises(ValueError, match="a start that needs CrossMoment, GPTQ"):
        AutoRound(start=GPTQ(repair=1))
    assert CrossMoment in GPTQ(repair=1).statistics
    config = ArrayConfig(format=INT4, symmetric=False)
    means = inputs.means_of(inputs.activations(32))
    with pytest.raises(ValueError, match="The start must not have an offset, as that of HQQ has"):
        AutoRound(start=HQQ())(jnp.asarray(inputs.weights(SHAPE)), means, config, 1)
