"""The products of Qwix, as the benchmark of training uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.training import finetuning_peers
from jaxquant.demo import llama

qwix = pytest.importorskip("qwix")

X = jax.random.normal(jax.random.key(0), (1, 5, 64))
KERNEL = jax.random.normal(jax.random.key(1), (12, 64))
HEAD = jax.random.normal(jax.random.key(2), (7, 12))


def apply(x, kernel, head):
    return llama.einsum("btd,vd->btv", llama.einsum("btk,nk->btn", x, kernel), head)


def rounded(x):
    """With one scale per row."""
    q = qwix.quantize(jnp.asarray(x), "int8", channelwise_axes=list(range(x.ndim - 1)))
    return np.asarray(qwix.dequantize(q), np.float64)


def test_products_of_kernels_are_in_int8_and_others_in_float32():
    fn = finetuning_peers.with_qwix(apply, finetuning_peers.QWIX["Qwix QAT int8"])
    x, kernel, head = (np.asarray(a, np.float64) for a in (X, KERNEL, HEAD))
    wanted = rounded(X) @ rounded(KERNEL).T @ head.T
    np.testing.assert_allclose(jax.jit(fn)(X, KERNEL, HEAD), wanted, rtol=2e-3, atol=2e-3)
    assert np.abs(wanted - x @ kernel.T @ head.T).max() > 2e-2


@pytest.mark.parametrize("name", finetuning_peers.QWIX)
def test_gradients_are_near_those_in_float32(name):
    def gradient(fn):
        return jax.jit(jax.grad(lambda *args: jnp.sum(fn(*args) ** 2), 1))(X, KERNEL, HEAD)

    found = gradient(finetuning_peers.with_qwix(apply, finetuning_peers.QWIX[name]))
    wanted = gradient(apply)
    error = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)
    assert 1e-4 < error < 0.1
