import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import FP8_E4M3, INT4, INT8, ArrayConfig, quantize
from jaxquant.methods import MaxAbs, MeanAbs, MeanSquare, SecondMoment, SmoothQuant, Transform

from . import inputs

W8 = ArrayConfig(format=INT8)
W4 = ArrayConfig(format=INT4)
CASES = {
    "W8A8": (W8, W8),
    "W4A8": (W4, W8),
    "groups": (ArrayConfig(format=INT4, group_size=12), ArrayConfig(group_size=8)),
    "asymmetric": (W8, ArrayConfig(symmetric=False, format=INT4)),
    "FP8": (W4, ArrayConfig(format=FP8_E4M3)),
    "weights only": (W4, None),
}


def candidates(weight, x, grid):
    """Eq. 4 for each exponent, in float64."""
    of_x, of_w = np.abs(x).astype(np.float64).max(0), np.abs(weight).astype(np.float64).max(0)
    found = [np.ones_like(of_x)]
    found += [of_x**a / of_w ** (1 - a) for a in np.arange(1, grid + 1) / grid]
    return [s / np.sqrt(s.max() * s.min()) for s in found]


def score(weight, multiplier, x, config, activations):
    multiplier = np.asarray(multiplier)
    decoded = quantize(jnp.asarray(weight / multiplier, jnp.float32), config, 1).dequantize()
    decoded = np.asarray(decoded, np.float64)
    total = inputs.output_error(decoded * multiplier - weight, x).sum()
    if activations is None or activations.format is FP8_E4M3:
        return total
    squares = np.mean(np.square(x.astype(np.float64) * multiplier), 0)
    length = activations.group_size or len(squares)
    levels = {(INT8, True): 127, (INT4, False): 7.5}
    for start in range(0, len(squares), length):
        part = slice(start, start + length)
        peak = squares[part].max() + 2 * np.log(length) * squares[part].mean()
        step = peak / levels[activations.format, activations.symmetric] ** 2
        total += step / 12 * np.sum(decoded[:, part] ** 2)
    return total


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_best_of_all_candidates_is_chosen(case):
    weight, x = inputs.weights(), inputs.activations()
    tried = candidates(weight, x, 6)
    scores = [score(weight, (1 / s).astype(np.float32), x, *case) for s in tried]

    method = SmoothQuant(case[1], grid=6)
    changed = inputs.transform(method, jnp.asarray(weight), inputs.means_of(x), case[0], 1)

    np.testing.assert_allclose(changed.multiplier, 1 / tried[np.argmin(scores)], rtol=1e-4)
    np.testing.assert_allclose(changed.weight * changed.multiplier[None], weight, rtol=1e-6)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 3))
def test_the_score_never_rises(seed, spread):
    weight, x = inputs.weights(seed=seed), inputs.activations(seed=seed, spread=spread)
    means = inputs.means_of(x)
    multiplier = inputs.transform(SmoothQuant(), jnp.asarray(weight), means, W8, 1).multiplier
    found, plain = (score(weight, m, x, W8, W8) for m in (multiplier, np.ones(24, np.float32)))
    assert found <= plain * (1 + 1e-4)


@pytest.mark.slow
def test_outputs_are_closer_with_quantized_activations():
    weight, x = inputs.weights((16, 48)), inputs.activations(48, spread=1.5)
    changed = inputs.transform(SmoothQuant(), jnp.asarray(weight), inputs.means_of(x), W8, 1)

    errors = []
    for multiplier in (np.asarray(changed.multiplier), np.ones(48, np.float32)):
        w = np.asarray(quantize(jnp.asarray(weight / multiplier), W8, 1).dequantize(), np.float64)
        q = np.asarray(quantize(jnp.asarray(x * multiplier), W8, 1).dequantize(), np.float64)
        errors.append(np.mean((q @ w.T - x.astype(np.float64) @ weight.T) ** 2))
    assert errors[0] < 0.5 * errors[1]


def test_the_estimate_of_steps_is_close():
    """Of the mean square of the step, for alike channels and for one that dominates."""
    x = np.random.default_rng(0).normal(size=(4000, 64))
    for factor in (1, 30):
        x[:, 5] *= factor
        squares = np.mean(x**2, 0)
        estimate = squares.max() + 2 * np.log(64) * squares.mean()
        assert 0.8 < estimate / np.mean(np.max(np.abs(x), 1) ** 2) < 1.5


def test_under_jit_and_vmap():
    stack = jnp.stack([jnp.asarray(inputs.weights(seed=seed)) for seed in range(3)])
    means = [inputs.means_of(inputs.activations(seed=seed)) for seed in range(3)]

    def scale(weight, largest, moment):
        means = {MaxAbs: largest, SecondMoment: moment}
        changed = inputs.transform(SmoothQuant(), weight, means, W8, 1)
        return changed.weight, changed.multiplier

    stacked = (jnp.stack([m[kind] for m in means]) for kind in (MaxAbs, SecondMoment))
    mapped = jax.jit(jax.vmap(scale))(stack, *stacked)
    for i, weight in enumerate(stack):
        alone = scale(weight, means[i][MaxAbs], means[i][SecondMoment])
        for found, expected in zip(mapped, alone, strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=1e-5)


def test_dead_channels_and_nan_statistics():
    weight, x = inputs.weights(), inputs.activations()
    x[:, 3] = 0
    weight[:, 7] = 0
    changed = inputs.transform(SmoothQuant(), jnp.asarray(weight), inputs.means_of(x), W8, 1)
    assert np.isfinite(changed.multiplier).all()
    assert np.ptp(changed.multiplier) > 0.1
    changed = inputs.transform(SmoothQuant(), jnp.asarray(weight), inputs.nan_means(), W8, 1)
    np.testing.assert_array_equal(changed.multiplier, 1)


def test_it_is_a_transform_with_two_statistics():
    assert isinstance(SmoothQuant(), Transform)
    assert SmoothQuant().statistics == (MaxAbs, SecondMoment)
    assert SmoothQuant(moment=MeanSquare).statistics == (MaxAbs, MeanSquare)
    assert hash(SmoothQuant()) == hash(dataclasses.replace(SmoothQuant()))


def test_bad_settings_raise():
    inputs_config: Any = INT8
    with pytest.raises(ValueError, match=r"SecondMoment or MeanSquare; got .*MeanAbs"):
        SmoothQuant(moment=MeanAbs)
    with pytest.raises(ValueError, match="or None; got int8"):
        SmoothQuant(inputs_config)
    with pytest.raises(ValueError, match="grid must be a positive int; got 0"):
        SmoothQuant(grid=0)
