"""Arrays that quantized parameters stand for, if something changes their activations."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.tree.internal import effective

M, K, N, H, D = 6, 32, 48, 4, 8
W4 = jq.ArrayConfig(format=jq.INT4, group_size=16)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("shape", "axes"), [((K, N), (0,)), ((2, K, N), (1,)), ((2, H, D, N), (1, 2)), ((N, K), (1,))]
)
def test_effective_weights_are_what_products_multiply(shape, axes):
    method = [jq.methods.SINQ(), jq.methods.Rotation(8)]
    rule = jq.Rule("*", dataclasses.replace(W4, group_size=None), axis=axes, method=method)
    w = normal(*shape)
    q: Any = jq.tree.quantize({"w": w}, rule)["w"]
    found = effective(q, axes)
    assert np.abs(found - w).max() < 0.2 * np.abs(w).max()
    layers = [q] if 0 in axes or (axes == (1,) and len(shape) == 2) else unstacked(q, 2)
    wide = [found] if len(layers) == 1 else list(found)
    inner = tuple(a - len(shape) for a in axes)
    for layer, matrix in zip(layers, wide, strict=True):
        lengths = [matrix.shape[a] for a in inner]
        x = normal(M, *lengths, seed=4)
        numbers = (range(1, 1 + len(lengths)), [a + matrix.ndim for a in inner]), ((), ())
        want = jax.lax.dot_general(x, matrix, numbers)
        np.testing.assert_allclose(jq.dot_general(x, layer, numbers), want, rtol=1e-4, atol=1e-4)


def unstacked(q, count):
    return [jax.tree.map(lambda x, i=i: x[i], q) for i in range(count)]


def test_permutations_are_undone_too():
    order = np.random.default_rng(0).permutation(K)
    inputs = jq.Inputs(multiplier=jnp.linspace(1, 2, K), permutation=jnp.asarray(order))
    q = dataclasses.replace(jq.quantize(normal(K, N), W4), inputs=inputs)
    np.testing.assert_allclose(effective(q, (0,)), jq.matmul(jnp.eye(K), q), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_trees_are_dequantized_and_reported_as_what_they_stand_for(dtype):
    params = {"w": normal(2, K, N).astype(dtype), "b": normal(N)}
    rules = [jq.Rule("w", W4, method=[jq.methods.SINQ(), jq.methods.Rotation(8)])]
    q: Any = jq.tree.quantize(params, rules)
    found = jq.tree.dequantize(q)["w"]
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), params["w"].astype(jnp.float32), 0, 0.8)
    plain = jq.tree.report(params, jq.tree.quantize(params, jq.Rule("w", W4))).rows[1].sqnr
    row = jq.tree.report(params, q).rows[1]
    assert plain is not None
    assert row.sqnr is not None
    assert abs(row.sqnr - plain) < 2


@pytest.mark.slow
def test_scales_that_do_not_say_what_is_contracted_are_an_error():
    config = jq.ArrayConfig(per_tensor=True)
    q: Any = jq.tree.quantize({"w": normal(K, N)}, jq.Rule("w", config, method=[jq.methods.SINQ()]))
    with pytest.raises(ValueError, match=r"multiplier of shape \(32,\) .*Multiply with it"):
        jq.tree.dequantize(q)
    found = effective(q["w"], (0,))
    np.testing.assert_allclose(found, jq.matmul(jnp.eye(K), q["w"]), rtol=1e-4, atol=1e-4)
