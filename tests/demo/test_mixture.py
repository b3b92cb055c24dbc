"""Mixtures of experts against a loop over tokens and experts in NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.demo.mixture import mixture

WIDTH, HIDDEN, EXPERTS, COUNT = 32, 64, 8, 3


@functools.cache
def weights():
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape) / np.sqrt(shape[1]), jnp.float32)

    experts = {
        "gate": normal(EXPERTS, WIDTH, HIDDEN),
        "up": normal(EXPERTS, WIDTH, HIDDEN),
        "down": normal(EXPERTS, HIDDEN, WIDTH),
    }
    return {"router": {"kernel": normal(EXPERTS, WIDTH)}, "experts": experts}


def x():
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, WIDTH)), jnp.float32)


def _values(w):
    return np.float64(w.dequantize() if jq.tree.is_quantized(w) else w)


def slow_mixture(x, weights):
    router, experts = weights["router"]["kernel"], weights["experts"]
    experts = jax.tree.map(_values, experts, is_leaf=jq.tree.is_quantized)
    out = np.zeros(x.shape)
    for place in np.ndindex(x.shape[:-1]):
        token: Any = np.float64(x[place])
        scores = np.exp(np.float64(router) @ token)
        chosen = np.argsort(-scores)[:COUNT]
        for e in chosen:
            gate = token @ experts["gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * (token @ experts["up"][e])
            out[place] += scores[e] / scores[chosen].sum() * (hidden @ experts["down"][e])
    return out


W4 = jq.Scheme(jq.ArrayConfig(format=jq.INT4, group_size=32))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("scheme", [None, W4, jq.W8A8], ids=["float", "4 bits", "W8A8"])
def test_each_token_gets_its_experts_also_if_devices_share_them(scheme):
    params = weights()
    if scheme is not None:
        params = jq.tree.quantize(params, [jq.Rule("experts/*", scheme, axis=1)])
    run = jax.jit(mixture, static_argnums=(2, 3))
    found = run(x(), params, COUNT, None)
    # Activations in 8 bits.
    tolerance = 2e-5 if scheme is not jq.W8A8 else 0.05
    np.testing.assert_allclose(found, slow_mixture(x(), params), atol=tolerance, rtol=tolerance)
    # The experts of this layer, between those of others.
    experts = jax.tree.map(lambda x: jnp.stack([0 * x, x, 0 * x]), params["experts"])
    stacked = {**params, "experts": experts}
    np.testing.assert_allclose(run(x(), stacked, COUNT, None, 1), found, atol=1e-6)
    with jax.set_mesh(jax.make_mesh((4,), ("e",), axis_types=(jax.sharding.AxisType.Auto,))):
        for given in ((params, COUNT, "e"), (stacked, COUNT, "e", 1)):
            np.testing.assert_allclose(run(x(), *given), found, atol=1e-5)
