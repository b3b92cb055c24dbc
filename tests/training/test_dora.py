"""Adapters with a trained norm per output (DoRA), against NumPy."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import jaxquant as jq
from jaxquant import INT4, ArrayConfig, Rule
from jaxquant.training import LoftQ, combine, lora_init, merge, partition, trainable_mask

from .. import oracles

KEY = jax.random.key(0)
CONFIG = ArrayConfig(format=INT4, group_size=16)
# Shape of the weight, axis of its scales, axes of its norms, product with activations.
LAYOUTS = {
    "kernel": ((32, 20), 0, (0,), "mk,kn->mn"),
    "rows are outputs": ((20, 32), 1, (1,), "mk,nk->mn"),
    "heads": ((32, 4, 5), 0, (0,), "mk,khd->mhd"),
    "stack": ((3, 32, 20), 1, (1,), "lmk,lkn->lmn"),
}


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape) * np.linspace(0.1, 2, shape[-1])
    return x.astype(np.float32)


def adapted(layout, alpha=2.0):
    """A weight whose adapters and norms have been trained."""
    shape, axis, _, _ = LAYOUTS[layout]
    x = lora_init(
        jnp.asarray(normal(*shape)), Rule("*", CONFIG, axis), 3, KEY, alpha=alpha, use_dora=True
    )
    arrays = (jnp.asarray(normal(*f.shape, seed=s)) / 4 for s, f in ((1, x.a), (2, x.b)))
    a, b = arrays
    assert x.magnitude is not None
    magnitude = x.magnitude * jnp.asarray(normal(*x.magnitude.shape, seed=3))
    return dataclasses.replace(x, a=a, b=b, magnitude=magnitude)


def parts(x, layout):
    """Magnitude, v, and |v|, in float64, by arXiv:2402.09353, eq. 5."""
    shape, _, axes, _ = LAYOUTS[layout]
    stack = shape[:1] if layout == "stack" else ()
    split = len(x.a.shape) - 1
    a = np.asarray(x.a, np.float64).reshape(*stack, -1, 3)
    b = np.asarray(x.b, np.float64).reshape(*stack, 3, -1)
    assert x.a.shape[:split] + x.b.shape[len(stack) + 1 :] == shape
    v = oracles.dequantize(x.base) + x.alpha / 3 * (a @ b).reshape(shape)
    return np.asarray(x.magnitude, np.float64), v, np.sqrt((v**2).sum(axes, keepdims=True))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_and_gradients_are_those_of_the_paper(layout):
    shape, _, axes, equation = LAYOUTS[layout]
    w = adapted(layout)
    x = jnp.asarray(normal(*(3,) * (layout == "stack"), 7, 32, seed=4))
    magnitude, v, norm = parts(w, layout)
    expected = magnitude * v / norm
    assert w.magnitude.shape == tuple(1 if a in axes else n for a, n in enumerate(shape))
    np.testing.assert_allclose(w.dequantize(), expected, rtol=1e-4, atol=1e-5)

    out, pull = jax.jit(lambda w, x: jax.vjp(partial(jq.einsum, equation), x, w))(w, x)
    np.testing.assert_allclose(out, np.einsum(equation, x, expected), rtol=1e-4, atol=1e-3)
    g = jnp.asarray(normal(*out.shape, seed=5))
    of_x, found = pull(g)
    left, right = equation.split("->")[0].split(",")
    of_w = np.einsum(f"{left},{equation.split('->')[1]}->{right}", x, g)
    # The norm is a constant in gradients, eq. 11.
    of_v = magnitude / norm * of_w
    of_magnitude = (of_w * v / norm).sum(axes, keepdims=True)
    np.testing.assert_allclose(found.magnitude, of_magnitude, rtol=1e-4, atol=1e-2)
    stack = shape[:1] if layout == "stack" else ()
    of_v = of_v.reshape(*stack, w.a.size // 3 // max(1, *stack, 1), -1)
    b = np.asarray(w.b, np.float64).reshape(*stack, 3, -1)
    of_a = w.factor * of_v @ np.swapaxes(b, -1, -2)
    np.testing.assert_allclose(found.a, of_a.reshape(w.a.shape), rtol=1e-3, atol=1e-2)
    right_of = np.einsum(f"{equation.split('->')[1]},{right}->{left}", g, expected)
    np.testing.assert_allclose(of_x, right_of, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("start", [None, LoftQ(2)], ids=str)
def test_training_starts_at_the_base_and_its_adapters(start):
    w = jnp.asarray(normal(32, 20))
    plain = lora_init(w, Rule("*", CONFIG), 3, KEY, start=start)
    x = lora_init(w, Rule("*", CONFIG), 3, KEY, start=start, use_dora=True)
    np.testing.assert_allclose(x.dequantize(), plain.dequantize(), rtol=1e-5, atol=1e-6)
    assert x.magnitude is not None
    assert plain.magnitude is None
    empty = lora_init(jnp.zeros((32, 4)), Rule("*", CONFIG), 3, KEY, use_dora=True)
    assert not np.any(empty.dequantize())


def test_norms_are_trained_merged_and_saved(tmp_path):
    tree = {"kernel": adapted("kernel"), "bias": jnp.ones(3)}
    mask = trainable_mask(tree)["kernel"]
    assert (mask.a, mask.b, mask.magnitude, mask.base) == (True, True, True, False)
    trained, frozen = partition(tree)
    assert trained["kernel"].magnitude is tree["kernel"].magnitude
    assert frozen["kernel"].magnitude is None
    assert combine(trained, frozen)["kernel"].magnitude is tree["kernel"].magnitude
    merged = merge(tree)["kernel"]
    expected = jq.quantize(tree["kernel"].dequantize(), CONFIG, 0)
    np.testing.assert_array_equal(merged.codes, expected.reorder(merged.order).codes)
    jq.save(tmp_path / "a.safetensors", tree)
    loaded = jq.load(tmp_path / "a.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert json.loads(file.metadata()["jaxquant"])["version"] == 5
    assert "magnitude" in repr(tree["kernel"])


def test_loops_and_lifted_functions():
    w = adapted("stack")
    x = jnp.asarray(normal(7, 32, seed=4))

    def by_scan(w, x):
        return jax.lax.scan(lambda c, w: (c, jq.matmul(x, w)), 0, w)[1]

    def plain(w, x):
        return jnp.einsum("mk,lkn->lmn", x, w)

    expected = plain(w.dequantize(), x)
    np.testing.assert_allclose(jax.jit(by_scan)(w, x), expected, rtol=1e-4, atol=1e-3)
    by_vmap = jax.jit(jax.vmap(jq.matmul, (None, 0)))(x, w)
    np.testing.assert_allclose(by_vmap, expected, rtol=1e-4, atol=1e-3)
    lifted = jax.jit(jq.lift(plain))(w, x)
    np.testing.assert_allclose(lifted, expected, rtol=1e-4, atol=1e-3)
    turned = jq.lift(lambda w, x: x @ w.T)
    of_rows = adapted("rows are outputs")
    np.testing.assert_allclose(
        jax.jit(turned)(of_rows, x), x @ of_rows.dequantize().T, rtol=1e-4, atol=1e-3
    )
    (row,) = jq.explain(turned, of_rows, x).dequantized
    assert "norms of its outputs" in row.why


def test_activations_that_are_quantized_raise():
    with pytest.raises(ValueError, match=r"use_dora multiplies.*for w, which quantizes them"):
        lora_init({"w": jnp.ones((32, 20))}, {"w": jq.W8A8}, 3, KEY, use_dora=True)
