"""Convolutions by native kernels and by shifted images, against XLA's integers and floats."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    INT4,
    ArrayConfig,
    Inputs,
    conv_general_dilated,
    explain,
    quantize,
)
from jaxquant.kernels import cpu
from jaxquant.ops.rows import conv_native, cpu_native

from ..products import normal

needs_native = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"
)
SIZES = {"N": 2, "C": 6, "H": 7, "W": 9, "D": 5}
WINDOWS = {"H": 3, "W": 2, "D": 2}
# (axes of the images, of the kernel, of the result, options).
LAYOUTS = [
    ("NHWC", "HWIO", "NHWC", {"padding": "SAME"}),
    ("NHWC", "OHWI", "NHWC", {"padding": "VALID", "window_strides": (2, 3)}),
    ("NCHW", "OIHW", "NHWC", {"padding": ((1, 2), (0, -1)), "rhs_dilation": (2, 1)}),
    ("CHWN", "IHWO", "CNHW", {"padding": ((2, 1), (1, 1)), "lhs_dilation": (2, 3)}),
    ("NWC", "WIO", "NCW", {"padding": "SAME"}),
    ("NDHWC", "DHWIO", "NDHWC", {"padding": "SAME", "window_strides": (1, 2, 1)}),
    # Windows that are larger than the images.
    ("NHWC", "HWIO", "NHWC", {"padding": "VALID", "rhs_dilation": (4, 1)}),
]


@pytest.fixture(autouse=True)
def any_number_of_rows(monkeypatch):
    """Kernels compute any number of rows, also with instructions with which XLA is faster."""
    monkeypatch.setattr(cpu_native, "_MOST_ROWS", {key: {} for key in cpu_native._MOST_ROWS})


def arrays(images, kernels, inputs, outputs, channels=SIZES["C"]):
    lengths = {**SIZES, "C": channels}
    windows = {**WINDOWS, "I": inputs, "O": outputs}
    x = jnp.asarray(normal(*(lengths[a] for a in images)))
    return x, normal(*(windows[a] for a in kernels), seed=1)


def convolved(layout, **more):
    images, kernels, results, options = layout
    rank = len(images) - 2
    return partial(
        conv_general_dilated,
        **{"window_strides": (1,) * rank, **options, **more},
        dimension_numbers=(images, kernels, results),
    )


def kernel_of(w, kernels, config, inputs=None, kept="O"):
    axes = tuple(a for a, name in enumerate(kernels) if name not in kept)
    q = quantize(jnp.asarray(w), config, axes)
    return q if inputs is None else dataclasses.replace(q, inputs=Inputs(inputs))


def assert_same(run, x, q, name, tolerance=2e-6):
    """The same as XLA makes of the same codes."""
    is_integer = q.inputs is not None and q.format.bits == 8 and q.zero_point is None
    got = jax.jit(partial(run, implementation=name))(x, q)
    wanted = jax.jit(partial(run, implementation="integer" if is_integer else "dequantize"))(x, q)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    scale = float(jnp.max(jnp.abs(wanted), initial=0))
    np.testing.assert_allclose(
        got.astype(jnp.float32), wanted.astype(jnp.float32), rtol=tolerance, atol=tolerance * scale
    )


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_channels_alone_are_shifted_images(layout):
    for outputs in (1, 3):
        run = convolved(layout, feature_group_count=SIZES["C"])
        x, w = arrays(layout[0], layout[1], 1, SIZES["C"] * outputs)
        for inputs in (None, ArrayConfig()):
            assert_same(run, x, kernel_of(w, layout[1], ArrayConfig(), inputs), "shifted")
    q = kernel_of(w, layout[1], ArrayConfig(format=INT4, symmetric=False))
    assert_same(run, x.astype(jnp.bfloat16), q.astype(jnp.bfloat16), "shifted", 2.0**-7)


@needs_native
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_patches_are_multiplied_by_the_native_kernels(layout):
    run = convolved(layout)
    x, w = arrays(layout[0], layout[1], SIZES["C"], 20)
    for config in (ArrayConfig(), ArrayConfig(symmetric=False)):
        for inputs in (None, ArrayConfig()):
            assert_same(run, x, kernel_of(w, layout[1], config, inputs), "native")
    q = kernel_of(w, layout[1], ArrayConfig(), ArrayConfig(per_tensor=True))
    assert_same(run, x, q, "native")
    # 6 channels, and zeros to fill words.
    assert_same(run, x, q, "images")
    text = jax.jit(partial(run, implementation="images")).lower(x, q).as_text()
    assert re.search(r"convolution\(.*x8xi8>.*x8x20xi8>", text)
    assert_same(run, x.astype(jnp.bfloat16), q.astype(jnp.bfloat16), "native", 2.0**-7)


@needs_native
@pytest.mark.parametrize("group", [None, 8])
def test_4_bit_kernels_that_are_stored_as_matrices(group):
    run = convolved(("NHWC", "HWIO", "NHWC", {"padding": "SAME"}))
    x, w = arrays("NHWC", "HWIO", 24, 20, channels=24)
    sizes = None if group is None else (None, None, group)
    for is_symmetric in (True, False):
        config = ArrayConfig(format=INT4, group_size=sizes, symmetric=is_symmetric)
        for inputs in (None, ArrayConfig()):
            q = kernel_of(w, "HWIO", config, inputs)
            with pytest.raises(ValueError, match="not stored with its output axis first and its"):
                run(x, q, implementation="native")
            assert_same(run, x, q.reorder((-1, -4, -3, -2)), "native")


@pytest.mark.parametrize(
    "name, groups", [pytest.param("native", 1, marks=needs_native), ("shifted", 6)]
)
def test_convolutions_batch_and_differentiate(name, groups):
    run = convolved(LAYOUTS[0], feature_group_count=groups)
    x, w = arrays("NHWC", "HWIO", 6 // groups, 12)
    q = kernel_of(w, "HWIO", ArrayConfig(), ArrayConfig())
    forced = partial(run, implementation=name)
    each = jax.jit(jax.vmap(forced, (0, None)))(jnp.stack([x, -x]), q)
    np.testing.assert_allclose(each, jnp.stack([run(x, q), run(-x, q)]), rtol=1e-5, atol=1e-4)
    slope = jax.jit(jax.grad(lambda x, q: (forced(x, q) ** 2).sum()))
    wanted = jax.grad(lambda x, q: (run(x, q, implementation="dequantize") ** 2).sum())
    np.testing.assert_allclose(slope(x, q), wanted(x, q), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "name, groups", [pytest.param("native", 1, marks=needs_native), ("shifted", 6), ("images", 1)]
)
def test_nan_spoils_only_its_image(name, groups):
    run = convolved(LAYOUTS[0], feature_group_count=groups, implementation=name)
    x, w = arrays("NHWC", "HWIO", 6 // groups, 12)
    q = kernel_of(w, "HWIO", ArrayConfig(), ArrayConfig())
    spoiled = run(x.at[1, 2, 3, 4].set(jnp.nan), q)
    np.testing.assert_array_equal(spoiled[0], run(x, q)[0])
    assert np.isnan(spoiled[1]).all()


def test_empty_images():
    x, w = arrays("NHWC", "HWIO", 1, 6)
    run = convolved(("NHWC", "HWIO", "NHWC", {"padding": "SAME"}), feature_group_count=6)
    q = kernel_of(w, "HWIO", ArrayConfig(), ArrayConfig())
    assert run(x[:0], q, implementation="shifted").shape == (0, 7, 9, 6)
    if cpu.unavailable() is None:
        x, w = arrays("NHWC", "HWIO", 6, 20)
        run = convolved(("NHWC", "HWIO", "NHWC", {"padding": "SAME"}))
        q = kernel_of(w, "HWIO", ArrayConfig(), ArrayConfig())
        assert run(x[:0], q, implementation="native").shape == (0, 7, 9, 20)
        q = kernel_of(w[:, :, :0], "HWIO", ArrayConfig(), ArrayConfig())
        with pytest.raises(ValueError, match="there are no weights"):
            run(x[..., :0], q, implementation="native")
        np.testing.assert_array_equal(run(x[..., :0], q), np.zeros((2, 7, 9, 20)))


def names(x, q, **options):
    run = convolved(("NHWC", "HWIO", "NHWC", {"padding": "SAME", **options}))
    (row,) = explain(run, x, q, platform="cpu")
    return row.implementation, dict(row.not_selected)


@needs_native
def test_rows_that_are_not_selected_say_why(monkeypatch):
    int8 = ArrayConfig()
    x = jnp.ones((2, 8, 8, 64))
    wide = kernel_of(normal(3, 3, 64, 128), "HWIO", int8, int8)
    assert names(x, wide)[0] == "native"
    with monkeypatch.context() as limits:
        limits.setattr(conv_native, "_MOST_BYTES", 1000)
        reason = f"patches would take {64 * 9 * 64} bytes"
        assert names(x[:1], wide)[1]["native"] == reason
    found, reasons = names(x, kernel_of(normal(3, 3, 64, 120), "HWIO", int8, int8))
    assert found == "images"
    assert reasons["native"].endswith("longer to copy than to convolve to fewer than 128 outputs")
    assert reasons["shifted"] == "channels are not convolved each by itself"
    for inputs, least in ((None, 2048), (int8, 8192)):
        for outputs, name in ((least // 64, True), (least // 64 - 1, False)):
            small = kernel_of(normal(1, 1, 64, outputs), "HWIO", int8, inputs)
            found, reasons = names(x, small)
            assert (found == "native") == name
            assert name or reasons["native"] == f"fewer than {least} weights"
    found, reasons = names(x, dataclasses.replace(wide, inputs=None))
    assert found == "dequantize"
    assert reasons["native"] == "patches of floats take longer to copy than to convolve"
    asymmetric = dataclasses.replace(wide, inputs=Inputs(ArrayConfig(symmetric=False)))
    reason = "the images do not have symmetric int8 codes with one scale each"
    assert names(x, asymmetric)[1]["native"] == reason
    alone = kernel_of(normal(3, 3, 1, 64), "HWIO", int8, int8)
    found, reasons = names(x, alone, feature_group_count=64)
    assert (found, reasons) == ("shifted", {"native": "channels or images are in groups"})
    several = kernel_of(normal(3, 3, 1, 320), "HWIO", int8, int8)
    _, reasons = names(x, several, feature_group_count=64)
    assert reasons["shifted"] == "5 outputs per channel, more than 4"
    large = kernel_of(normal(9, 9, 1, 64), "HWIO", int8, int8)
    _, reasons = names(x, large, feature_group_count=64)
    assert reasons["shifted"] == "windows of 81 pixels, not of 1 to 64"
    floats = quantize(x, int8, axis=(1, 2, 3))
    assert names(floats, jnp.ones((3, 3, 64, 8)))[1]["native"] == "the kernel is not quantized"


@needs_native
def test_partitioned_programs_convolve_by_xla():
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("a",), axis_types=kinds)
    q = kernel_of(normal(3, 3, 64, 256), "HWIO", ArrayConfig(), ArrayConfig())
    alone = kernel_of(normal(3, 3, 1, 64), "HWIO", ArrayConfig(), ArrayConfig())
    x = jnp.asarray(normal(8, 5, 5, 64))
    parts = jax.device_put(x, jax.NamedSharding(mesh, jax.P("a")))

    @jax.jit
    def run(x, q, alone):
        x = convolved(LAYOUTS[0])(x, q)[..., ::4]
        return convolved(LAYOUTS[0], feature_group_count=64)(x, alone)

    text = run.lower(parts, q, alone).compile().as_text() or ""
    assert "jaxquant_dot" not in text
    assert "all-gather" not in text
    np.testing.assert_allclose(run(parts, q, alone), run(x, q, alone), rtol=1e-4, atol=1e-2)
