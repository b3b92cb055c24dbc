import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import INT4, ArrayConfig, Inputs, einsum, matmul, quantize

from .products import assert_product, normal, quantized, values, weight, with_inputs

# (subscripts, shape of the float operand, of the weight, axes that the weight contracts).
EQUATIONS = {
    "dense": ("mk,kn->mn", (5, 8), (8, 6), 0),
    "output turned": ("mk,kn->nm", (5, 8), (8, 6), 0),
    "no arrow": ("mk,kn", (5, 8), (8, 6), 0),
    "no arrow, not in order": ("zk,ka", (5, 8), (8, 6), 0),
    "capitals and spaces": ("Mk, kN -> MN", (5, 8), (8, 6), 0),
    "heads": ("btd,dhk->bthk", (2, 3, 8), (8, 4, 6), 0),
    "heads, turned": ("btd,dhk->bhtk", (2, 3, 8), (8, 4, 6), 0),
    "joined heads": ("bthk,hkd->btd", (2, 3, 4, 6), (4, 6, 8), (0, 1)),
    "joined heads, crossed": ("btkh,hkd->btd", (2, 3, 6, 4), (4, 6, 8), (0, 1)),
    "batch": ("bmk,bkn->bmn", (3, 5, 8), (3, 8, 6), 1),
    "batch, last": ("mbk,bkn->mnb", (5, 3, 8), (3, 8, 6), 1),
    "ellipsis": ("...k,kn->...n", (2, 5, 8), (8, 6), 0),
    "ellipsis on both": ("...mk,...kn->...mn", (3, 5, 8), (3, 8, 6), 1),
    "ellipsis broadcasts": ("...mk,...kn->...mn", (3, 5, 8), (1, 8, 6), 1),
    "ellipsis of two ranks": ("...mk,...kn->...mn", (2, 3, 5, 8), (3, 8, 6), 1),
    "ellipsis without arrow": ("...k,kn", (2, 5, 8), (8, 6), 0),
    "ellipsis summed": ("...k,kn->n", (2, 5, 8), (8, 6), 0),
    "sum of the weight": ("bmk,bkn->bm", (3, 5, 8), (3, 8, 6), 1),
    "sum of the other": ("bmk,kn->bn", (3, 5, 8), (8, 6), 0),
    "diagonal": ("mk,kkn->mn", (5, 8), (8, 8, 6), 0),
    "outer": ("m,n->nm", (5,), (6,), 0),
}


def operands(case):
    _, x_shape, w_shape, axis = EQUATIONS[case]
    return normal(*x_shape), quantized(normal(*w_shape, seed=1), ArrayConfig(symmetric=False), axis)


@functools.cache
def results_of_einsum():
    """Those of every case, both ways round, in one program."""

    def both_ways(equation, x, q):
        left, right, *output = equation.replace(" ", "").replace("->", ",").split(",")
        stored = q.reorder(tuple(range(-q.ndim, 0))[::-1])
        swapped = [einsum(f"{right},{left}->{labels}", stored, x) for labels in output]
        return [einsum(equation, x, stored), *swapped]

    @jax.jit
    def run(operands):
        return {case: both_ways(EQUATIONS[case][0], *pair) for case, pair in operands.items()}

    return run({case: operands(case) for case in EQUATIONS})


@pytest.mark.parametrize("case", EQUATIONS)
def test_einsum_matches_numpy(case):
    # NumPy does not sum the axes under an ellipsis, as jnp does.
    oracle = EQUATIONS[case][0].replace("...k,kn->n", "abk,kn->n")
    for got in results_of_einsum()[case]:
        assert_product(got, oracle, *operands(case))


def test_several_operands_are_contracted_from_left_to_right():
    x, q, r = normal(5, 8), weight(ArrayConfig(), (8, 6)), weight(ArrayConfig(), (6, 4))
    scale = normal(6)

    assert_product(einsum("mk,kn,nj->mj", x, q, r), "mk,kn,nj->mj", x, q, r)
    assert_product(einsum("mk,kn,n->m", x, q, scale), "mk,kn,n->m", x, q, scale)
    assert_product(
        einsum("...k,kn,nj,mj", x, q, r, normal(3, 4)), "ak,kn,nj,mj->am", x, q, r, normal(3, 4)
    )


def test_one_operand_is_rearranged_as_by_jnp():
    q = weight(ArrayConfig(), (8, 6))
    assert_product(einsum("kn->nk", q), "kn->nk", q)
    assert_product(einsum("kn->n", q), "kn->n", q)
    half = einsum("kn->nk", q.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    assert half.dtype == jnp.float32


def test_plain_arrays_go_to_jnp_unchanged():
    x, w = normal(5, 8), normal(8, 6, seed=1)
    np.testing.assert_array_equal(einsum("mk,kn->nm", x, w), jnp.einsum("mk,kn->nm", x, w))
    np.testing.assert_array_equal(matmul(x, w), jnp.matmul(x, w))
    dtypes = {
        f(preferred_element_type=jnp.bfloat16).dtype
        for f in (partial(einsum, "mk,kn->nm", x, w), partial(matmul, x, w))
    }
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


SHAPES = [
    ((8,), (8,)),
    ((8,), (8, 6)),
    ((5, 8), (8,)),
    ((5, 8), (8, 6)),
    ((3, 5, 8), (8, 6)),
    ((5, 8), (3, 8, 6)),
    ((8,), (3, 8, 6)),
    ((3, 5, 8), (8,)),
    ((3, 5, 8), (3, 8, 6)),
    ((3, 5, 8), (1, 8, 6)),
    ((1, 5, 8), (3, 8, 6)),
    ((2, 1, 5, 8), (3, 8, 6)),
    ((0, 8), (8, 6)),
]


def pairs_of(a_shape, b_shape):
    a, b = normal(*a_shape), normal(*b_shape, seed=1)
    left, right = quantized(a, ArrayConfig(), -1), quantized(b, ArrayConfig(), -min(b.ndim, 2))
    if a.ndim > 1 and b.ndim > 1:
        left, right = left.reorder((-1, -2)), right.reorder((-1, -2))
    return (a, right), (left, b), (left, right)


@functools.cache
def results_of_matmul():
    """Those of every pair of shapes, in one program."""
    run = jax.jit(lambda all: [[matmul(x, y) for x, y in pairs] for pairs in all])
    return dict(zip(SHAPES, run([pairs_of(*shapes) for shapes in SHAPES]), strict=True))


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_matmul_matches_numpy_for_every_rank(shapes):
    for got, (x, y) in zip(results_of_matmul()[shapes], pairs_of(*shapes), strict=True):
        arrays = [values(v) for v in (x, y)]
        want, size = np.matmul(*arrays), np.matmul(*map(np.abs, arrays))
        assert got.shape == want.shape
        np.testing.assert_array_less(np.abs(got - want), 2e-6 * size + 1e-30)


@pytest.mark.parametrize("order", [None, (-1, -2), (-1, -3, -2)])
def test_a_broadcast_axis_keeps_the_inputs_of_the_weight(order):
    x, w = normal(3, 5, 8), normal(1, 8, 6, seed=1)
    q = with_inputs(quantized(w, ArrayConfig(), axis=1), Inputs(ArrayConfig()))

    got = matmul(x, q.reorder(order))

    inputs = quantized(x, ArrayConfig(), axis=-1)
    assert_product(got, "bmk,zkn->bmn", inputs, q)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("run", [partial(einsum, "mk,kn->mn"), matmul], ids=["einsum", "matmul"])
@pytest.mark.parametrize("implementation", ["integer", "dequantize"])
def test_every_option_reaches_dot_general(implementation, run):
    x, q = quantized(normal(5, 8), ArrayConfig(), axis=1), weight(ArrayConfig(), (8, 6))

    got = run(x, q, implementation=implementation, preferred_element_type=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    # bfloat16 has 8 bits: the tolerance tells it from a product that was rounded twice.
    assert_product(got, "mk,kn->mn", x, q, tolerance=2.0**-8)
    text = (
        jax.jit(partial(run, precision="highest", implementation=implementation))
        .lower(x, q)
        .as_text()
    )
    assert ("HIGHEST" in text) == (implementation == "dequantize")


def test_invalid_subscripts_raise():
    x, q = normal(5, 8), weight(ArrayConfig(), (8, 6))
    invalid = {
        r"one term per operand; got 'mk->k' for 2 operands": ("mk->k", (x, q)),
        r"one letter per axis; got 'mkj' in 'mkj,kn->mn' for an operand of 2 axes": (
            "mkj,kn->mn",
            (x, q),
        ),
        r"one letter per axis; got 'm' in 'm,kn->mn'": ("m,kn->mn", (x, q)),
        r"one letter per axis; got 'm1' in 'm1,1n->mn'": ("m1,1n->mn", (x, q)),
        r"Every output label must be an operand's, once; got output \['m', 'z'\]": (
            "mk,kn->mz",
            (x, q),
        ),
        r"Every output label must be an operand's, once; got output \['m', 'n', 'n'\]": (
            "mk,kn->mnn",
            (x, q),
        ),
        r"Axes that meet must have one length; got 8 and 7 in shapes \(5, 8\) and \(7, 6\)": (
            "mk,kn->mn",
            (x, weight(ArrayConfig(), (7, 6))),
        ),
        r"Axes that meet must have one length; got 2 and 3": (
            "...mk,...kn->...mn",
            (normal(2, 5, 8), weight(ArrayConfig(), (3, 8, 6))),
        ),
        r"Axes that meet must have one length; got 1 and 8": ("mk,kn->mn", (normal(5, 1), q)),
    }
    for message, (equation, operands) in invalid.items():
        with pytest.raises(ValueError, match=message):
            einsum(equation, *operands)


def test_inputs_are_for_products_only():
    q = with_inputs(weight(ArrayConfig(), (8, 6)), Inputs(ArrayConfig()))
    with pytest.raises(ValueError, match=r"can only be multiplied; got a sum or a diagonal of QT"):
        einsum("kn->k", q)
    with pytest.raises(ValueError, match=r"can only be multiplied.*Use each of its labels once"):
        einsum("mk,kn->m", normal(5, 8), q)


def test_matmul_raises_for_scalars_and_mismatched_shapes():
    q = quantize(jnp.float32(2), ArrayConfig(per_tensor=True, format=INT4))
    with pytest.raises(ValueError, match=r"at least one axis; got \(5, 8\) and \(\)"):
        matmul(normal(5, 8), q)
    with pytest.raises(ValueError, match="must have one length; got 8 and 7"):
        matmul(normal(5, 8), weight(ArrayConfig(), (7, 6)))
