"""Chains of methods on whole parameters, whose statistics are collected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.methods import AWQ, GPTQ, HQQ, SINQ, AutoRound, Importance, SmoothQuant

from . import inputs

LAYERS, CHANNELS = 2, 32
CONFIG = jq.ArrayConfig(format=jq.INT4, group_size=16, symmetric=False)
RULES = [jq.Rule("kernel", CONFIG, axis=1)]
CHAINS = {
    "sinq, auto_round": [SINQ(), AutoRound(20)],
    "awq": [AWQ()],
    "awq, gptq": [AWQ(), GPTQ()],
    "awq, importance": [AWQ(), Importance()],
    "smooth_quant, hqq": [SmoothQuant(None), HQQ()],
    "sinq, awq, auto_round": [SINQ(), AWQ(), AutoRound(20, Importance())],
}


def parameters():
    kernels = [inputs.weights((24, CHANNELS), seed).T for seed in range(LAYERS)]
    return {"kernel": jnp.asarray(np.stack(kernels))}


def apply(params, x):
    """The same activations meet each layer."""
    return jax.lax.scan(lambda x, kernel: (x, x @ kernel), x, params["kernel"])[1]


def output_error(params, x):
    def product(x, kernel):
        return x, jq.matmul(x, kernel)

    found = jax.jit(lambda params, x: jax.lax.scan(product, x, params["kernel"])[1])(params, x)
    return float(jnp.sum(jnp.square(found - apply(parameters(), x))))


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", CHAINS)
def test_chains_with_several_statistics_lower_the_error(name):
    x = jnp.asarray(inputs.activations(CHANNELS, rows=300))
    chain = CHAINS[name]
    statistics = jq.collect(apply, parameters(), [x], RULES, chain)
    found = jq.tree.quantize(parameters(), RULES, method=chain, statistics=statistics)
    plain = jq.tree.quantize(parameters(), RULES)
    assert output_error(found, x) < 0.95 * output_error(plain, x)
    assert found["kernel"].inputs.multiplier.shape == (LAYERS, CHANNELS)
