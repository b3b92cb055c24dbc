"""Products with QTensors whose activations are rotated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import ArrayConfig, BlockRotation, Inputs

from .products import assert_product, conv, normal, values

M, K, N = 5, 48, 24
CONFIG = ArrayConfig(format=jq.INT4, group_size=16, symmetric=False)


def rotation(shape: tuple[int, ...] = (K,), block=24, seed=0) -> Any:
    signs = np.random.default_rng(seed).choice([-1, 1], shape).astype(np.int8)
    return BlockRotation(jnp.asarray(signs), block)


def rotated(inputs, shape=(K, N), axis=0, seed=3):
    """A weight that stores R^T W of W."""
    q = jq.quantize(normal(*shape, seed=seed), CONFIG, axis)
    return dataclasses.replace(q, inputs=inputs)


MULTIPLIER = np.linspace(0.5, 2, K, dtype=np.float32)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("order", [None, (-1, -2)], ids=str)
@pytest.mark.parametrize("multiplier", [None, MULTIPLIER], ids=["alone", "multiplied"])
@pytest.mark.parametrize("config", [None, ArrayConfig()], ids=["float", "int8"])
def test_activations_are_multiplied_then_rotated_then_quantized(multiplier, config, order):
    r, x = rotation(), normal(M, K)
    factors = None if multiplier is None else jnp.asarray(multiplier)
    q = rotated(Inputs(config, multiplier=factors, rotation=r)).reorder(order)
    seen = (x if multiplier is None else x * multiplier).astype(np.float64) @ r.matrix()
    if config is not None:
        seen = jq.quantize(seen.astype(np.float32), config, axis=-1)
    found = jax.jit(jq.matmul)(x, q)
    # A code on the border between two is rounded either way.
    assert_product(found, "mk,kn->mn", seen, q, tolerance=2e-6 if config is None else 1e-3)
    gradient = jax.grad(lambda x: jq.matmul(x, q).sum())(x)
    factors = np.ones(K) if multiplier is None else multiplier
    want = r.matrix() @ values(q).sum(1) * factors
    np.testing.assert_allclose(gradient, np.broadcast_to(want, (M, K)), rtol=1e-3, atol=2e-4)


def test_a_rotated_weight_gives_the_product_of_the_given_one():
    r, x, w = rotation(), normal(M, K), normal(K, N, seed=4)
    stored = r.apply(jnp.asarray(w), (0,))
    q = jq.quantize(stored, ArrayConfig(), axis=0)
    found = jq.matmul(x, dataclasses.replace(q, inputs=Inputs(rotation=r)))
    want = x.astype(np.float64) @ w
    assert np.abs(found - want).max() < 0.02 * np.abs(want).max()
    np.testing.assert_allclose(r.matrix().T @ w, stored, 0, 1e-5)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("equation", ["mhd,hdn->mn", "mhd,dhn->mn", "mhd,hnd->mn"])
def test_several_contracted_axes_are_flattened_in_the_order_of_the_weight(equation):
    sizes = {"m": M, "h": 6, "d": 8, "n": N}
    rhs = equation.split("->")[0].split(",")[1]
    contracted = [c for c in rhs if c in "hd"]
    lengths: Any = tuple(sizes[c] for c in contracted)
    r, x = rotation(lengths), normal(M, 6, 8)
    shape = tuple(sizes[c] for c in rhs)
    config = ArrayConfig(symmetric=False)
    q = jq.quantize(normal(*shape, seed=5), config, tuple(rhs.index(c) for c in contracted))
    rows = np.einsum(f"mhd->m{''.join(contracted)}", x).reshape(M, -1).astype(np.float64)
    seen = (rows @ r.matrix()).reshape(M, *lengths)
    found = jq.einsum(equation, x, dataclasses.replace(q, inputs=Inputs(rotation=r)))
    assert_product(found, f"m{''.join(contracted)},{rhs}->mn", seen, q)


def stacked():
    layers = [rotated(Inputs(rotation=rotation(seed=s)), seed=s) for s in range(3)]
    return layers, jax.tree.map(lambda *x: jnp.stack(x), *layers)


def test_layers_are_mapped_scanned_and_lifted_with_their_rotations():
    layers, q = stacked()
    x = normal(3, M, K)
    want = [jq.matmul(row, layer) for row, layer in zip(x, layers, strict=True)]
    np.testing.assert_allclose(jax.vmap(jq.matmul)(x, q), want, rtol=1e-5, atol=1e-4)
    _, found = jq.scan(lambda c, both: (c, jq.matmul(both[0], both[1])), 0, (x, q))
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-4)
    scanned = jq.lift(lambda w: jax.lax.scan(lambda c, b: (c, b[0] @ b[1]), 0, (x, w))[1])
    np.testing.assert_allclose(scanned(q), want, rtol=1e-5, atol=1e-4)


def test_a_lifted_scan_repeats_a_rotation_that_all_layers_share():
    layers, q = stacked()
    shared = layers[0].inputs
    x = normal(M, K)
    q = dataclasses.replace(q, inputs=shared)
    scanned = jq.lift(lambda w: jax.lax.scan(lambda c, w: (c, x @ w), 0, w)[1])(q)
    want = [jq.matmul(x, dataclasses.replace(layer, inputs=shared)) for layer in layers]
    np.testing.assert_allclose(scanned, want, rtol=1e-5, atol=1e-4)


def test_convolutions_rotate_their_input_channels():
    image, kernel = normal(2, 5, 7, 12), normal(2, 2, 12, 8, seed=6)
    r = rotation((12,), 12)
    q = jq.quantize(kernel, ArrayConfig(), axis=(0, 1, 2))
    found = jq.conv_general_dilated(
        image,
        dataclasses.replace(q, inputs=Inputs(rotation=r)),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    want = conv(image.astype(np.float64) @ r.matrix(), values(q), (1, 1), ((0, 1), (0, 1)))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)


def test_ragged_products_rotate_each_row():
    layers, q = stacked()
    inputs: Any = layers[0].inputs
    r = inputs.rotation
    x, sizes = normal(M, K), np.array([2, 0, 3], np.int32)
    q = dataclasses.replace(q, inputs=Inputs(rotation=r))
    found = jq.ragged_dot(x, q, jnp.asarray(sizes))
    seen = x.astype(np.float64) @ r.matrix()
    want = np.concatenate([seen[:2] @ values(layers[0]), seen[2:] @ values(layers[2])])
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)


def test_rotations_that_cannot_be_applied_are_errors():
    q = rotated(Inputs(rotation=rotation()))
    with pytest.raises(
        ValueError, match=r"inputs\.rotation cannot be applied to an operand that is"
    ):
        jq.matmul(jq.quantize(normal(M, K), ArrayConfig(), axis=-1), q)
    other = rotated(Inputs(rotation=rotation((12,), 12)))
    with pytest.raises(ValueError, match=r"contracted axes, \(48,\); got \(12,\) for axes \(1,\)"):
        jq.matmul(normal(M, K), other)


def test_quantized_activations_gain_from_a_rotation_that_spreads_outliers():
    x, w = normal(64, K, center=0), normal(K, N, seed=7)
    x[:, 5] *= 50
    r, config = rotation(), ArrayConfig(format=jq.INT4)
    want, errors = x.astype(np.float64) @ w, {}
    for name, inputs, stored in (
        ("plain", Inputs(config), w),
        ("rotated", Inputs(config, rotation=r), r.apply(jnp.asarray(w), (0,))),
    ):
        q = dataclasses.replace(jq.quantize(stored, ArrayConfig(), axis=0), inputs=inputs)
        errors[name] = np.square(jq.matmul(x, q) - want).mean()
    assert errors["rotated"] < 0.7 * errors["plain"]


def test_descriptions_name_the_rotation():
    plain = rotated(Inputs(rotation=rotation()))
    assert jq.tree.describe(plain) == "int4 g16 asymmetric, inputs rotated in blocks of 24"
    both = rotated(Inputs(ArrayConfig(), rotation=rotation()))
    assert jq.tree.describe(both) == "int4 g16 asymmetric, int8 inputs rotated in blocks of 24"
    ((row),) = jq.explain(jq.matmul, normal(M, K), both).rows
    assert row.implementation


def test_one_program_per_block_and_exports_keep_it():
    matmul: Any = jax.jit(lambda x, q: jq.matmul(x, q))
    for seed in (1, 2):
        matmul(normal(M, K), rotated(Inputs(rotation=rotation(seed=seed))))
    assert matmul._cache_size() == 1
    q, x = rotated(Inputs(rotation=rotation())), jnp.asarray(normal(M, K))
    exported = jax.export.deserialize(jax.export.export(matmul)(x, q).serialize())
    np.testing.assert_array_equal(exported.call(x, q), matmul(x, q))
