"""Static scales of activations from batches, in models that use weights in every way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    INT8,
    MXFP8A8,
    W8A8,
    W8A16,
    ArrayConfig,
    Inputs,
    QTensor,
    Scheme,
    conv_general_dilated,
    einsum,
    matmul,
    tree,
)
from jaxquant.training import Prepared, RunningAbsMax, calibrate, convert, prepare

LAYERS, WIDTH, OUT = 3, 16, 10
STATIC = Scheme(W8A8.weights, ArrayConfig(per_tensor=True))
RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape).astype(np.float32))


PARAMS = {
    "layers": {"kernel": normal(LAYERS, WIDTH, WIDTH) / 4},
    "out": {"kernel": normal(WIDTH, OUT), "bias": jnp.ones(OUT)},
}
BATCHES = [normal(5, WIDTH) * size for size in (1.0, 4.0, 0.5)]


def hidden(params, x):
    """The activations that each kernel multiplies."""
    met = [x]
    for kernel in tree.dequantize(tree.quantize(params, W8A16))["layers"]["kernel"]:
        met.append(jnp.tanh(met[-1] @ kernel))
    return met


def apply(params, x):
    def layer(x, kernel):
        return jnp.tanh(matmul(x, kernel)), None

    x, _ = jax.lax.scan(layer, x, params["layers"]["kernel"])
    # Integers: not differentiable.
    return jnp.argmax(matmul(x, params["out"]["kernel"]) + params["out"]["bias"][None], -1)


def abs_max(*operands):
    return max(float(jnp.abs(x).max()) for x in operands)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tree.quantize, prepare])
def test_each_slice_of_stacked_layers_gets_its_own_scale(make):
    each = [hidden(PARAMS, x) for x in BATCHES]
    want = [abs_max(*met) / 127 for met in zip(*each, strict=True)]

    got = calibrate(apply, make(PARAMS, STATIC), BATCHES, observer=RunningAbsMax.init())

    kernels = got["layers"]["kernel"], got["out"]["kernel"]
    assert isinstance(kernels[0], QTensor if make is tree.quantize else Prepared)
    found = [kernel.inputs.scale for kernel in kernels]
    assert [scale.shape for scale in found] == [(LAYERS,), ()]
    np.testing.assert_allclose(np.append(*found), want, rtol=1e-5)
    assert all(k.inputs.config == STATIC.inputs and k.inputs.tap is None for k in kernels)
    np.testing.assert_array_equal(got["out"]["bias"], PARAMS["out"]["bias"])
    jax.jit(apply)(got, BATCHES[0])


@pytest.mark.slow
def test_rules_quantize_first_and_the_products_use_the_scale():
    got = calibrate(lambda p, x: matmul(x, p["kernel"]), PARAMS["out"], BATCHES, STATIC)
    scale = got["kernel"].inputs.scale
    np.testing.assert_allclose(scale, abs_max(*BATCHES) / 127, rtol=2e-3)
    x = BATCHES[0]
    codes = np.clip(np.round(x / scale), -127, 127)
    want = np.asarray(codes * scale) @ np.asarray(got["kernel"].dequantize())
    np.testing.assert_allclose(matmul(x, got["kernel"]), want, rtol=1e-5, atol=1e-5)


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("make, dtype", [(tree.quantize, jnp.int8), (prepare, jnp.float32)])
def test_asymmetric_inputs_get_a_zero_point(make, dtype):
    scheme = Scheme(W8A8.weights, ArrayConfig(per_tensor=True, symmetric=False))
    seen = [jnp.abs(x) for x in BATCHES]
    got = calibrate(
        lambda p, x: matmul(x, p["kernel"]),
        make(PARAMS["out"], scheme),
        seen,
        observer=RunningAbsMax.init(),
    )
    inputs = got["kernel"].inputs
    np.testing.assert_allclose(inputs.scale, abs_max(*seen) / 254, rtol=1e-6)
    assert (inputs.zero_point.dtype, int(inputs.zero_point)) == (dtype, -127)


def test_a_multiplier_comes_before_the_scale():
    q = tree.quantize(PARAMS["out"], STATIC)
    multiplier = jnp.linspace(0.1, 2.0, WIDTH)
    inputs = dataclasses.replace(q["kernel"].inputs, multiplier=multiplier)
    q["kernel"] = dataclasses.replace(q["kernel"], inputs=inputs)
    got = calibrate(lambda p, x: matmul(x, p["kernel"]), q, BATCHES, observer=RunningAbsMax.init())
    want = abs_max(*(x * multiplier[None] for x in BATCHES)) / 127
    np.testing.assert_allclose(got["kernel"].inputs.scale, want, rtol=1e-6)
    np.testing.assert_array_equal(got["kernel"].inputs.multiplier, multiplier)


@pytest.mark.slow
def test_a_weight_used_twice_spans_both_and_experts_share_a_scale():
    params = {"kernel": normal(WIDTH, WIDTH), "experts": {"kernel": normal(4, WIDTH, OUT)}}

    @jax.jit
    @jax.checkpoint
    def apply(p, x):
        h = matmul(matmul(x, p["kernel"]) * 0 + 50, p["kernel"])
        return einsum("bk,ekn->ebn", x, p["experts"]["kernel"]) + h.sum()

    scheme = Scheme(W8A8.weights, ArrayConfig(per_tensor=True, scale_dtype="bfloat16"))
    got = calibrate(apply, params, BATCHES, scheme, observer=RunningAbsMax.init())

    assert got["kernel"].inputs.scale == jnp.bfloat16(50 / 127).astype(jnp.float32)
    assert got["kernel"].inputs.scale.dtype == jnp.float32
    experts = got["experts"]["kernel"].inputs.scale
    np.testing.assert_allclose(experts, abs_max(*BATCHES) / 127, rtol=2**-8)
    assert experts.shape == ()


@pytest.mark.slow
def test_each_layer_of_experts_gets_a_scale_and_weights_without_inputs_none():
    layers = tree.quantize({"kernel": normal(2, 3, WIDTH, WIDTH)}, STATIC)
    alone = tree.quantize(PARAMS["out"], W8A16)["kernel"]
    alone = dataclasses.replace(alone, inputs=Inputs(multiplier=jnp.ones(WIDTH)))

    def apply(p, x):
        def layer(x, kernel):
            return einsum("bk,ekn->ebn", x, kernel).sum(0) * 0 + 7, None

        return matmul(jax.lax.scan(layer, x, p["kernel"])[0], p["alone"])

    params = layers | {"alone": alone}
    got = calibrate(apply, params, BATCHES, observer=RunningAbsMax.init())
    want = [abs_max(*BATCHES) / 127, 7 / 127]
    np.testing.assert_allclose(got["kernel"].inputs.scale, want, rtol=1e-6)
    assert got["alone"].inputs.scale is None


def test_a_convolution_and_a_conv_gets_its_scale():
    kernel = tree.quantize({"conv_kernel": normal(3, 3, 8, 16)}, STATIC)
    images = [normal(2, 6, 6, 8) for _ in range(2)]

    def apply(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return conv_general_dilated(x, p["conv_kernel"], (1, 1), "SAME", dimension_numbers=numbers)

    got = calibrate(apply, kernel, images, observer=RunningAbsMax.init())
    np.testing.assert_allclose(got["conv_kernel"].inputs.scale, abs_max(*images) / 127, rtol=1e-6)


@pytest.mark.slow
def test_training_goes_on_from_the_static_scale():
    prepared = calibrate(apply, prepare(PARAMS, STATIC), BATCHES)
    converted = convert(prepared)

    def loss(params):
        return jnp.sum(jnp.square(matmul(BATCHES[0], params["out"]["kernel"])))

    gradient = jax.grad(loss)(prepared)["out"]["kernel"]
    assert float(jnp.abs(gradient.inputs.scale)) > 0
    np.testing.assert_array_equal(
        jax.jit(apply)(prepared, BATCHES[1]), jax.jit(apply)(converted, BATCHES[1])
    )


@pytest.mark.slow
def test_progress_is_reported_per_batch(capsys):
    seen = []
    calibrate(apply, PARAMS, BATCHES, STATIC, progress=lambda *step: seen.append(step))
    assert seen == [(i, 3, f"batch {i}") for i in (1, 2, 3)]
    calibrate(apply, PARAMS, iter(BATCHES), STATIC, progress=True)
    assert capsys.readouterr().out == ""


def with_nan(x):
    return x.at[0, 0].set(jnp.nan)


UNSUPPORTED = {
    "no inputs": (W8A16, BATCHES, "No weight has inputs to calibrate; got layers/kernel, .*W8A8"),
    "groups": (
        Scheme(W8A8.weights, ArrayConfig(format=INT8, group_size=8)),
        BATCHES,
        "layers/kernel: a static scale is one for the whole operand; got inputs in groups",
    ),
    "mx": (
        {"out/kernel": Scheme(W8A8.weights, MXFP8A8.inputs)},
        BATCHES,
        "out/kernel: a static scale is one for the whole operand",
    ),
    "no batches": (STATIC, [], "layers/kernel: products must all use .*; got 0 shapes"),
    "texts": (STATIC, ["hello"], "batches must hold arrays of NumPy or JAX; got one of str"),
    "nan": (STATIC, [with_nan(BATCHES[0])], "layers/kernel: .*must be finite; got a range"),
    "zeros": (STATIC, [BATCHES[0] * 0], "layers/kernel: .*must see a nonzero value"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_uncalibratable_trees_raise(name):
    rules, batches, message = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=message):
        calibrate(apply, PARAMS, batches, rules)


def test_a_weight_used_whole_and_in_slices_raises():
    def both(params, x):
        return apply(params, x), matmul(x[None], params["layers"]["kernel"])

    with pytest.raises(ValueError, match=r"slices of one shape; got 2 shapes, \[.*\(3,\)"):
        calibrate(both, PARAMS, BATCHES, STATIC)


def test_an_unused_slice_raises():
    def first(params, x):
        kernel = jax.tree.map(lambda a: a[0], params["layers"]["kernel"])
        return matmul(x, kernel), matmul(x, params["out"]["kernel"])

    with pytest.raises(ValueError, match=r"every slice must be used; got no data for 2 of 3"):
        calibrate(first, PARAMS, BATCHES, STATIC)


def test_a_model_may_hold_functions_and_names_among_its_leaves():
    params = {"kernel": PARAMS["out"]["kernel"]}
    model = {**params, "activation": jax.nn.gelu, "name": "head"}

    def product(model, x):
        return matmul(x, model["kernel"])

    got = calibrate(product, model, BATCHES, STATIC)
    want = calibrate(product, params, BATCHES, STATIC)
    assert got["activation"] is jax.nn.gelu
    assert got["kernel"].inputs.scale == want["kernel"].inputs.scale
