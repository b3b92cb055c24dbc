import dataclasses
import functools
import itertools
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    FP8_E4M3,
    INT4,
    INT8,
    NVFP4,
    ArrayConfig,
    Inputs,
    QTensor,
    dot_general,
    matmul,
    quantize,
)

from .. import oracles
from ..cases import Case
from .products import (
    FEW,
    INPUTS,
    ORDERS,
    WEIGHTS,
    K,
    M,
    N,
    assert_product,
    normal,
    quantized,
    weight,
    with_inputs,
    with_unit_scale,
)

MATRICES = (((1,), (0,)), ((), ()))


TURNED = ("float", "int8", "int8-asym")


@functools.cache
def inputs() -> dict[str, Any]:
    x = normal(M, K)
    return {n: x if c is None else quantized(x, c, axis=-1) for n, c in INPUTS.items()}


@jax.jit
def every_mixture(inputs, q):
    """Products of one weight, in both orders of storage, with each kind of other operand."""
    stored = [q.reorder(order) for order in ORDERS]
    right = {
        n: [dot_general(a, w, MATRICES) for w in stored[: 1 + (n in TURNED)]]
        for n, a in inputs.items()
    }
    columns = (((0,), (1,)), ((), ()))
    left = {n: dot_general(stored[1], a, columns) for n, a in inputs.items() if n in TURNED[::2]}
    return right, left


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_mixture_of_formats_and_orders_matches_numpy(name):
    q = weight(WEIGHTS[name])
    met = {n: x for n, x in inputs().items() if name in FEW or n in ("float", "int8")}

    right, left = every_mixture(met, q)

    for kind, x in met.items():
        for out in right[kind]:
            assert_product(out, "mk,kn->mn", x, q)
    for kind, out in left.items():
        assert_product(out, "kn,mk->nm", q, met[kind])


matrix_product = jax.jit(partial(dot_general, dimension_numbers=MATRICES))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", FEW)
def test_one_row_matches_numpy(name):
    q, x = weight(WEIGHTS[name]), normal(1, K)
    assert_product(matrix_product(x, q), "mk,kn->mn", x, q)


def test_one_column_matches_numpy():
    rows, column = inputs()["int8"], weight(ArrayConfig(), (K, 1))
    assert_product(matrix_product(rows, column), "mk,kn->mn", rows, column)


BATCHED = {
    "none": ((4,), (4, 6), "k,kn->n", (((0,), (0,)), ((), ()))),
    "vectors": ((4,), (4,), "k,k->", (((0,), (0,)), ((), ()))),
    "outer": ((3,), (4,), "m,n->mn", (((), ()), ((), ()))),
    "one": ((3, 5, 4), (3, 4, 6), "bmk,bkn->bmn", (((2,), (1,)), ((0,), (0,)))),
    "vectors in a batch": ((3, 4), (3, 4), "bk,bk->b", (((1,), (1,)), ((0,), (0,)))),
    "two, crossed": (
        (2, 5, 3, 4),
        (3, 4, 2, 6),
        "abcd,cdaf->acbf",
        (((3,), (1,)), ((0, 2), (2, 0))),
    ),
    "two contracted": ((5, 4, 3), (3, 4, 6), "mkj,jkn->mn", (((1, 2), (1, 0)), ((), ()))),
    "two free": ((2, 4, 5), (3, 4, 6), "akb,ckd->abcd", (((1,), (1,)), ((), ()))),
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("case", BATCHED)
def test_any_dimension_numbers_match_numpy(case):
    lhs_shape, rhs_shape, equation, numbers = BATCHED[case]
    left, right = numbers[0]
    x, w = normal(*lhs_shape), normal(*rhs_shape)
    lhs = [x, quantized(x, ArrayConfig(symmetric=False), left)]
    rhs = [w, quantized(w, ArrayConfig(symmetric=False), right)]

    pairs = [*itertools.product(lhs, rhs)]
    pairs += [(quantized(x, ArrayConfig(), left), quantized(w, ArrayConfig(), right))]
    products = jax.jit(lambda pairs: [dot_general(a, b, numbers) for a, b in pairs])
    for got, (a, b) in zip(products(pairs), pairs, strict=True):
        assert_product(got, equation, a, b)


def test_stored_order_changes_nothing():
    x, w = normal(4, 2, 5), normal(3, 4, 6, seed=1)
    q = quantized(w, ArrayConfig(symmetric=False), axis=1)
    lhs = [x, quantized(x, ArrayConfig())]
    numbers = (((0,), (1,)), ((), ()))
    orders = list(itertools.permutations((-3, -2, -1)))

    @jax.jit
    def products(x, left, q):
        turned = [(left.reorder(order), q.reorder(order)) for order in orders]
        return [[dot_general(a, b, numbers) for a in (x, left)] for left, b in turned]

    for pair in products(*lhs, q):
        for got, a in zip(pair, lhs, strict=True):
            assert_product(got, "kab,ckd->abcd", a, q)


# (M, K, N): one row, one column, odd and empty sums.
EXACT = [(1, 7, 1), (1, 33, 5), (4, 1, 3), (3, 0, 2), (5, 129, 1), (2, 1040, 6)]


def codes_at_the_ends(shape, seed):
    codes = np.random.default_rng(seed).choice([-128, -127, -1, 0, 1, 127], shape)
    return codes.astype(np.int8)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("shape", EXACT, ids=str)
def test_int8_products_are_those_of_numpy_int64_in_every_transformation(shape):
    m, k, n = shape
    lhs, rhs = codes_at_the_ends((2, m, k), 0), codes_at_the_ends((2, k, n), 1)
    want = lhs.astype(np.int64) @ rhs.astype(np.int64)
    assert np.abs(want).max(initial=0) < 2**24, "float32 holds every result"

    def product(a, b):
        return dot_general(with_unit_scale(a), with_unit_scale(b), MATRICES)

    @jax.jit
    def transformed(lhs, rhs):
        return {
            "alone": jnp.stack([product(a, b) for a, b in zip(lhs, rhs, strict=True)]),
            "vmap": jax.vmap(product)(lhs, rhs),
            "scan": jax.lax.scan(lambda _, x: (None, product(*x)), None, (lhs, rhs))[1],
        }

    for name, got in transformed(lhs, rhs).items():
        np.testing.assert_array_equal(got, want, err_msg=name)
    if shape == (5, 129, 1):
        np.testing.assert_array_equal(product(lhs[0], rhs[0]), want[0], err_msg="eager")


integer_product = jax.jit(
    partial(dot_general, dimension_numbers=MATRICES, implementation="integer")
)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("rhs_zero", [None, -127, 3])
@pytest.mark.parametrize("lhs_zero", [None, -128, 5, 127])
def test_zero_points_on_either_side_are_exact(lhs_zero, rhs_zero):
    zeros = lhs_zero, rhs_zero
    codes = codes_at_the_ends((3, 40), 0), codes_at_the_ends((40, 2), 1)
    whole = [c.astype(np.int64) - (z or 0) for c, z in zip(codes, zeros, strict=True)]

    lhs, rhs = (with_unit_scale(c, z) for c, z in zip(codes, zeros, strict=True))
    got = integer_product(lhs, rhs)

    np.testing.assert_array_equal(got, whole[0] @ whole[1])


# (elements, zero point of lhs, of rhs): the longest sums that int32 surely holds, and one more.
LENGTHS = [(131071, None, None), (65793, 127, None), (65793, None, 127), (33025, 127, 127)]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("length, lhs_zero, rhs_zero", LENGTHS)
def test_sums_that_may_leave_int32_are_not_computed_as_integers(length, lhs_zero, rhs_zero):
    def product(length, implementation):
        lhs = with_unit_scale(np.full((2, length), -128, np.int8), lhs_zero)
        rhs = with_unit_scale(np.full((length, 2), -128, np.int8), rhs_zero)
        got = dot_general(lhs, rhs, MATRICES, implementation=implementation)
        want = length * (128 + (lhs_zero or 0)) * (128 + (rhs_zero or 0))
        # Float sums of so many terms are good to four digits only.
        np.testing.assert_allclose(got, want, rtol=1e-6 if implementation else 1e-4)

    product(length, "integer")
    with pytest.raises(ValueError, match=f"sums of {length + 1} codes may leave int32"):
        product(length + 1, "integer")
    product(length + 1, None)


DTYPES = ["float32", "bfloat16", "float16"]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("lhs_dtype, rhs_dtype", list(itertools.product(DTYPES, DTYPES)))
def test_the_result_has_the_dtype_that_jnp_gives(lhs_dtype, rhs_dtype):
    x, q = inputs()["int8"].astype(lhs_dtype), weight(ArrayConfig()).astype(rhs_dtype)

    with jax.numpy_dtype_promotion("standard"):
        wanted = jax.eval_shape(lambda: jnp.matmul(x.dequantize(), q.dequantize())).dtype
        names = ("integer", "dequantize")
        products = jax.jit(lambda x, q: [matmul(x, q, implementation=name) for name in names])
        results = products(x, q)
    # What an operand dequantizes to is rounded to its dtype, unless its codes are multiplied.
    eps = max(float(jnp.finfo(dtype).eps) for dtype in (lhs_dtype, rhs_dtype))
    for got in results:
        assert got.dtype == wanted
        assert_product(got, "mk,kn->mn", x, q, tolerance=2e-6 + eps)

    preferred = jax.eval_shape(
        lambda: matmul(x, q.astype(lhs_dtype), preferred_element_type="float32")
    )
    assert preferred.dtype == np.float32


def test_dtypes_mix_only_as_far_as_jnp_mixes_them():
    q = weight(WEIGHTS["int8"])
    x = jnp.asarray(normal(M, K), jnp.bfloat16)

    for product in (lambda: jnp.matmul(x, q.dequantize()), lambda: matmul(x, q)):
        with pytest.raises(jax.dtypes.TypePromotionError, match="no available implicit dtype"):
            product()


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("inputs", ["float", "int8"])
@pytest.mark.parametrize("name", ["int8", "int4-g32"])
def test_bfloat16_operands_round_the_result_once(name, inputs):
    x = jnp.asarray(normal(M, K), jnp.bfloat16)
    x = x if INPUTS[inputs] is None else quantized(x, INPUTS[inputs], axis=-1)
    q = weight(WEIGHTS[name]).astype(jnp.bfloat16)

    got = matmul(x, q, preferred_element_type=jnp.float32)

    assert got.dtype == jnp.float32
    # Dequantized to bfloat16, each weight is rounded, unless the codes are multiplied.
    assert_product(got, "mk,kn->mn", x, q, tolerance=2.0**-8)
    assert matmul(x, q).dtype == jnp.bfloat16


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = jnp.asarray(normal(M, K, dtype=np.float64))
        config = ArrayConfig(scale_dtype="float64")
        q, inputs = quantized(normal(K, N, dtype=np.float64), config), quantized(x, config, axis=1)
        for operand in (x, inputs):
            got = matmul(operand, q)
            assert got.dtype == np.float64
            assert_product(got, "mk,kn->mn", operand, q, tolerance=1e-14)


def test_the_preferred_dtype_must_be_floating():
    with pytest.raises(ValueError, match=r"must be a floating-point dtype.* got .*int32"):
        matmul(normal(M, K), weight(WEIGHTS["int8"]), preferred_element_type=jnp.int32)


def test_precision_reaches_the_float_product_and_not_the_integer_one():
    x, q = normal(M, K), weight(WEIGHTS["fp8_e4m3"])
    highest = partial(matmul, precision=jax.lax.Precision.HIGHEST)

    assert "precision = [HIGHEST, HIGHEST]" in jax.jit(highest).lower(x, q).as_text()
    assert "HIGHEST" not in jax.jit(matmul).lower(x, q).as_text()
    assert_product(highest(x, q), "mk,kn->mn", x, q)
    integer = quantized(x, INPUTS["int8"], axis=-1), weight(WEIGHTS["int8"])
    assert_product(highest(*integer), "mk,kn->mn", *integer)


def dots(lowered):
    """(lhs, rhs, result) element types of each dot_general in the StableHLO text."""
    tensor = r"tensor<(?:\d+x)*(\w+)>"
    pattern = rf"dot_general .*: \({tensor}, {tensor}\) -> {tensor}"
    return re.findall(pattern, lowered.as_text())


@pytest.mark.some_rows(6)
@pytest.mark.parametrize("rows", [1, M])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("name", ["int8", "int8-asym", "int4", "int8-tensor", "int8-columns"])
def test_integer_codes_are_multiplied_as_integers_everywhere(name, platform, rows):
    x, q = normal(rows, K), weight(WEIGHTS[name]).reorder((-1, -2))
    cases = [
        (quantized(x, INPUTS["int8"], axis=-1), q),
        (x, with_inputs(q, Inputs(INPUTS["int8"]))),
    ]
    for operands in cases:
        lowered = jax.jit(matmul).trace(*operands).lower(lowering_platforms=(platform,))
        assert dots(lowered) == [("i8", "i8", "i32")]


def test_weights_alone_are_multiplied_as_floats():
    lowered = jax.jit(matmul).lower(normal(M, K), weight(WEIGHTS["int8"]))
    assert dots(lowered) == [("f32", "f32", "f32")]


# 512 columns are cut into blocks; 600 leave a rest.
WIDE = {
    "int4-g32": ArrayConfig(format=INT4, group_size=32),
    "int4": ArrayConfig(format=INT4),
    "int8": ArrayConfig(),
    "asym blocks": Case(ArrayConfig(group_size=(32, 4), symmetric=False), (0, 1)),
    "tensor": ArrayConfig(per_tensor=True),
    "nvfp4": ArrayConfig(format=NVFP4),
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "name, columns", [(name, 512) for name in WIDE] + [("asym blocks", 600), ("int8", 600)]
)
def test_blocks_of_columns_match_numpy(name, columns):
    q = weight(WIDE[name], (K, columns)).reorder((-1, -2))
    x = normal(3, 2, K)
    inputs = quantized(x, ArrayConfig(), axis=-1)

    @jax.jit
    def both(x, inputs, q):
        numbers = (((2,), (0,)), ((), ()))
        run = partial(dot_general, dimension_numbers=numbers, implementation="blocks")
        return run(x, q), run(inputs, q) if q.format.bits < 8 or q.scale.shape[1] > 1 else None

    got, of_inputs = both(x, inputs, q)
    assert_product(got, "abk,kn->abn", x, q)
    if of_inputs is not None:
        assert_product(of_inputs, "abk,kn->abn", inputs, q)


@pytest.mark.parametrize("name", ["int4-g32", "int8", "nvfp4"])
def test_on_cpu_few_rows_by_many_columns_write_no_whole_float_matrix(name):
    q = weight(WIDE[name], (K, 512)).reorder((-1, -2))
    x = normal(2, K)
    whole = re.compile(r"(?:f32|bf16)\[(?:512,64|64,512|512,2,32|512,4,16)\]")

    def text(implementation=None):
        f = jax.jit(partial(matmul, implementation=implementation))
        return str(f.lower(x, q).compile().as_text())

    assert not whole.findall(text())
    assert whole.findall(text("dequantize"))


FLOORS = [
    (ArrayConfig(), ArrayConfig(), 37.0),
    (ArrayConfig(format=INT4, group_size=128), ArrayConfig(), 17.8),
    (ArrayConfig(format=FP8_E4M3), ArrayConfig(format=FP8_E4M3), 28.0),
    (ArrayConfig(format=NVFP4), ArrayConfig(format=NVFP4), 16.8),
]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("weights, inputs, floor", FLOORS)
def test_signal_to_noise_of_a_gaussian_product_is_above_its_floor(weights, inputs, floor):
    random = np.random.default_rng(0)
    x = random.normal(size=(64, 1024)).astype(np.float32)
    w = random.normal(size=(1024, 256)).astype(np.float32)
    q = with_inputs(quantize(w, weights), Inputs(inputs))

    got = matmul(x, q)

    ratio = oracles.sqnr(x.astype(np.float64) @ w.astype(np.float64), got)
    assert floor < ratio < floor + 3, "a product far above its floor is not quantized"


def test_plain_arrays_go_to_lax_unchanged():
    x, w = normal(M, K), normal(K, N, seed=1)
    got = dot_general(x, w, MATRICES, None, jnp.float32)
    np.testing.assert_array_equal(got, jax.lax.dot_general(x, w, MATRICES))
    codes = with_unit_scale(np.ones((2, 3), np.int8)).codes
    assert dot_general(codes, codes.T, MATRICES, None, jnp.int32).dtype == jnp.int32


def test_shapes_that_do_not_fit_raise_as_in_lax():
    q: QTensor = weight(WEIGHTS["int8"])
    for x in (normal(M, K + 1), quantized(normal(1, K + 1), ArrayConfig(), axis=1)):
        with pytest.raises(TypeError, match="contracting dimensions to have the same shape"):
            dot_general(x, q, MATRICES)
    assert q.format == INT8


def test_floating_point_zero_points_are_not_truncated():
    x, q = quantized(normal(M, K), INPUTS["int8"], axis=-1), weight(WEIGHTS["int8"])
    zero = jnp.full(q.scale.shape, 7.5, jnp.float32)
    q = dataclasses.replace(q, zero_point=zero)
    for implementation in (None, "dequantize"):
        assert_product(matmul(x, q, implementation=implementation), "mk,kn->mn", x, q)
    with pytest.raises(ValueError, match="zero points of float32 are not integers"):
        matmul(x, q, implementation="integer")
    x, q = dataclasses.replace(x, zero_point=x.scale), weight(WEIGHTS["int8"])
    assert_product(matmul(x, q), "mk,kn->mn", x, q)
