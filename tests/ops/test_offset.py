"""Products with QTensors that have an offset: x ~ (codes - zero_point) * scale + offset."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import FILE_FORMATS, INT8, ArrayConfig, Inputs, QTensor
from jaxquant.kernels import cpu

from .products import assert_close, assert_product, normal, values

M, K, N = 5, 64, 24
UINT4, UINT6 = FILE_FORMATS["uint4"], FILE_FORMATS["uint6"]


def nested(counts, outer, sign, seed):
    """6-bit scales or offsets under one float16 per 32 rows, as in K-quants."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 64, counts).astype(np.uint8)
    top = sign * random.uniform(0.001, 0.01, outer).astype(np.float16)
    return QTensor(jnp.asarray(codes), jnp.asarray(top), format=UINT6, dtype=jnp.float32)


def offset_array(kind, shape=(K, N), seed=3) -> Any:
    """A QTensor with an offset; its groups lie along axis 0."""
    random = np.random.default_rng(seed)
    counts = {"rows": (1, shape[1]), "tensor": (1, 1)}.get(kind, (shape[0] // 16, shape[1]))
    format, high = (INT8, 120) if kind in ("rows", "tensor") else (UINT4, 16)
    codes = jnp.asarray(random.integers(0, high, shape), format.dtype)
    scale = jnp.asarray(random.uniform(0.05, 0.1, counts), jnp.float16)
    offset = jnp.asarray(-random.uniform(0.2, 1.5, counts), jnp.float16)
    if kind == "nested":
        outer = counts[0] // 2, counts[1]
        scale, offset = nested(counts, outer, 1, 4), nested(counts, outer, -1, 5)
    zero = jnp.full(counts, 3, format.dtype) if kind == "zero point" else None
    return QTensor(codes, scale, zero, offset, format=format, dtype=jnp.float32)


KINDS = ("groups", "nested", "rows", "tensor", "zero point")
each_kind = pytest.mark.parametrize("kind", KINDS)
ORDERS = (None, (-1, -2))
each_order = pytest.mark.parametrize("order", ORDERS, ids=str)


dequantize = jax.jit(QTensor.dequantize)


@pytest.mark.some_rows(2)
@each_kind
@each_order
def test_dequantizing_adds_the_offset(kind, order):
    q = offset_array(kind).reorder(order)
    found = dequantize(q)
    np.testing.assert_allclose(found, values(q), rtol=1e-6, atol=1e-7)
    bfloat16 = dequantize(q.astype(jnp.bfloat16))
    np.testing.assert_array_equal(bfloat16, np.asarray(found).astype(jnp.bfloat16))


def test_dequantizing_adds_the_offset_in_eager_calls():
    q = offset_array("nested")
    np.testing.assert_allclose(q.dequantize(), values(q), rtol=1e-6, atol=1e-7)
    bfloat16 = q.astype(jnp.bfloat16).dequantize()
    np.testing.assert_array_equal(bfloat16, q.dequantize().astype(jnp.bfloat16))


def test_nan_and_infinite_offsets_make_their_group_nan():
    q = offset_array("groups")
    offset = q.offset.at[1, 2].set(jnp.inf).at[0, 3].set(jnp.nan)
    found = np.asarray(dataclasses.replace(q, offset=offset).dequantize())
    is_nan = np.zeros((K, N), bool)
    is_nan[16:32, 2] = is_nan[:16, 3] = True
    np.testing.assert_array_equal(np.isnan(found), is_nan)


@functools.cache
def inputs() -> dict[str, Any]:
    return {"float": normal(M, K), "int8": jq.quantize(normal(M, K), ArrayConfig(), axis=-1)}


PRODUCTS = list(itertools.product(KINDS, ORDERS, ("float", "int8")))


@functools.cache
def results_of_products():
    """Those of every kind, order and input, in one program."""

    @jax.jit
    def run(weights, inputs):
        return [
            [jq.matmul(inputs[name], q, implementation=i) for i in (None, "dequantize")]
            for (*_, name), q in zip(PRODUCTS, weights, strict=True)
        ]

    weights = [offset_array(kind).reorder(order) for kind, order, _ in PRODUCTS]
    return dict(zip(PRODUCTS, run(weights, inputs()), strict=True))


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_add_the_offset(case):
    kind, order, name = case
    q = offset_array(kind).reorder(order)
    for found in results_of_products()[case]:
        assert_product(found, "mk,kn->mn", inputs()[name], q)


@pytest.mark.some_rows(2)
@pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels")
@pytest.mark.parametrize("shape", [(256, 512), (256, 128)], ids=str)
@pytest.mark.parametrize("inputs", [None, ArrayConfig()], ids=["float", "int8"])
def test_native_kernels_multiply_without_the_offset(shape, inputs):
    q = offset_array("groups", shape).reorder((-1, -2))
    q = dataclasses.replace(q, scale=q.scale[:, ::8], offset=q.offset[:, ::8])
    x = normal(M, shape[0])
    if inputs is not None:
        x = jq.quantize(x, inputs, axis=-1)
    found = jq.matmul(x, q, implementation="native")
    assert_product(found, "mk,kn->mn", x, q)


def test_integers_are_multiplied_without_the_offset():
    q = offset_array("rows")
    x = jq.quantize(normal(M, K), ArrayConfig(), axis=-1)
    rows = jq.explain(jq.matmul, x, q).rows
    assert [row.implementation for row in rows] == ["integer"]
    assert_product(jq.matmul(x, q, implementation="integer"), "mk,kn->mn", x, q)


def test_results_of_16_bits_are_rounded_once():
    q, x = offset_array("rows").astype(jnp.bfloat16), normal(M, K, dtype=jnp.bfloat16)
    found = jq.matmul(jq.quantize(x, ArrayConfig(), axis=-1), q)
    assert found.dtype == jnp.bfloat16
    full = jq.matmul(jq.quantize(x, ArrayConfig(), axis=-1), q, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(found, full.astype(jnp.bfloat16))


def test_both_operands_may_have_an_offset():
    lhs, rhs = offset_array("rows", (8, K), seed=8), offset_array("groups")
    assert_product(jq.matmul(lhs, rhs), "mk,kn->mn", lhs, rhs)
    turned = dataclasses.replace(offset_array("rows", (K, 8)), order=(-1, -2))
    right = offset_array("rows")
    assert_product(jq.matmul(turned, right, implementation="scaled"), "mk,kn->mn", turned, right)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bmk,bkn->bmn", (3, M, K)),
        ("mk,bkn->bnm", (M, K)),
        ("abk,bkc->abc", (2, 3, K)),
        ("abk,kc->abc", (2, 3, K)),
    ],
)
def test_einsum_adds_the_offset(equation, shape):
    x = normal(*shape)
    for kind, implementation in (("groups", None), ("rows", None), ("rows", "scaled")):
        layers = [offset_array(kind, seed=s) for s in range(3)]
        q = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        q = q if "b" in equation.partition("->")[0].split(",")[1] else layers[0]
        assert_product(jq.einsum(equation, x, q, implementation=implementation), equation, x, q)


def test_a_contraction_of_two_axes_adds_the_offset():
    q = offset_array("rows", (K, N))
    q = jax.tree.map(lambda x: x.reshape(4 if len(x) == K else 1, -1, N), q)
    found = jq.einsum("mab,abn->mn", normal(M, 4, 16), q, implementation="scaled")
    assert_product(found, "mab,abn->mn", normal(M, 4, 16), q)


@each_kind
def test_rows_are_looked_up_with_their_offset(kind):
    q = offset_array(kind)
    index = jnp.array([0, 17, 63, -1])
    want = values(q)[np.asarray(index)]
    np.testing.assert_allclose(jq.take(q, index, axis=0), want, rtol=1e-6, atol=1e-7)


def test_convolutions_and_ragged_products_dequantize_the_offset():
    q = offset_array("rows", (K, N))
    kernel = dataclasses.replace(
        q,
        codes=q.codes.reshape(2, 2, 16, N),
        scale=q.scale.reshape(1, 1, 1, N),
        offset=q.offset.reshape(1, 1, 1, N),
        inputs=Inputs(ArrayConfig()),
    )
    images = jq.quantize(normal(1, 6, 6, 16), ArrayConfig(), axis=(1, 2, 3))
    numbers = ("NHWC", "HWIO", "NHWC")
    found = jq.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=numbers)
    want = jax.lax.conv_general_dilated(
        jnp.asarray(values(images), jnp.float32),
        jnp.asarray(values(kernel), jnp.float32),
        (1, 1),
        "VALID",
        dimension_numbers=numbers,
    )
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-3)
    experts = jax.tree.map(lambda x: jnp.stack([x, x]), q)
    x = jq.quantize(normal(M, K), ArrayConfig(), axis=-1)
    assert_close(
        jq.ragged_dot(x, experts, jnp.array([2, 3])),
        values(x) @ values(q),
        np.abs(values(x)) @ np.abs(values(q)),
    )


def test_gradients_are_those_of_the_dequantized_product():
    q, x = offset_array("groups"), jnp.asarray(normal(M, K))

    def loss(x, scale, offset, product):
        return jnp.sum(jnp.sin(product(x, dataclasses.replace(q, scale=scale, offset=offset))))

    def by_hand(x, w):
        return x @ w.dequantize()

    floats = q.scale.astype(jnp.float32), q.offset.astype(jnp.float32)
    found = jax.grad(loss, (0, 1, 2))(x, *floats, jq.matmul)
    want = jax.grad(loss, (0, 1, 2))(x, *floats, by_hand)
    for got, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)


def test_layers_are_scanned_and_mapped_with_their_offset():
    layers = [offset_array("nested", (K, K), seed=s) for s in range(3)]
    q = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    x = normal(3, M, K)
    found = jax.vmap(jq.matmul)(x, q)
    for got, row, layer in zip(found, x, layers, strict=True):
        assert_product(got, "mk,kn->mn", row, layer)
    _, scanned = jq.scan(lambda c, layer: (c, jq.matmul(x[0], layer)), 0, q)
    for got, layer in zip(scanned, layers, strict=True):
        assert_product(got, "mk,kn->mn", x[0], layer)


def test_one_program_per_config():
    matmul: Any = jax.jit(lambda x, q: jq.matmul(x, q))
    for seed in (1, 2):
        matmul(normal(M, K, seed=seed), offset_array("groups", seed=seed))
    assert matmul._cache_size() == 1


PERMUTATION = np.random.default_rng(0).permutation(K)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("multiplier", [None, jnp.linspace(0.5, 2, K)], ids=["alone", "multiplied"])
@pytest.mark.parametrize("config", [None, ArrayConfig()], ids=["float", "int8"])
def test_activations_are_permuted_then_multiplied_then_quantized(multiplier, config):
    q = jq.quantize(normal(K, N), ArrayConfig(group_size=16), axis=0)
    inputs = Inputs(config, multiplier=multiplier, permutation=jnp.asarray(PERMUTATION, jnp.int32))
    x = normal(M, K)
    seen = x[:, PERMUTATION] * (1 if multiplier is None else np.asarray(multiplier))
    seen = seen if config is None else jq.quantize(seen, config, axis=-1)
    found = jax.jit(jq.matmul)(x, dataclasses.replace(q, inputs=inputs))
    assert_product(found, "mk,kn->mn", seen, q, tolerance=2e-5)
    gradient = jax.grad(lambda x: jq.matmul(x, dataclasses.replace(q, inputs=inputs)).sum())(x)
    factors = np.ones(K) if multiplier is None else np.asarray(multiplier)
    want = np.zeros(K)
    want[PERMUTATION] = values(q).sum(1) * factors
    np.testing.assert_allclose(gradient, np.broadcast_to(want, (M, K)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "permutation", "text"),
    [
        (normal(M, K), np.arange(3), r"inputs.permutation .* got \(3,\) for axes \(1,\)"),
        (
            jq.quantize(normal(M, K), ArrayConfig(), axis=-1),
            PERMUTATION,
            "inputs.permutation cannot be applied to an operand that is quantized already",
        ),
    ],
    ids=["length", "quantized"],
)
def test_permutations_that_cannot_be_applied_are_errors(x, permutation, text):
    q = jq.quantize(normal(K, N), ArrayConfig(), axis=0)
    q = dataclasses.replace(q, inputs=Inputs(permutation=jnp.asarray(permutation)))
    with pytest.raises(ValueError, match=text):
        jq.matmul(x, q)
