"""What a QTensor's `inputs` do to the operand that meets it, and gradients of products."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    FP8_E4M3,
    INT4,
    MXFP8,
    NVFP4,
    ArrayConfig,
    Inputs,
    QTensor,
    conv_general_dilated,
    dot_general,
    einsum,
    matmul,
    quantize,
    quantize_with_scale,
)

from .. import oracles
from .products import (
    WEIGHTS,
    K,
    M,
    N,
    assert_product,
    normal,
    quantized,
    values,
    weight,
    with_inputs,
)

X = jnp.asarray(normal(M, K))
MULTIPLIER = jnp.asarray(np.linspace(0.25, 3, K), jnp.float32)
INT8_ASYM = ArrayConfig(symmetric=False)
SCALE, ZERO_POINT = jnp.float32(0.05), jnp.int8(-20)

# Name: (inputs, what the operand becomes).
TREATMENTS = {
    "nothing": (Inputs(), lambda x: x),
    "per token": (Inputs(ArrayConfig()), lambda x: quantize(x, ArrayConfig(), axis=1)),
    "per tensor": (
        Inputs(ArrayConfig(per_tensor=True)),
        lambda x: quantize(x, ArrayConfig(per_tensor=True)),
    ),
    "asymmetric": (
        Inputs(INT8_ASYM),
        lambda x: quantize(x, ArrayConfig(symmetric=False), axis=1),
    ),
    "in groups": (
        Inputs(ArrayConfig(group_size=16)),
        lambda x: quantize(x, ArrayConfig(group_size=16), axis=1),
    ),
    "fp8": (
        Inputs(ArrayConfig(format=FP8_E4M3)),
        lambda x: quantize(x, ArrayConfig(format=FP8_E4M3), axis=1),
    ),
    "mxfp8": (
        Inputs(ArrayConfig(format=MXFP8)),
        lambda x: quantize(x, ArrayConfig(format=MXFP8), axis=1),
    ),
    "static": (
        Inputs(ArrayConfig(), scale=SCALE),
        lambda x: np.clip(np.round(x / SCALE), -127, 127) * 0.05,
    ),
    "static, asymmetric": (
        Inputs(INT8_ASYM, scale=SCALE, zero_point=ZERO_POINT),
        lambda x: (np.clip(np.round(x / SCALE) - 20, -127, 127) + 20) * 0.05,
    ),
    "multiplier": (Inputs(multiplier=MULTIPLIER), lambda x: x * MULTIPLIER.reshape(1, K)),
    "multiplier, then per token": (
        Inputs(ArrayConfig(), multiplier=MULTIPLIER),
        lambda x: quantize(x * MULTIPLIER.reshape(1, K), ArrayConfig(), axis=1),
    ),
    "multiplier, then static": (
        Inputs(ArrayConfig(), scale=SCALE, multiplier=MULTIPLIER),
        lambda x: np.clip(np.round(x * MULTIPLIER.reshape(1, K) / SCALE), -127, 127) * 0.05,
    ),
}


@functools.cache
def results_of_treatments():
    """Products in each order of storage, and from the left, of every treatment in one program."""

    def products(x, q):
        left = with_inputs(q.reorder((-1, -2)), q.inputs)
        numbers = (((0,), (1,)), ((), ()))
        return matmul(x, q), matmul(x, left), dot_general(left, x, numbers)

    run = jax.jit(lambda x, qs: {name: products(x, q) for name, q in qs.items()})
    q = weight(WEIGHTS["int8"])
    return run(X, {name: with_inputs(q, inputs) for name, (inputs, _) in TREATMENTS.items()})


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", TREATMENTS)
def test_inputs_say_how_a_float_operand_is_treated(name):
    inputs, treat = TREATMENTS[name]
    q = with_inputs(weight(WEIGHTS["int8"]), inputs)
    met = treat(X)
    row_major, column_major, from_the_left = results_of_treatments()[name]
    assert_product(row_major, "mk,kn->mn", met, q)
    assert_product(column_major, "mk,kn->mn", met, q)
    assert_product(from_the_left, "kn,mk->nm", q, met)


def test_a_quantized_operand_is_left_as_it_is():
    q = with_inputs(weight(WEIGHTS["int8"]), Inputs(ArrayConfig()))
    x = quantize(X, ArrayConfig(format=INT4), axis=1)
    assert_product(matmul(x, q), "mk,kn->mn", x, q)


@pytest.mark.parametrize(
    "equation, order", [("bthk,hkd->btd", (-2, -1, -3)), ("btkh,hkd->btd", (-1, -2))]
)
def test_a_multiplier_has_the_axes_of_the_weight(equation, order):
    # Square heads, so that a swap cannot be seen from the shape.
    x, w = jnp.asarray(normal(2, 3, 4, 4)), normal(4, 4, 6, seed=1)
    factors = jnp.asarray(normal(4, 4, seed=2))
    q = quantized(w, ArrayConfig(), axis=(0, 1)).reorder(order)
    labels = equation.split(",")[0]

    @jax.jit
    def products(x, factors, q):
        given = Inputs(multiplier=factors), Inputs(ArrayConfig(), multiplier=factors)
        met = jnp.einsum(f"{labels},hk->{labels}", x, factors)
        outs = [einsum(equation, x, with_inputs(q, inputs)) for inputs in given]
        return outs, quantize(met, ArrayConfig(), axis=(2, 3))

    (in_float, in_codes), met = products(x, factors, q)
    assert_product(in_float, equation.replace(",", ",hk,"), x, factors, q)
    assert_product(in_codes, equation, met, q)


def test_one_scale_serves_all_contracted_axes_of_a_row():
    x, w = jnp.asarray(normal(2, 3, 4, 8)), normal(4, 8, 6, seed=1)
    q = with_inputs(quantized(w, ArrayConfig(), axis=(0, 1)), Inputs(ArrayConfig()))
    got = einsum("bthk,hkd->btd", x, q)
    assert_product(got, "bthk,hkd->btd", quantize(x, ArrayConfig(), axis=(2, 3)), q)


def test_a_multiplier_of_another_shape_raises():
    q = with_inputs(weight(WEIGHTS["int8"]), Inputs(multiplier=MULTIPLIER[:-1]))
    message = r"must have the shape of the contracted axes, \(64,\), .*got \(63,\) for axes \(1,\)"
    with pytest.raises(ValueError, match=message):
        matmul(X, q)


SPOILED = {
    "per token": Inputs(ArrayConfig()),
    "asymmetric": Inputs(INT8_ASYM),
    "fp8": Inputs(ArrayConfig(format=FP8_E4M3)),
    "mxfp8": Inputs(ArrayConfig(format=MXFP8)),
    "multiplier": Inputs(ArrayConfig(), multiplier=MULTIPLIER),
    "none": None,
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", SPOILED)
def test_nan_or_inf_in_a_row_spoils_this_row_and_no_other(name):
    weights = "int4-g32" if name in ("per token", "mxfp8") else "int8"
    q = with_inputs(weight(WEIGHTS[weights]), SPOILED[name])
    x = np.array(X)
    x[1, 3], x[3, K - 1] = np.nan, np.inf

    product = jax.jit(matmul)
    got = np.asarray(product(x, q))

    is_spoiled = ~np.isfinite(got)
    np.testing.assert_array_equal(is_spoiled.any(1), [False, True, False, True, False])
    assert is_spoiled[1].all()
    # In a float product Inf times a code of zero is NaN, and times another is Inf.
    assert np.isnan(got[3]).all() or SPOILED[name] is None
    np.testing.assert_array_equal(got[::2], np.asarray(product(X, q))[::2])


COTANGENT = normal(M, N, seed=3)


def loss(product, *operands):
    return jnp.sum(product(*operands) * COTANGENT)


def clip_limit(name):
    """The largest magnitude of each element of X that is not clipped."""
    if name == "static":
        return 127 * np.asarray(SCALE)
    # The step between the outermost codes is 32, and half of it rounds to the last one.
    met = TREATMENTS["mxfp8"][1](X)
    is_mxfp8 = name == "mxfp8"
    return np.repeat(464 * np.asarray(met.scale, np.float32), 32, 1) if is_mxfp8 else np.inf


# Each kind of inputs and each kind of weight once.
WITH_GRADIENTS = [
    ("int8", name) for name in ("nothing", "per token", "asymmetric", "static", "mxfp8")
]
WITH_GRADIENTS += [("int8-asym", "per token"), ("int8-blocks", "static"), ("nf4", "nothing")]
WITH_GRADIENTS += [("int4-asym-g32", "asymmetric"), ("fp8_e4m3", "mxfp8"), ("nvfp4", "static")]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("weights, name", WITH_GRADIENTS)
def test_a_float_operand_gets_the_gradient_of_the_product_where_it_is_not_clipped(weights, name):
    q = with_inputs(weight(WEIGHTS[weights]).reorder((-1, -2)), TREATMENTS[name][0])
    got = jax.jit(jax.grad(partial(loss, matmul)))(X, q)
    is_kept = np.abs(X) <= clip_limit(name)
    assert (name in ("static", "mxfp8")) == (not is_kept.all())
    assert_product(got, "mn,kn,mk->mk", COTANGENT, q, is_kept)


@pytest.mark.parametrize("config, zero_point", [(ArrayConfig(), 0), (INT8_ASYM, -20.3)])
def test_a_static_scale_gets_the_gradient_of_a_step_and_a_floating_zero_point_its_own(
    config, zero_point
):
    q = weight(WEIGHTS["int8"])

    def product(scale, zero_point):
        zero_point = None if config.symmetric else zero_point
        return matmul(X, with_inputs(q, Inputs(config, scale, zero_point)))

    got = jax.jit(jax.grad(partial(loss, product), (0, 1)))(SCALE, jnp.float32(zero_point))

    steps, zeros = (np.full((M, K), v, np.float32) for v in (SCALE, round(zero_point)))
    _, _, *slopes = oracles.straight_through(np.asarray(X), steps, zeros, config)
    assert_product(got[0], "mn,kn,mk->", COTANGENT, q, slopes[0], tolerance=1e-4)
    if not config.symmetric:
        assert slopes[1].any()
        assert_product(got[1], "mn,kn,mk->", COTANGENT, q, slopes[1], tolerance=1e-4)


@pytest.mark.parametrize("name", ["multiplier", "multiplier, then per token"])
def test_gradients_pass_through_the_multiplier_and_reach_it(name):
    inputs, _ = TREATMENTS[name]
    q = weight(WEIGHTS["int8"])

    def product(x, multiplier):
        return matmul(x, with_inputs(q, Inputs(inputs.config, multiplier=multiplier)))

    of_x, of_multiplier = jax.jit(jax.grad(partial(loss, product), (0, 1)))(X, MULTIPLIER)

    assert_product(of_x, "mn,kn,k->mk", COTANGENT, q, MULTIPLIER)
    assert_product(of_multiplier, "mn,kn,mk->k", COTANGENT, q, X, tolerance=1e-5)


SCALED = [("int8", None), ("int8-asym", (-1, -2)), ("int8-blocks", (-1, -2)), ("fp8_e4m3", None)]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name, order", [*SCALED, ("int4-asym-g32", (-1, -2))])
def test_scales_get_their_gradient(name, order):
    q = weight(WEIGHTS[name]).reorder(order)

    got = jax.jit(jax.grad(lambda q: loss(matmul, X, q), allow_int=True))(q)

    # out = sum x * (codes - zero point) * scale, so each scale gets x * (codes - zero point).
    bare = values(
        q.__class__(
            q.codes,
            np.ones(q.scale.shape, np.float32),
            q.zero_point,
            format=q.format,
            dtype=q.dtype,
            order=order,
        )
    )
    of_weight = np.asarray(X, np.float64).T @ COTANGENT * bare
    counts = q.reorder(None).scale.shape
    want = oracles.sum_blocks(of_weight, counts)
    of_scale = np.asarray(got.scale) if order is None else np.asarray(got.scale).T
    np.testing.assert_allclose(of_scale, want, rtol=1e-4, atol=1e-3 * np.abs(want).max())


def test_both_scales_get_their_gradient_and_no_code_does():
    x = quantized(X, ArrayConfig(format=FP8_E4M3), axis=1)
    q = weight(ArrayConfig(format=FP8_E4M3))

    of_x, of_q = jax.jit(jax.grad(partial(loss, matmul), (0, 1)))(x, q)

    product = np.asarray(matmul(x, q), np.float64) * COTANGENT
    for gradient, operand, axis in ((of_x, x, 1), (of_q, q, 0)):
        got = np.asarray(gradient.scale) * np.asarray(operand.scale)
        np.testing.assert_allclose(got, product.sum(axis, keepdims=True), rtol=1e-3)
        assert gradient.codes.dtype == jnp.float8_e4m3fn
        np.testing.assert_array_equal(np.asarray(gradient.codes).astype(np.float32), 0)


def test_of_nested_scales_only_the_wide_one_gets_a_gradient():
    q = weight(ArrayConfig(format=NVFP4))
    gradient = jax.jit(jax.grad(lambda q: loss(matmul, X, q)))(q)

    assert isinstance(q.scale, QTensor)
    for codes in (gradient.scale.codes, gradient.codes):
        np.testing.assert_array_equal(np.asarray(codes).astype(np.float32), 0)
    product = np.sum(np.asarray(matmul(X, q), np.float64) * COTANGENT)
    got = np.sum(np.asarray(gradient.scale.scale) * np.asarray(q.scale.scale))
    np.testing.assert_allclose(got, product, rtol=1e-4)


def test_a_sum_without_a_product_gives_no_gradient_to_codes():
    q = weight(ArrayConfig(format=FP8_E4M3))
    gradient = jax.jit(jax.grad(lambda q: jnp.sum(einsum("kn->n", q))))(q)
    np.testing.assert_array_equal(np.asarray(gradient.codes).astype(np.float32), 0)
    want = np.asarray(q.codes, np.float64).sum(0, keepdims=True)
    np.testing.assert_allclose(gradient.scale, want, rtol=1e-5, atol=1e-2)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", ["nothing", "per token", "multiplier"])
def test_forward_derivatives_are_those_of_the_float_product(name):
    inputs, _ = TREATMENTS[name]
    q, tangent = with_inputs(weight(WEIGHTS["int8"]), inputs), jnp.asarray(normal(M, K, seed=5))

    product = jax.jit(matmul)
    out, derivative = jax.jvp(lambda x: product(x, q), (X,), (tangent,))

    factors = MULTIPLIER if name == "multiplier" else np.ones(K)
    np.testing.assert_array_equal(out, product(X, q))
    assert_product(derivative, "mk,k,kn->mn", tangent, factors, q)


def test_gradients_are_the_same_in_every_transformation():
    q = with_inputs(weight(WEIGHTS["int8"]), Inputs(ArrayConfig()))

    def of_row(x, cotangent):
        return jax.grad(lambda x: jnp.sum(matmul(x, q) * cotangent))(x)

    want = np.asarray(COTANGENT, np.float64) @ values(q).T
    rematerialized = jax.checkpoint(lambda x: matmul(x, q))

    @jax.jit
    def transformed(x, cotangent):
        return {
            "jit": of_row(x, cotangent),
            "vmap": jax.vmap(of_row)(x, cotangent),
            "scan": jax.lax.scan(lambda _, pair: (None, of_row(*pair)), None, (x, cotangent))[1],
            "remat": jax.grad(partial(loss, rematerialized))(x),
            "reverse of scan": jax.grad(
                lambda x: jnp.sum(
                    jax.lax.scan(lambda _, row: (None, matmul(row, q)), None, x)[1] * cotangent
                )
            )(x),
        }

    for name, got in transformed(X, COTANGENT).items():
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3, err_msg=name)


def test_second_derivatives_exist():
    q = weight(WEIGHTS["int8"])
    hessian = jax.jit(jax.hessian(lambda x: jnp.sum(matmul(x, q) ** 2)))(np.asarray(X)[0])
    np.testing.assert_allclose(hessian, 2 * values(q) @ values(q).T, rtol=1e-4, atol=1e-3)


def test_gradients_keep_the_dtype_of_the_operand():
    q = with_inputs(weight(WEIGHTS["int8"]).astype(jnp.bfloat16), Inputs(ArrayConfig()))
    x = X.astype(jnp.bfloat16)
    product = partial(matmul, preferred_element_type=jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(product(x, q))))(x)
    assert gradient.dtype == jnp.bfloat16
    assert_product(gradient, "mn,kn->mk", np.ones((M, N)), q, tolerance=2.0**-7)


@pytest.mark.parametrize("name", ["nothing", "per token"])
def test_convolutions_get_the_gradient_of_the_float_convolution(name):
    image, axes = jnp.asarray(normal(2, 5, 6, 4)), (0, 1, 2)
    q = quantized(normal(3, 3, 4, 6, seed=1), ArrayConfig(), axes)
    q = with_inputs(q, TREATMENTS[name][0])

    def convolve(x, w):
        out = conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(out * normal(*out.shape, seed=2))

    got = jax.jit(jax.grad(convolve))(image, q)
    want = jax.jit(jax.grad(convolve))(image, q.dequantize())
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_a_static_scale_may_have_the_rank_of_the_operand():
    rows = jnp.asarray(np.linspace(0.05, 0.1, M), jnp.float32).reshape(M, 1)
    q = with_inputs(weight(WEIGHTS["int8"]), Inputs(ArrayConfig(), scale=rows))
    met = quantize_with_scale(X, rows, None, ArrayConfig())
    assert_product(matmul(X, q), "mk,kn->mn", met, q)


def test_a_quantized_operand_cannot_be_multiplied_any_more():
    q = with_inputs(weight(WEIGHTS["int8"]), Inputs(multiplier=MULTIPLIER))
    x = quantize(X, ArrayConfig(format=INT4), axis=1)
    text = r"inputs\.multiplier cannot be applied .*; got QTensor\(int4 .*Apply it before you quant"
    with pytest.raises(ValueError, match=text):
        matmul(x, q)


@pytest.mark.parametrize("function", [matmul, lambda x, w, **k: einsum("mk,kn->mn", x, w, **k)])
def test_an_implementation_cannot_be_forced_on_plain_arrays(function):
    with pytest.raises(ValueError, match="implementation='integer' needs a QTensor"):
        function(jnp.ones((2, 3)), jnp.ones((3, 4)), implementation="integer")


def test_operands_must_be_arrays():
    with pytest.raises(ValueError, match="Operands must be arrays or QTensors; got list"):
        matmul([[1.0]], weight(WEIGHTS["int8"]))  # pyright: ignore[reportArgumentType] (so meant)


def test_integer_operands_are_converted_to_float():
    q = with_inputs(weight(WEIGHTS["int8"]), Inputs(ArrayConfig()))
    x = np.random.default_rng(0).integers(0, 2, X.shape)
    with jax.numpy_dtype_promotion("standard"):
        whole = matmul(jnp.asarray(x, jnp.int32), q)
    np.testing.assert_array_equal(whole, matmul(jnp.asarray(x, jnp.float32), q))


def test_grouped_inputs_have_groups_along_the_last_of_several_contracted_axes():
    x, w = jnp.asarray(normal(2, 3, 4, 64)), normal(4, 64, 6, seed=1)
    config = ArrayConfig(format=MXFP8)
    q = with_inputs(quantize(w, ArrayConfig(), axis=(0, 1)), Inputs(config))
    met = quantize(x, config, axis=-1)
    assert_product(einsum("bthd,hdm->btm", x, q), "bthd,hdm->btm", met, q)


def test_errors_of_inputs_name_the_weight():
    q = with_inputs(quantize(normal(40, 6), ArrayConfig()), Inputs(ArrayConfig(format=MXFP8)))
    text = r"The inputs of QTensor\(int8 40x6.* cannot be quantized: group_size must divide"
    with pytest.raises(ValueError, match=text):
        matmul(jnp.ones((2, 40)), q)
