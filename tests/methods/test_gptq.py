import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.methods import GPTQ, CrossMoment, SecondMoment

CHANNELS, OUTPUTS = 64, 24
CONFIGS = {
    "int4 per channel": jq.ArrayConfig(format=jq.INT4),
    "int4 groups": jq.ArrayConfig(format=jq.INT4, group_size=16),
    "int4 asymmetric groups": jq.ArrayConfig(format=jq.INT4, group_size=32, symmetric=False),
    "nf4": jq.ArrayConfig(format=jq.NF4, group_size=32),
    "nvfp4": jq.ArrayConfig(format=jq.NVFP4),
    "nvfp4 searched": jq.ArrayConfig(format=jq.NVFP4, range=jq.MinMSE()),
    "int8 per tensor": jq.ArrayConfig(per_tensor=True),
}


def correlated(channels, rho=0.9):
    """The second moment of an autoregressive process."""
    places = np.arange(channels)
    return rho ** np.abs(places[:, None] - places[None, :])


def weights(seed=0, outputs=OUTPUTS, channels=CHANNELS):
    return np.random.default_rng(seed).normal(size=(outputs, channels)).astype(np.float32)


def run(method, weight, second, config):
    axis = (0, 1) if config.per_tensor else 1
    means = {SecondMoment: jnp.asarray(second, jnp.float32)}
    q, notes = jax.jit(lambda w, m: method(w, m, config, axis))(weight, means)
    return q, notes


def loss(q, weight, second):
    error = np.asarray(q.dequantize(), np.float64) - weight
    return np.trace(error @ second @ error.T)


def algorithm_1(weight, second, damping, group):
    """Algorithm 1 of Frantar et al. in float64: symmetric int4, scales fitted group by group."""
    w = weight.astype(np.float64)
    length = w.shape[1]
    hessian = second + damping * np.mean(np.diag(second)) * np.eye(length)
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T  # Upper.
    codes, scales = np.zeros(w.shape, int), []
    for k in range(length):
        if k % group == 0:
            scale = np.abs(w[:, k : k + group]).max(1) / 7
            scales.append(scale)
        codes[:, k] = np.clip(np.round(w[:, k] / scale), -8, 7)
        error = (w[:, k] - codes[:, k] * scale) / inverse[k, k]
        w[:, k:] -= error[:, None] * inverse[k, k:][None]
    return codes, np.stack(scales, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name, group", [("int4 per channel", CHANNELS), ("int4 groups", 16)])
def test_codes_are_those_of_algorithm_1(name, group):
    weight, second = weights(), correlated(CHANNELS)
    codes, scales = algorithm_1(weight, second, 0.01, group)
    q, _ = run(GPTQ(), weight, second, CONFIGS[name])
    np.testing.assert_allclose(q.scale, scales, rtol=1e-4)
    # Ties in float32 may go the other way, and change later channels of their row.
    assert np.mean(np.asarray(q.codes, int) == codes) > 0.995


@pytest.mark.slow
def test_the_gain_on_correlated_activations_is_the_predicted_one():
    second = correlated(256)
    weight = weights(outputs=256, channels=256)
    config = jq.ArrayConfig(format=jq.INT4, group_size=128)
    nearest = loss(jq.quantize(weight, config, 1), weight, second)
    ratio = loss(run(GPTQ(damping=1e-4), weight, second, config)[0], weight, second) / nearest
    assert -10 * np.log10(ratio) >= 6.8
    predicted = float(jq.methods.predicted_gain(jnp.asarray(second, jnp.float32)))
    assert ratio == pytest.approx(10 ** (-predicted / 10), rel=0.05)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_white_activations_leave_rounding_to_nearest(name):
    weight, config = weights(), CONFIGS[name]
    axis = (0, 1) if config.per_tensor else 1
    expected = jq.quantize(weight, config, axis)
    q, _ = run(GPTQ(), weight, 3 * np.eye(CHANNELS), config)
    for found, wanted in zip(jax.tree.leaves(q), jax.tree.leaves(expected), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_error_falls_in_every_format(name):
    weight, config, second = weights(), CONFIGS[name], correlated(CHANNELS)
    axis = (0, 1) if config.per_tensor else 1
    nearest = loss(jq.quantize(weight, config, axis), weight, second)
    assert loss(run(GPTQ(), weight, second, config)[0], weight, second) < 0.5 * nearest


@pytest.mark.slow
def test_scales_chosen_by_importance_lower_the_error_further():
    weight, config, second = weights(), CONFIGS["int4 per channel"], correlated(CHANNELS)
    plain = loss(run(GPTQ(), weight, second, config)[0], weight, second)
    assert loss(run(GPTQ(importance=True), weight, second, config)[0], weight, second) < plain


def test_act_order_rounds_large_channels_first():
    weight, config = weights(), CONFIGS["int4 groups"]
    size = np.random.default_rng(1).uniform(0.1, 10, CHANNELS)
    second = correlated(CHANNELS) * size[:, None] * size[None, :]
    order = np.argsort(-np.diag(second))
    q, _ = run(GPTQ(act_order=True), weight, second, config)
    np.testing.assert_array_equal(q.scale, jq.quantize(weight, config, 1).scale)
    # The same in permuted order, with the same scale for each column, by the definition.
    scale = np.repeat(np.asarray(q.scale, np.float64), 16, 1)[:, order]
    w, s = weight[:, order].astype(np.float64), second[np.ix_(order, order)]
    inverse = np.linalg.cholesky(np.linalg.inv(s + 0.01 * np.mean(np.diag(s)) * np.eye(CHANNELS))).T
    codes = np.zeros(w.shape, int)
    for k in range(CHANNELS):
        codes[:, k] = np.clip(np.round(w[:, k] / scale[:, k]), -8, 7)
        error = (w[:, k] - codes[:, k] * scale[:, k]) / inverse[k, k]
        w[:, k:] -= error[:, None] * inverse[k, k:][None]
    assert np.mean(np.asarray(q.codes, int)[:, order] == codes) > 0.995


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("size", [(24, 200), (24, 96), (1, 1)])
def test_any_number_of_channels_works_without_groups(size):
    outputs, channels = size
    weight, second = weights(outputs=outputs, channels=channels), correlated(channels)
    q, _ = run(GPTQ(), weight, second, CONFIGS["int4 per channel"])
    codes, _ = algorithm_1(weight, second, 0.01, channels)
    assert np.mean(np.asarray(q.codes, int) == codes) > 0.99


@pytest.mark.parametrize("name", ["int4 per channel", "int4 groups"])
def test_channels_that_are_always_zero_are_rounded_to_nearest(name):
    weight, second = weights(), correlated(CHANNELS)
    second[10:20] = second[:, 10:20] = 0
    q, _ = run(GPTQ(), weight, second, CONFIGS[name])
    group = CHANNELS if name == "int4 per channel" else 16
    scale = np.repeat(np.asarray(q.scale), group, 1)
    expected = np.clip(np.round(weight / scale), -8, 7)
    np.testing.assert_array_equal(np.asarray(q.codes, int)[:, 10:20], expected[:, 10:20])
    assert np.any(np.asarray(q.codes, int) != expected)


def test_damping_is_raised_until_the_moment_is_positive():
    x = np.random.default_rng(0).normal(size=(3, CHANNELS))
    q, notes = run(GPTQ(damping=1e-12), weights(), x.T @ x, CONFIGS["int4 groups"])
    assert 1e-12 < float(notes["damping"]) < 1e-2
    assert np.all(np.isfinite(q.dequantize()))


def test_damping_that_suffices_is_kept():
    _, notes = run(GPTQ(damping=0.02), weights(), correlated(CHANNELS), CONFIGS["int4 groups"])
    assert float(notes["damping"]) == pytest.approx(0.02)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", ["int4 per channel", "int4 groups"])
@pytest.mark.parametrize("method", [GPTQ(), GPTQ(act_order=True)], ids=["in order", "act_order"])
def test_nan_gives_no_plausible_numbers(name, method):
    weight, second = weights(), correlated(CHANNELS)
    expected = np.array(run(method, weight, second, CONFIGS[name])[0].dequantize())
    weight[2, 20] = np.nan
    expected[2] = np.nan
    found = run(method, weight, second, CONFIGS[name])[0].dequantize()
    np.testing.assert_array_equal(found, expected)
    second[3, 4] = second[4, 3] = np.nan
    assert np.all(np.isnan(run(method, weights(), second, CONFIGS[name])[0].dequantize()))


def moments(seed=0, noise=0.3, rows=2000):
    """Activations of a float model and of a quantized one, and their CrossMoment."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, CHANNELS)) @ np.linalg.cholesky(correlated(CHANNELS)).T
    y = x + noise * rng.normal(size=x.shape)
    return x, y, np.stack([x.T @ y, y.T @ y]) / rows


def output_error(q, weight, x, y):
    return np.sum(np.square(x @ weight.T - y @ np.asarray(q.dequantize(), np.float64).T))


def run_pair(method, weight, both, config):
    q, _ = method(jnp.asarray(weight), {CrossMoment: jnp.asarray(both, jnp.float32)}, config, 1)
    return q


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_repairing_the_input_lowers_the_error_on_quantized_activations(seed):
    x, y, both = moments(seed)
    weight, config = weights(seed), CONFIGS["int4 groups"]
    gptq, _ = run(GPTQ(), weight, both[1], config)
    errors = [output_error(gptq, weight, x, y)]
    errors += [
        output_error(run_pair(GPTQ(repair=part), weight, both, config), weight, x, y)
        for part in (0.5, 1.0)
    ]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.slow
def test_the_repaired_weights_are_the_least_squares_ones():
    _, _, both = moments()
    weight, fine = weights(), jq.ArrayConfig(format=jq.Format("int16", "int16", -32767, 32767))
    q = run_pair(GPTQ(repair=1.0, damping=1e-6), weight, both, fine)
    expected = weight.astype(np.float64) @ both[0] @ np.linalg.inv(both[1])
    np.testing.assert_allclose(q.dequantize(), expected, atol=2e-3)


@pytest.mark.slow
def test_equal_moments_repair_nothing():
    weight, second, config = weights(), correlated(CHANNELS), CONFIGS["int4 groups"]
    q = run_pair(GPTQ(repair=1.0), weight, np.stack([second, second]), config)
    expected, _ = run(GPTQ(), weight, second, config)
    np.testing.assert_array_equal(q.codes, expected.codes)


def test_a_method_names_the_statistic_that_it_needs():
    assert GPTQ().statistics == (SecondMoment,)
    assert GPTQ(repair=0.5).statistics == (CrossMoment,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"damping": 0.0}, r"damping must be above 0 and below 1; got 0.0\."),
        ({"damping": float("nan")}, r"damping must be above 0 and below 1; got nan\."),
        ({"repair": 1.5}, r"repair must be from 0 to 1; got 1.5\."),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPTQ(**arguments)
