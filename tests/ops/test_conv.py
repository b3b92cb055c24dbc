import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import FP8_E4M3, INT4, NF4, ArrayConfig, Inputs, conv_general_dilated, quantize

from ..cases import Case
from .products import assert_close, conv, normal, quantized, values, with_inputs

NHWC = ("NHWC", "HWIO", "NHWC")
# Name: (strides, padding, options).
WINDOWS = {
    "plain": ((1, 1), ((0, 0), (0, 0)), {}),
    "strides": ((2, 1), ((1, 0), (2, 1)), {}),
    "dilated kernel": ((1, 2), ((1, 1), (2, 2)), {"rhs_dilation": (1, 2)}),
    "dilated image": ((1, 1), ((1, 2), (0, 1)), {"lhs_dilation": (2, 1)}),
    "groups": ((1, 1), ((0, 1), (1, 0)), {"feature_group_count": 2}),
}
KERNELS = {
    "int8": Case(ArrayConfig(), (0, 1, 2)),
    "int8-tensor": Case(ArrayConfig(per_tensor=True)),
    "int8-asym": Case(ArrayConfig(symmetric=False), (0, 1, 2)),
    "int4-g2": Case(ArrayConfig(format=INT4, group_size=2), 2),
    "int4": Case(ArrayConfig(format=INT4), (0, 1, 2)),
    "fp8": Case(ArrayConfig(format=FP8_E4M3), (0, 1, 2)),
    "nf4": Case(ArrayConfig(format=NF4), (0, 1, 2)),
    "nested": Case(ArrayConfig(scale_dtype="float8_e4m3fn"), (0, 1, 2)),
}
IMAGES = {
    "float": None,
    "int8": Case(ArrayConfig(), (1, 2, 3)),
    "int8-tensor": Case(ArrayConfig(per_tensor=True)),
    "int8-asym": Case(ArrayConfig(symmetric=False), (1, 2, 3)),
    "int8-pixels": Case(ArrayConfig(), 3),
}
ORDERS = (None, (-1, -4, -3, -2))
IMAGE = normal(2, 6, 7, 4)


def kernel(case, depth=4):
    is_nested = case.config.scale_dtype is not None
    return (quantize if is_nested else quantized)(normal(3, 2, depth, 6, seed=1), *case)


def image(kind) -> Any:
    return IMAGE if IMAGES[kind] is None else quantized(IMAGE, *IMAGES[kind])


def assert_conv(got, x, q, strides, padding, groups=1, tolerance=2e-6, **dilations):
    run = partial(conv, strides=strides, padding=padding, groups=groups, **dilations)
    arrays = values(x), values(q)
    assert_close(got, run(*arrays), run(*map(np.abs, arrays)), tolerance)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", KERNELS)
def test_every_mixture_of_formats_and_orders_matches_loops(name):
    strides, padding, _ = WINDOWS["strides"]
    q = kernel(KERNELS[name])

    @jax.jit
    def products(images, q):
        run = partial(
            conv_general_dilated,
            window_strides=strides,
            padding=padding,
            dimension_numbers=NHWC,
        )
        stored = [q.reorder(order) for order in ORDERS]
        return {n: [run(x, w) for w in stored] for n, x in images.items()}

    kinds = IMAGES if name in ("int8", "int8-asym", "int4-g2") else ("float", "int8")
    images = {kind: image(kind) for kind in kinds}
    results = products(images, q)
    for kind, x in images.items():
        for got in results[kind]:
            assert_conv(got, x, q, strides, padding)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("window", WINDOWS)
def test_every_window_matches_loops(window, kind):
    strides, padding, options = WINDOWS[window]
    groups = options.get("feature_group_count", 1)
    q = kernel(KERNELS["int8"], 4 // groups)
    x = image(kind)

    run = partial(conv_general_dilated, window_strides=strides, padding=padding, **options)
    got = jax.jit(partial(run, dimension_numbers=NHWC))(x, q)

    dilations = {k: v for k, v in options.items() if "dilation" in k}
    assert_conv(got, x, q, strides, padding, groups, **dilations)


def test_layouts_named_paddings_and_orders_of_either_side_change_nothing():
    q, x = kernel(KERNELS["int8"]), image("int8")
    want = conv_general_dilated(x, q, [1, 1], [(1, 1), (0, 1)], dimension_numbers=NHWC)
    assert_conv(want, x, q, (1, 1), ((1, 1), (0, 1)))

    # Channels first, as the default has it.
    first = quantized(IMAGE.transpose(0, 3, 1, 2), ArrayConfig(), axis=(1, 2, 3))
    turned = quantize(
        normal(3, 2, 4, 6, seed=1).transpose(3, 2, 0, 1), ArrayConfig(), axis=(1, 2, 3)
    )
    for a, b in ((first, turned), (first.reorder((-1, -3, -2)), turned.reorder((-1, -2)))):
        got = conv_general_dilated(a, b, [1, 1], "SAME")
        np.testing.assert_allclose(got.transpose(0, 2, 3, 1), want, rtol=1e-6, atol=1e-5)


def test_int8_convolutions_are_exact():
    codes = np.random.default_rng(0).choice([-127, -1, 0, 127], (2, 6, 7, 4)).astype(np.float32)
    kernel = np.random.default_rng(1).choice([-127, 0, 1, 127], (3, 2, 4, 6)).astype(np.float32)
    codes[:, 0, 0] = kernel[0, 0, 0] = 127
    x, q = quantized(codes, *IMAGES["int8"]), quantized(kernel, *KERNELS["int8"])

    got = conv_general_dilated(x, q, (1, 1), "VALID", dimension_numbers=NHWC)

    np.testing.assert_array_equal(got, conv(codes, kernel, (1, 1), ((0, 0), (0, 0))))


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_are_quantized_per_example_with_one_factor_per_channel(symmetric):
    config = ArrayConfig(symmetric=symmetric)
    factors = jnp.asarray([1.0, 2.0, 0.5, 3.0])

    @partial(jax.jit, static_argnames="order")
    def run(x, q, order):
        q = q.reorder(order)
        return conv_general_dilated(x, q, (1, 1), "VALID", dimension_numbers=NHWC)

    for multiplier, order in ((None, ORDERS[0]), (factors, ORDERS[1])):
        q = with_inputs(kernel(KERNELS["int8"]), Inputs(config, multiplier=multiplier))
        x = IMAGE if multiplier is None else IMAGE * np.asarray(factors)
        met = quantize(x, config, axis=(1, 2, 3))
        assert_conv(run(IMAGE, q, order), met, q, (1, 1), ((0, 0), (0, 0)))


def convolutions(x, q, platform):
    """(lhs, rhs, result) element types of each convolution in the StableHLO text."""
    run = partial(
        conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC
    )
    text = jax.jit(run).trace(x, q).lower(lowering_platforms=(platform,)).as_text()
    tensor = r"tensor<(?:\d+x)*(\w+)>"
    return re.findall(rf"convolution.*: \({tensor}, {tensor}\) -> {tensor}", text)


@pytest.mark.parametrize(
    "platform, wanted",
    [
        ("cpu", ("i8", "i8", "i32")),
        ("tpu", ("i8", "i8", "i32")),
        ("cuda", ("f32", "f32", "f32")),
    ],
)
def test_codes_are_convolved_as_integers_where_the_platform_can(platform, wanted):
    q = kernel(KERNELS["int8"])
    dynamic = with_inputs(q, Inputs(ArrayConfig()))
    assert convolutions(image("int8"), q, platform) == [wanted]
    assert convolutions(IMAGE, dynamic, platform) == [wanted]


# Axes of images and kernels, for every number of spatial axes and both places of the channels.
LAYOUTS = [
    ("NWC", "WIO"),
    ("NCW", "OIW"),
    ("NHWC", "HWIO"),
    ("NCHW", "HWIO"),
    ("NWCH", "IHOW"),
    ("NDHWC", "DHWIO"),
    ("NCDHW", "OIDHW"),
]
SPECIAL: dict[str, Any] = {
    "SAME": ("SAME", None, None),
    "pairs": (((1, 2), (0, 1), (2, 0)), None, (1, 2, 2)),
    "dilated": (((1, 2), (0, 1), (2, 0)), (2, 1, 3), (2, 1, 1)),
    "cropped": (((-1, 2), (0, -1), (0, 0)), (1, 2, 2), None),
}


# Each layout with two of them, and each of them with several ranks.
SPECIAL_LAYOUTS = [
    (*layout, name)
    for i, layout in enumerate(LAYOUTS)
    for name in (list(SPECIAL) * 2)[i % 4 : i % 4 + 4 : 2]
]


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("images, kernels, special", SPECIAL_LAYOUTS)
def test_images_equal_the_integers_of_xla_in_every_layout(images, kernels, special):
    sizes = {"N": 2, "C": 6, "D": 5, "H": 7, "W": 6, "I": 3, "O": 4}
    rank, windows = len(images) - 2, {"D": 2, "H": 3, "W": 2}
    shapes = [sizes[a] for a in images], [(windows | {"I": 3, "O": 4})[a] for a in kernels]
    shared = [a for a in range(rank + 2) if images[a] != "N"]
    x = quantized(normal(*shapes[0]), ArrayConfig(), axis=tuple(shared))
    shared = [a for a in range(rank + 2) if kernels[a] != "O"]
    q = quantized(normal(*shapes[1], seed=1), ArrayConfig(), axis=tuple(shared))
    padding, dilated, spacing = (y[:rank] if isinstance(y, tuple) else y for y in SPECIAL[special])
    names = ("images", "integer", None) if special == "SAME" else ("images", "integer")

    @jax.jit
    def run(x, q):
        return [
            conv_general_dilated(
                x,
                q,
                (2, 1, 2)[:rank],
                padding,
                dilated,
                spacing,
                dimension_numbers=(images, kernels, images),
                feature_group_count=2,
                implementation=implementation,
            )
            for implementation in names
        ]

    got, *others = run(x, q)
    for other in others:
        np.testing.assert_array_equal(got, other)


@pytest.mark.parametrize("padding", ["SAME", ((2, 1), (3, 1))], ids=str)
def test_a_window_larger_than_the_image_is_padded_first(padding):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 2, 8)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(5, 4, 1, 16)), jnp.float32)
    config = ArrayConfig()
    a, b = quantize(x, config, (1, 2, 3)), quantize(kernel, config, (0, 1, 2))
    options = {"dimension_numbers": NHWC, "feature_group_count": 8}
    run = partial(conv_general_dilated, a, b, (1, 1), padding, **options)
    found, wanted = run(implementation="images"), run(implementation="integer")
    np.testing.assert_array_equal(found, wanted)
    program = jax.jit(partial(run, implementation="images")).lower().as_text()
    assert "optimization_barrier" in program


@pytest.mark.parametrize("shape", [(0, 6, 7, 4), (2, 1, 7, 4)], ids=["no image", "no row left"])
@pytest.mark.parametrize("rank", [2, 3])
def test_empty_results_have_the_shape_of_the_float_ones(shape, rank):
    shape, letters = (*shape[:2], *(4,) * (rank - 2), *shape[2:]), "DHW"[-rank:]
    q = quantized(normal(3, *(2,) * (rank - 1), 4, 6), ArrayConfig(), axis=tuple(range(rank + 1)))
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    run = partial(
        conv_general_dilated,
        np.zeros(shape, np.float32),
        window_strides=(1,) * rank,
        padding="VALID",
        dimension_numbers=numbers,
    )
    q = with_inputs(q, Inputs(ArrayConfig()))
    shapes = [jax.eval_shape(lambda w=w: run(rhs=w)).shape for w in (q, q.dequantize())]
    assert shapes[0] == shapes[1] == run(rhs=q).shape


def test_images_with_out_sharding_raise():
    x, q = image("int8"), kernel(KERNELS["int8"])
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("x",)), jax.P())
    run = partial(conv_general_dilated, x, q, (1, 1), "SAME", dimension_numbers=NHWC)
    with pytest.raises(ValueError, match="sharding of a result is for one convolution"):
        run(out_sharding=sharding, implementation="images")


def test_images_of_one_pixel_have_no_spatial_axes():
    x, q = (
        quantized(normal(3, 4), ArrayConfig(), axis=1),
        quantized(normal(5, 4), ArrayConfig(), axis=1),
    )
    run = partial(conv_general_dilated, x, q, (), "VALID")
    np.testing.assert_array_equal(run(implementation="images"), run(implementation="integer"))


UNSUPPORTED = {
    "int8 scales .* change within an example or an output channel": ("int8-pixels", "int8"),
    "scales .* change within": ("int8", "int4-g2"),
    "padding does not have a zero point": ("int8", "int8-asym"),
    "an operand of float32 does not have codes": ("float", "int8"),
    "fp8_e4m3 codes are not integers within int8": ("int8", "fp8"),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_integer_raises_with_the_reason(message):
    kind, name = UNSUPPORTED[message]
    x = image(kind)
    with pytest.raises(ValueError, match=message.removeprefix("int8 ")):
        conv_general_dilated(
            x,
            kernel(KERNELS[name]),
            (1, 1),
            "VALID",
            dimension_numbers=NHWC,
            implementation="integer",
        )


def test_scales_of_another_axis_of_the_same_length_raise():
    run = partial(
        conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC
    )
    # As many rows as examples, and as many input channels as output channels.
    x = quantized(normal(6, 6, 7, 4), ArrayConfig(), axis=(0, 2, 3))
    q = quantized(normal(3, 2, 4, 4, seed=1), ArrayConfig(), axis=(0, 1, 3))
    images = quantized(normal(6, 6, 7, 4), *IMAGES["int8"])
    for lhs, rhs in ((x, kernel(KERNELS["int8"])), (images, q)):
        with pytest.raises(ValueError, match="change within an example or an output channel"):
            run(lhs, rhs, implementation="integer")


def test_long_sums_and_batch_groups_are_not_convolved_as_integers():
    long = quantized(np.ones((1, 1, 1, 131072), np.float32), ArrayConfig(), axis=3)
    tall = quantized(np.ones((1, 1, 131072, 1), np.float32), ArrayConfig(), axis=2)
    run = partial(
        conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=NHWC
    )
    with pytest.raises(ValueError, match="sums of 131072 codes may leave int32"):
        run(long, tall, implementation="integer")
    x, q = image("int8"), kernel(KERNELS["int8"])
    with pytest.raises(ValueError, match="batch groups mix the scales of examples"):
        run(x, q, batch_group_count=2, implementation="integer")
    got = run(x, q, batch_group_count=2)
    want = run(x.dequantize(), q.dequantize(), batch_group_count=2)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_both_implementations_give_the_same_numbers_and_dtypes():
    x, q = image("int8"), kernel(KERNELS["int8"])
    for implementation in ("images", "integer", "dequantize", None):
        got = conv_general_dilated(
            x,
            q,
            (1, 1),
            "VALID",
            dimension_numbers=NHWC,
            preferred_element_type=jnp.bfloat16,
            precision="highest",
            implementation=implementation,
        )
        assert got.dtype == jnp.bfloat16
        assert_conv(got, x, q, (1, 1), ((0, 0), (0, 0)), tolerance=2.0**-8)
    with pytest.raises(ValueError, match="preferred_element_type must be a floating-point dtype"):
        conv_general_dilated(x, q, (1, 1), "VALID", preferred_element_type=jnp.int32)


def test_bfloat16_images_sum_in_the_preferred_dtype():
    x = jnp.asarray(IMAGE, jnp.bfloat16)
    q = kernel(KERNELS["int8"]).astype(jnp.bfloat16)
    run = partial(
        conv_general_dilated, window_strides=(1, 1), padding="VALID", dimension_numbers=NHWC
    )
    got = run(x, q, preferred_element_type=jnp.float32)
    want = run(x, q.dequantize(), preferred_element_type=jnp.float32)
    assert run(x, q).dtype == jnp.bfloat16
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    assert np.any(got != got.astype(jnp.bfloat16).astype(jnp.float32))


def test_plain_arrays_go_to_lax_unchanged():
    w = normal(3, 2, 4, 6, seed=1)
    run = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": NHWC}
    want = jax.lax.conv_general_dilated(jnp.asarray(IMAGE), jnp.asarray(w), **run)
    np.testing.assert_array_equal(conv_general_dilated(jnp.asarray(IMAGE), w, **run), want)


@pytest.mark.parametrize("kernels", ["HWIO", "OIHW"])
def test_factors_per_element_of_a_window_fit_kernels_of_one_pixel_only(kernels):
    """As methods choose them, which see windows as rows."""
    x, factors = jnp.asarray(normal(2, 5, 4, 6)), jnp.asarray(np.arange(1.0, 7), jnp.float32)
    run = partial(
        conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", kernels, "NHWC"),
    )
    for size in (1, 3):
        lengths = {"H": size, "W": 1, "I": 6, "O": 7}
        inner = tuple(a for a, name in enumerate(kernels) if name != "O")
        q = quantize(normal(*(lengths[name] for name in kernels)), ArrayConfig(), inner)
        each = factors.reshape([6 if kernels[a] == "I" else 1 for a in inner])
        shape = [q.shape[a] for a in inner]
        treated = with_inputs(q, Inputs(multiplier=jnp.broadcast_to(each, shape)))
        if size == 1:
            np.testing.assert_allclose(
                run(x, treated), run(x * factors[None, None, None], q), rtol=1e-5, atol=1e-5
            )
            continue
        with pytest.raises(ValueError, match=r"one factor per input channel, .* for channels \(6,"):
            run(x, treated)
