"""Slices of 4-bit and float8 weights, which are slow on CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxquant import FP8, MXFP8A8, NVFP4A16, explain, matmul, quantize, scan

from .operands import G128, HAS_NATIVE, floats, stacked, stored


def sliced_by_index(x, layers):
    for i in range(3):
        x = matmul(x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
    return x


def taken_in_a_loop(x, layers):
    def step(i, x):
        return matmul(x, jax.tree.map(lambda leaf: jnp.take(leaf, i, 0), layers))

    return jax.lax.fori_loop(0, 3, step, x)


def by_a(scan, x, layers):
    return scan(lambda x, q: (jax.jit(matmul)(x, q), None), x, layers)[0]


def gradient_of(scan, x, layers):
    return jax.grad(lambda x: jnp.sum(by_a(scan, x, layers)))(x)


# What slices the weights of its products, by whether they are copied one by one.
SLICES = {
    "scan": (partial(by_a, jax.lax.scan), True),
    "ours": (partial(by_a, scan), False),
    "gradient of ours": (partial(gradient_of, scan), True),
    "vmap of ours": (lambda x, q: jax.vmap(partial(by_a, scan), (0, None))(x[None], q), False),
    "indices": (sliced_by_index, True),
    "take in a loop": (taken_in_a_loop, True),
    "ours in a scan": (
        lambda x, q: jax.lax.scan(
            lambda x, q: (by_a(scan, x, q), None),
            x,
            jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q),
        )[0],
        True,
    ),
    "one, turned": (lambda x, q: matmul(x, q.reorder(None).reorder((-1, -2))), False),
    "one in a loop": (
        lambda x, q: jax.lax.fori_loop(0, 3, lambda _, x: matmul(x, q), x),
        False,
    ),
}


@pytest.mark.skipif(not HAS_NATIVE, reason="XLA reads 4-bit weights as slowly as it slices them")
@pytest.mark.parametrize("name", SLICES)
def test_4_bit_weights_that_xla_slices_have_a_warning_on_cpu(name):
    function, is_slow = SLICES[name]
    words = (
        "XLA slices 4-bit weights one element at a time: use jaxquant.scan (without gradients), or "
        "keep the layers in separate arrays"
    )
    x = floats(5, 256)
    for config, platform, wanted in ((G128, "cpu", words), (G128, "tpu", None), ({}, "cpu", None)):
        q = stored((256, 256), **config)
        found = explain(function, x, q if "one" in name else stacked(q), platform=platform)
        assert {row.warning for row in found} == {wanted if is_slow else None}


def test_a_loop_copies_nothing_that_xla_reads_itself():
    layers = stacked(stored((128, 128), **G128))
    (row,) = explain(partial(by_a, jax.lax.scan), floats(5, 128), layers, platform="cpu")
    assert row.implementation == "dequantize"
    assert "slices" not in (row.warning or "")


@pytest.mark.parametrize("scheme", [FP8, MXFP8A8, NVFP4A16], ids=["fp8", "mxfp8", "nvfp4"])
def test_loops_over_narrow_floats_have_a_warning_on_cpu(scheme):
    words = (
        "XLA converts the weights of all layers to wider floats before the loop: use jaxquant.scan "
        "(without gradients), or keep the layers in separate arrays"
    )
    store = partial(quantize, config=scheme.weights, axis=-2)
    layers = stacked(jax.eval_shape(store, floats(256, 256)))
    for function, platform, is_slow in (
        (partial(by_a, jax.lax.scan), "cpu", True),
        (partial(by_a, jax.lax.scan), "tpu", False),
        (partial(by_a, scan), "cpu", False),
        (taken_in_a_loop, "cpu", True),
        (sliced_by_index, "cpu", False),
    ):
        found = explain(function, floats(5, 256), layers, platform=platform)
        assert {words in (row.warning or "") for row in found} == {is_slow}
