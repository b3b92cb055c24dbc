"""Scales trained against the outputs of the float model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.tuning import distill, divergence

CONFIGS = {
    "int4": jq.ArrayConfig(format=jq.INT4, group_size=8),
    "int4 bfloat16": jq.ArrayConfig(format=jq.INT4, group_size=8, scale_dtype="bfloat16"),
    "asymmetric": jq.ArrayConfig(format=jq.INT4, group_size=8, symmetric=False),
}


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        yield


def apply(params, x):
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def params(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"up": (16, 24), "down": (24, 8)}
    return {n: jnp.asarray(rng.normal(size=s) / 4, jnp.float32) for n, s in shapes.items()}


def batches(count=2, seed=1):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(64, 16)), jnp.float32) for _ in range(count)]


def mean_loss(tree, loss=divergence):
    lifted = jq.lift(apply)
    return np.mean([loss(lifted(tree, x), apply(params(), x)) for x in batches()])


def test_the_divergence_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    found, exact = rng.normal(size=(2, 5, 7))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (exact, found))
    expected = np.mean(np.sum(p * np.log(p / q), -1))
    np.testing.assert_allclose(divergence(jnp.asarray(found), jnp.asarray(exact)), expected, 1e-5)


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_falls_and_the_codes_stay(name):
    quantized = jq.tree.quantize(params(), CONFIGS[name])
    tuned = distill(apply, params(), quantized, batches(), optax.adam(3e-3), epochs=10)
    assert mean_loss(tuned) < 0.9 * mean_loss(quantized)
    for key, q in quantized.items():
        np.testing.assert_array_equal(q.codes, tuned[key].codes)
        assert tuned[key].scale.dtype == q.scale.dtype
        assert np.any(tuned[key].scale != q.scale)


@pytest.mark.slow
def test_offsets_are_trained_too():
    config = CONFIGS["asymmetric"]
    quantized = jq.tree.quantize(params(), config, method=jq.methods.HQQ())
    tuned = distill(apply, params(), quantized, batches(), optax.adam(3e-3), epochs=5)
    assert mean_loss(tuned) < mean_loss(quantized)
    assert np.any(tuned["up"].offset != quantized["up"].offset)


@pytest.mark.slow
def test_a_rate_that_is_too_high_keeps_the_start():
    quantized = jq.tree.quantize(params(), CONFIGS["int4"])
    tuned = distill(apply, params(), quantized, batches(), optax.sgd(1e4), epochs=2)
    for a, b in zip(jax.tree.leaves(tuned), jax.tree.leaves(quantized), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_another_loss():
    def squared(found, exact):
        return jnp.mean(jnp.square(found - exact))

    quantized = jq.tree.quantize(params(), CONFIGS["int4"])
    tuned = distill(apply, params(), quantized, batches(), optax.adam(3e-3), loss=squared, epochs=5)
    assert mean_loss(tuned, squared) < mean_loss(quantized, squared)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "config, count, epochs, message",
    [
        (CONFIGS["int4"], 0, 1, r"distill needs batches .*; got 0 batches and epochs=1\."),
        (CONFIGS["int4"], 1, 0, r"distill needs batches .*; got 1 batches and epochs=0\."),
        (jq.ArrayConfig(format=jq.NVFP4), 1, 1, r"scales of 16 bits or more; got 2 quantized"),
    ],
)
def test_bad_arguments(config, count, epochs, message):
    floats = {"up": jnp.ones((16, 32)), "down": jnp.ones((32, 8))}
    quantized = jq.tree.quantize(floats, config)
    with pytest.raises(ValueError, match=message):
        distill(apply, floats, quantized, batches(count), optax.adam(1e-3), epochs=epochs)


def with_bias(dtype=jnp.float32) -> dict[str, Any]:
    return params() | {"norm": {"bias": jnp.zeros(8, dtype), "gain": jnp.full(24, 2, dtype)}}


def apply_biased(params, x):
    hidden = jax.nn.gelu(x @ params["up"]) * params["norm"]["gain"][None].astype(x.dtype)
    return hidden @ params["down"] + params["norm"]["bias"][None].astype(x.dtype)


def squared(found, exact):
    return jnp.mean(jnp.square(found - exact))


@pytest.mark.parametrize(
    "also, trained", [("*/bias", {"bias"}), (["*/bias", "re:norm/g.*"], {"bias", "gain"})]
)
def test_floats_are_trained_too(also, trained):
    floats = with_bias(jnp.bfloat16)
    rules = [jq.Rule("re:up|down", CONFIGS["int4"])]
    quantized = jq.tree.quantize(floats, rules)

    def run(also):
        optimizer = optax.adam(3e-3)
        return distill(
            apply_biased, floats, quantized, batches(), optimizer, also=also, loss=squared, epochs=5
        )

    def loss(tree):
        lifted = jq.lift(apply_biased)
        return np.mean([squared(lifted(tree, x), apply_biased(floats, x)) for x in batches()])

    alone, found = run(()), run(also)
    assert loss(found) < loss(alone)
    for name, x in floats["norm"].items():
        assert found["norm"][name].dtype == x.dtype
        assert np.any(found["norm"][name] != x) == (name in trained)
        np.testing.assert_array_equal(alone["norm"][name], x)


@pytest.mark.parametrize("value, step", [(3.0, 0.03), (0.0, 0.01)])
def test_changes_of_floats_are_relative_to_their_size(value, step):
    floats = {"w": jnp.eye(8), "bias": jnp.full(8, value)}
    quantized = jq.tree.quantize(floats, [jq.Rule("w", CONFIGS["int4"])])

    def apply(params, x):
        return x @ params["w"] + params["bias"][None]

    def loss(found, exact):
        return jnp.sum(jnp.square(found - exact - 1))  # The bias must grow.

    x = jnp.zeros((1, 8))
    tuned = distill(apply, floats, quantized, [x], optax.sign_sgd(0.01), also="bias", loss=loss)
    np.testing.assert_allclose(tuned["bias"], value + step, rtol=1e-6)


def test_other_leaves_stay_as_they_are():
    floats = {"w": jnp.eye(8), "epsilon": 0.5, "steps": jnp.int32(3)}
    quantized = jq.tree.quantize(floats, [jq.Rule("w", CONFIGS["int4"])])

    def apply(params, x):
        return x @ params["w"] * params["epsilon"]

    tuned = distill(apply, floats, quantized, [jnp.ones((2, 8))], optax.adam(1e-3))
    assert (tuned["epsilon"], tuned["steps"]) == (0.5, 3)


@pytest.mark.parametrize("also", ["*/scale", ["norm/bias", "up"]])
def test_patterns_that_match_no_float(also):
    floats = with_bias()
    quantized = jq.tree.quantize(floats, [jq.Rule("re:up|down", CONFIGS["int4"])])
    message = "matches no floating-point leaf; those are norm/bias, norm/gain. Patterns are globs"
    with pytest.raises(ValueError, match=message):
        distill(apply_biased, floats, quantized, batches(), optax.adam(1e-3), also=also)
