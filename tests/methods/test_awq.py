import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxquant import INT4, NF4, NVFP4, ArrayConfig, quantize
from jaxquant.methods import AWQ, MaxAbs, MeanAbs, MeanSquare, SecondMoment, Transform

from . import inputs

GROUPS = ArrayConfig(format=INT4, group_size=8)
CASES = {
    "int4-g8": (GROUPS, 1),
    "int4-asym_row": (ArrayConfig(format=INT4, symmetric=False), 1),
    "nf4-g12": (ArrayConfig(format=NF4, group_size=12), 1),
    "int4-blocks": (ArrayConfig(format=INT4, group_size=(3, 12)), (0, 1)),
    "nvfp4": (ArrayConfig(format=NVFP4), 1),
}


def case_inputs(config, seed=0):
    channels = 48 if config.format is NVFP4 else 24
    return inputs.weights((9, channels), seed), inputs.activations(channels, seed)


def candidates(weight, x, config, axis, grid):
    """All s in float64, from the paper and from llm-awq's program."""
    of_x = np.abs(x).astype(np.float64).mean(0)
    rows, length = {(0, 1): (3, 12)}.get(axis, (1, None))
    length = length or config.group_size or config.format.group_size or weight.shape[1]
    blocks = np.abs(weight).reshape(len(weight) // rows, rows, -1, length)
    of_w = (blocks / blocks.max((1, 3), keepdims=True)).reshape(weight.shape).mean(0)
    found = [np.ones_like(of_x)]
    for r in np.arange(1, grid + 1) / grid:
        found += [of_x**r, of_x**r / of_w ** (1 - r)]
    return [s / np.sqrt(s.max() * s.min()) for s in found]


def error(weight, multiplier, x, config, axis):
    multiplier = np.asarray(multiplier)
    decoded = quantize(jnp.asarray(weight / multiplier, jnp.float32), config, axis).dequantize()
    return inputs.output_error(np.asarray(decoded) * multiplier - weight, x).sum()


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_best_of_all_candidates_is_chosen(case):
    config, axis = case
    weight, x = case_inputs(config)
    tried = candidates(weight, x, config, axis, 6)
    scores = [error(weight, (1 / s).astype(np.float32), x, config, axis) for s in tried]
    assert np.argmin(scores) > 0

    changed = inputs.transform(AWQ(grid=6), jnp.asarray(weight), inputs.means_of(x), config, axis)

    np.testing.assert_allclose(changed.multiplier, 1 / tried[np.argmin(scores)], rtol=1e-4)
    np.testing.assert_allclose(changed.weight * changed.multiplier[None], weight, rtol=1e-6)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 3), st.sampled_from([SecondMoment, MeanSquare]))
def test_the_error_of_outputs_never_rises(seed, spread, moment):
    weight, x = inputs.weights(seed=seed), inputs.activations(seed=seed, spread=spread)
    means = inputs.means_of(x)
    multiplier = inputs.transform(AWQ(moment), jnp.asarray(weight), means, GROUPS, 1).multiplier
    if moment is MeanSquare:
        # What its diagonal sees: activations that are not correlated.
        x = np.diag(np.sqrt(np.mean(np.square(x.astype(np.float64)), 0) * len(x[0])))
    found, plain = (error(weight, m, x, GROUPS, 1) for m in (multiplier, np.float32(1)))
    assert found <= plain * (1 + 1e-4)


@pytest.mark.slow
def test_under_jit_and_vmap():
    stack = jnp.stack([jnp.asarray(inputs.weights(seed=seed)) for seed in range(3)])
    x = [inputs.activations(seed=seed) for seed in range(3)]
    means = [inputs.means_of(x) for x in x]

    def scale(weight, mean_abs, moment):
        means = {MeanAbs: mean_abs, SecondMoment: moment}
        changed = inputs.transform(AWQ(), weight, means, GROUPS, 1)
        return changed.weight, changed.multiplier

    stacked = (jnp.stack([m[kind] for m in means]) for kind in (MeanAbs, SecondMoment))
    mapped = jax.jit(jax.vmap(scale))(stack, *stacked)
    for i, weight in enumerate(stack):
        alone = scale(weight, means[i][MeanAbs], means[i][SecondMoment])
        for found, expected in zip(mapped, alone, strict=True):
            np.testing.assert_allclose(found[i], expected, rtol=1e-5)


def test_dead_channels_are_scaled_least():
    weight, x = inputs.weights(), inputs.activations()
    x[:, [3, 7]] = 0
    changed = inputs.transform(AWQ(), jnp.asarray(weight), inputs.means_of(x), GROUPS, 1)
    assert np.isfinite(changed.multiplier).all()
    assert np.argmax(changed.multiplier) in (3, 7)
    without = inputs.means_of(np.zeros_like(x))
    changed = inputs.transform(AWQ(), jnp.asarray(weight), without, GROUPS, 1)
    np.testing.assert_array_equal(changed.multiplier, 1)


def test_nan_statistics_and_zero_weights_leave_the_weight():
    weight = jnp.asarray(inputs.weights())
    changed = inputs.transform(AWQ(), weight, inputs.nan_means(), GROUPS, 1)
    np.testing.assert_array_equal(changed.multiplier, 1)
    np.testing.assert_array_equal(changed.weight, weight)
    means = inputs.means_of(inputs.activations())
    changed = inputs.transform(AWQ(), jnp.zeros_like(weight), means, GROUPS, 1)
    np.testing.assert_array_equal(changed.multiplier, 1)


def test_it_is_a_transform_with_two_statistics():
    assert isinstance(AWQ(), Transform)
    assert AWQ().statistics == (MeanAbs, SecondMoment)
    assert AWQ(MeanSquare).statistics == (MeanAbs, MeanSquare)
    assert hash(AWQ()) == hash(AWQ(SecondMoment))


def test_bad_settings_raise():
    with pytest.raises(ValueError, match=r"SecondMoment or MeanSquare; got .*MaxAbs"):
        AWQ(MaxAbs)
    with pytest.raises(ValueError, match="grid must be a positive int; got 0"):
        AWQ(grid=0)
