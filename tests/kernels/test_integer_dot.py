import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.kernels import integer_dot

MATRICES = (((1,), (0,)), ((), ()))
# Name: (shapes, dimension numbers, einsum).
PRODUCTS = {
    "matrices": ((5, 7), (7, 6), MATRICES, "mk,kn->mn"),
    "columns first": ((5, 7), (6, 7), (((1,), (1,)), ((), ())), "mk,nk->mn"),
    "one row": ((1, 7), (7, 6), MATRICES, "mk,kn->mn"),
    "one column": ((5, 7), (7, 1), MATRICES, "mk,kn->mn"),
    "one element": ((1, 7), (7, 1), MATRICES, "mk,kn->mn"),
    "a vector on the left": ((7,), (7, 6), (((0,), (0,)), ((), ())), "k,kn->n"),
    "a vector on the right": ((5, 7), (7,), (((1,), (0,)), ((), ())), "mk,k->m"),
    "two vectors": ((7,), (7,), (((0,), (0,)), ((), ())), "k,k->"),
    "a vector and one column": ((7,), (7, 1), (((0,), (0,)), ((), ())), "k,kn->n"),
    "no contracted axis": ((5,), (6,), (((), ()), ((), ())), "m,n->mn"),
    "an empty sum": ((5, 0), (0, 6), MATRICES, "mk,kn->mn"),
    "an empty sum of one row": ((1, 0), (0, 6), MATRICES, "mk,kn->mn"),
    "no row": ((0, 7), (7, 6), MATRICES, "mk,kn->mn"),
    "batch": ((3, 5, 7), (3, 7, 6), (((2,), (1,)), ((0,), (0,))), "bmk,bkn->bmn"),
    "batch of rows": ((3, 1, 7), (3, 7, 6), (((2,), (1,)), ((0,), (0,))), "bmk,bkn->bmn"),
    "batch of columns": ((3, 5, 7), (3, 7, 1), (((2,), (1,)), ((0,), (0,))), "bmk,bkn->bmn"),
    "batch of vectors": ((3, 7), (3, 7), (((1,), (1,)), ((0,), (0,))), "bk,bk->b"),
    "two batches": ((2, 7, 3), (3, 2, 7, 6), (((1,), (2,)), ((2, 0), (0, 1))), "bka,abkn->abn"),
    "two free axes of one": ((1, 1, 7), (7, 6), (((2,), (0,)), ((), ())), "abk,kn->abn"),
    "one free axis of two": ((1, 4, 7), (7, 1, 6), (((2,), (0,)), ((), ())), "abk,kcd->abcd"),
    "free axes around": ((7, 1), (1, 7, 1), (((0,), (1,)), ((), ())), "ka,bkc->abc"),
}


def codes(shape, seed):
    return np.random.default_rng(seed).choice([-128, -127, -3, 0, 1, 127], shape).astype(np.int8)


def in_numpy(equation, lhs, rhs):
    return np.einsum(equation, lhs.astype(np.int64), rhs.astype(np.int64))


@pytest.mark.slow
def test_products_are_those_of_numpy_int64():
    operands = {case: (codes(p[0], 0), codes(p[1], 1)) for case, p in PRODUCTS.items()}

    @jax.jit
    def products(operands):
        return {case: integer_dot(x, y, PRODUCTS[case][2]) for case, (x, y) in operands.items()}

    for case, got in products(operands).items():
        want = in_numpy(PRODUCTS[case][3], *operands[case])
        np.testing.assert_array_equal(got, want.astype(np.int32), case, strict=True)


def test_products_of_any_small_size_are_exact():
    sizes = list(itertools.product((1, 2), (0, 1, 2, 17, 40), (1, 2)))
    operands = [(codes((m, k), 0), codes((k, n), 1)) for m, k, n in sizes]
    products = jax.jit(lambda pairs: [integer_dot(x, y, MATRICES) for x, y in pairs])
    for size, pair, got in zip(sizes, operands, products(operands), strict=True):
        np.testing.assert_array_equal(got, in_numpy("mk,kn->mn", *pair), str(size))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_longest_sums_of_the_largest_codes_are_exact(rows):
    length = 131071
    lhs, rhs = np.full((rows, length), -128, np.int8), np.full((length, 2), -128, np.int8)
    got = integer_dot(jnp.asarray(lhs), jnp.asarray(rhs), MATRICES)
    np.testing.assert_array_equal(got, np.full((rows, 2), 128 * 128 * length))


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_vmap_and_scan_are_exact(rows, columns):
    lhs, rhs = jnp.asarray(codes((4, rows, 9), 0)), jnp.asarray(codes((4, 9, columns), 1))
    want = in_numpy("bmk,bkn->bmn", np.asarray(lhs), np.asarray(rhs))
    run = partial(integer_dot, dimension_numbers=MATRICES)
    np.testing.assert_array_equal(jax.jit(jax.vmap(run))(lhs, rhs), want)
    in_scan = jax.lax.scan(lambda _, pair: (None, run(*pair)), None, (lhs, rhs))[1]
    np.testing.assert_array_equal(in_scan, want)
    shared = jax.jit(jax.vmap(run, in_axes=(0, None)))(lhs, rhs[0])
    np.testing.assert_array_equal(
        shared, in_numpy("bmk,kn->bmn", np.asarray(lhs), np.asarray(rhs[0]))
    )


def shapes_of_dots(platform, lhs, rhs):
    traced = jax.jit(partial(integer_dot, dimension_numbers=MATRICES)).trace(lhs, rhs)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r"dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>", text)


def test_a_cpu_gets_two_rows_on_the_right_and_others_one():
    row, column = codes((1, 7), 0), codes((7, 6), 1)
    assert shapes_of_dots("cpu", row, column) == [("7x6xi8", "2x7xi8", "6x2xi32")]
    for platform in ("tpu", "cuda"):
        assert shapes_of_dots(platform, row, column) == [("1x7xi8", "7x6xi8", "1x6xi32")]
    several = shapes_of_dots("cpu", codes((5, 7), 0), column)
    assert several == [("5x7xi8", "7x6xi8", "5x6xi32")]
    one_column = shapes_of_dots("cpu", codes((5, 7), 0), codes((7, 1), 1))
    assert one_column == [("5x7xi8", "7x2xi8", "5x2xi32")]
