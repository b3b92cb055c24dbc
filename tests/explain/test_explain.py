"""Which computation runs, and why."""

import re
import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    INT4,
    ArrayConfig,
    conv_general_dilated,
    einsum,
    explain,
    matmul,
    ragged_dot,
    take,
)
from jaxquant.kernels import cpu
from jaxquant.ops import record

from ..ops.products import normal, quantized, weight
from .operands import (
    G128,
    HAS_INTEGER_PANELS,
    HAS_NATIVE,
    INT8_INPUTS,
    PLATFORMS,
    SMALL,
    W8A8,
    K,
    X,
    floats,
    if_integer_panels,
    if_native,
    if_panels,
    stored,
)

convolve = partial(
    conv_general_dilated,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NCHW", "HWIO", "NCHW"),
)


KERNEL = stored((3, 3, 4, 6), None, INT8_INPUTS, axis=(0, 1, 2))


EXPERTS = stored((2, 8, 6), None, INT8_INPUTS, axis=1)


# Name: (function, arguments, what runs on cpu, tpu and gpu).
CASES = {
    "W8A8": (
        matmul,
        (floats(5, K), stored(**W8A8)),
        {True: "native"}.get(HAS_NATIVE, "integer"),
        "integer",
        "integer",
    ),
    "W8A8, many rows": (
        matmul,
        (floats(600, K), stored(**W8A8)),
        if_integer_panels("integer"),
        "integer",
        "integer",
    ),
    "W4A16": (matmul, (floats(5, K), stored(**G128)), if_native, "fused", "dequantize"),
    "W8A16": (matmul, (floats(100, K), stored()), if_panels("blocks"), "dequantize", "dequantize"),
    "few rows": (matmul, (floats(50, K), stored()), if_panels("blocks"), "scaled", "dequantize"),
    "many rows": (
        matmul,
        (floats(600, K), stored()),
        if_panels("dequantize"),
        "dequantize",
        "dequantize",
    ),
    "grouped int8": (
        matmul,
        (floats(5, K), stored(axis=0, group_size=64)),
        if_native,
        "fused",
        "dequantize",
    ),
    "convolution": (convolve, (floats(2, 4, 5, 7), KERNEL), "images", "integer", "dequantize"),
    "ragged": (
        ragged_dot,
        (floats(5, 8), EXPERTS, jax.ShapeDtypeStruct((2,), jnp.int32)),
        "integer",
        "integer",
        "integer",
    ),
}


def implementation_in(text):
    """Which computation a lowered program holds, by what only it has."""
    products = re.findall(r"(?:dot_general|convolution|chlo.ragged_dot).* -> (.*)", text)
    is_integer = any("i32>" in result for result in products)
    signs = {
        "native": "custom_call @jaxquant_dot" in text,
        "images": is_integer and "convolution" in text and "optimization_barrier" in text,
        "integer": is_integer,
        "blocks": "stablehlo.while" in text,
        "dequantize": bool(products),
    }
    return next(name for name, found in signs.items() if found)


# What a lowered program does not tell from a product with dequantized weights.
ALIKE = ("scaled", "fused")


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", CASES)
def test_the_row_names_what_is_lowered_on_each_platform(name):
    function, arguments, *wanted = CASES[name]
    traced = jax.jit(function).trace(*arguments)
    for (platform, lowering), implementation in zip(PLATFORMS.items(), wanted, strict=True):
        (row,) = explain(function, *arguments, platform=platform)
        assert row.implementation == implementation, platform
        text = traced.lower(lowering_platforms=(lowering,)).as_text()
        seen = "dequantize" if implementation in ALIKE else implementation
        assert implementation_in(text) == seen, platform
        assert not row.is_forced


IS_INTEGER = {"W8A8": True, "W4A16": False, "W8A16": False, "convolution": True, "ragged": True}


@pytest.mark.parametrize("name", IS_INTEGER)
def test_the_row_says_whether_codes_are_multiplied_as_integers(name):
    function, arguments, *_ = CASES[name]
    for platform in ("cpu", "tpu"):
        (row,) = explain(function, *arguments, platform=platform)
        assert row.is_integer == IS_INTEGER[name], platform
    (row,) = explain(partial(function, implementation="dequantize"), *arguments)
    assert not row.is_integer


@pytest.mark.parametrize("rows", [5, 600])
def test_groups_of_4_bits_are_integers_in_the_native_kernels_and_floats_in_xla(rows):
    (row,) = explain(matmul, floats(rows, K), stored(**G128, **W8A8), platform="cpu")
    assert (
        row.is_integer
        == (row.implementation == "native")
        == (HAS_INTEGER_PANELS or (HAS_NATIVE and rows == 5))
    )
    (row,) = explain(matmul, floats(5, K), stored(format=INT4, **W8A8), platform="tpu")
    assert (row.implementation, row.is_integer) == ("integer", True)


@pytest.mark.skipif(not HAS_NATIVE, reason="the native kernels look codes up")
def test_codes_that_the_native_kernels_look_up_are_floats():
    q = stored(format=INT4, inputs=ArrayConfig(symmetric=False))
    (row,) = explain(matmul, floats(5, K), q, platform="cpu")
    assert (row.implementation, row.is_integer) == ("native", False)
    run = partial(matmul, implementation="integer")
    assert explain(run, floats(5, K), q).rows[0].is_integer


def test_empty_products_cost_nothing_but_their_results():
    (row,) = explain(matmul, floats(5, 0), stored((0, 24)))
    assert (row.operations, row.bytes) == (0, 4 * 24 + 4 * 5 * 24)


def test_earlier_rows_of_the_platform_say_why_they_are_not_selected():
    arguments = floats(200, K), stored(order=None)
    (row,) = explain(matmul, *arguments, platform="cpu")
    assert row.not_selected == (
        ("native", "the right operand is not stored as a matrix whose last axis is contracted"),
        ("blocks", "the right operand is not stored with one free axis, first"),
        ("integer", "an operand of float32 does not have codes"),
    )
    kernel = quantized(normal(4, 40, 256), ArrayConfig(), (1, 2))
    swapped = partial(einsum, "bhn,dnh->bd")
    (row,) = explain(swapped, jnp.ones((3, 256, 40)), kernel, platform="cpu")
    wanted = "the left operand is not contracted along its last axes, in their order"
    assert row.not_selected[0] == ("native", wanted)
    (row,) = explain(matmul, *arguments, platform="tpu")
    assert [name for name, _ in row.not_selected] == ["pallas", "integer", "scaled", "fused"]
    (row,) = explain(matmul, floats(300, K), stored(order=None, **G128), platform="v5e")
    assert row.not_selected[0] == ("pallas", "300 rows, more than 256, are faster by XLA on v5e")
    (row,) = explain(matmul, floats(20, K), stored(), platform="v6e")
    words = "rows, {}, are faster dequantized on"
    assert row.not_selected[-2] == ("scaled", f"20 {words.format('fewer than 65')} v6e")
    (row,) = explain(matmul, floats(70, K), stored(), platform="v6e")
    assert row.implementation == "scaled"
    (row,) = explain(matmul, floats(70, K), stored(), platform="v5e")
    assert row.not_selected[-2] == ("scaled", f"70 {words.format('more than 64')} v5e")
    (row,) = explain(matmul, *arguments, platform="gpu")
    assert [name for name, _ in row.not_selected] == ["triton", "integer"]
    assert row.not_selected[-1][1] == "an operand of float32 does not have codes"
    (row,) = explain(matmul, floats(5, K), stored(**G128), platform="gpu")
    assert row.not_selected[0] == ("triton", "not measured on a GPU yet")


def test_forced_rows_are_marked_as_forced():
    run = partial(matmul, implementation="blocks")
    for platform in PLATFORMS:
        (row,) = explain(run, floats(5, K), stored(), platform=platform)
        assert (row.implementation, row.is_forced, row.not_selected) == ("blocks", True, ())
    with pytest.raises(ValueError, match="implementation='integer' cannot run"):
        explain(partial(matmul, implementation="integer"), floats(5, K), stored())


def test_the_row_says_that_native_kernels_are_missing(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "there is no compiler")
    (row,) = explain(matmul, floats(3, 640), stored((640, 703)), platform="cpu")
    assert row.not_selected == (("native", "there is no compiler"),)
    assert row.implementation == "blocks"


def test_bytes_and_operations_are_those_counted_by_hand():
    q = stored((64, 24), format=INT4, group_size=32, symmetric=False)
    with jax.numpy_dtype_promotion("standard"):
        (row,) = explain(matmul, floats(5, 64, dtype=jnp.bfloat16), q)
    weights = 64 * 24 // 2 + 2 * 24 * 4 + 2 * 24 // 2
    assert row.bytes == 2 * 5 * 64 + weights + 4 * 5 * 24
    assert row.operations == 2 * 5 * 64 * 24
    assert row.shapes == ((5, 64), (64, 24), (5, 24))
    assert row.formats == ("bfloat16", "int4 g32 asymmetric")
    assert row.operation == "dot_general"

    (row,) = explain(matmul, floats(7, 5, 64), stored((64, 24), **W8A8))
    assert row.bytes == 35 * 64 + 4 * 35 + 64 * 24 + 4 * 24 + 4 * 35 * 24
    assert row.operations == 2 * 35 * 64 * 24
    assert row.formats == ("int8", "int8 per channel")

    (row,) = explain(convolve, floats(2, 4, 5, 7), KERNEL)
    assert row.operations == 2 * (2 * 5 * 7 * 6) * (3 * 3 * 4)
    assert row.shapes == ((2, 4, 5, 7), (3, 3, 4, 6), (2, 6, 5, 7))
    assert row.operation == "conv_general_dilated"

    function, arguments, *_ = CASES["ragged"]
    (row,) = explain(function, *arguments)
    assert row.bytes == 5 * 8 + 4 * 5 + 2 * 8 * 6 + 4 * 2 * 6 + 4 * 5 * 6
    assert (row.operations, row.operation) == (2 * 5 * 8 * 6, "ragged_dot")


def test_weights_on_the_left_are_described_as_weights():
    (row,) = explain(partial(einsum, "nk,mk->nm"), stored((24, 64), None, axis=1), floats(5, 64))
    assert row.formats == ("int8 per channel", "float32")
    assert row.operations == 2 * 24 * 64 * 5


def test_operands_of_any_dtype_have_bytes():
    for dtype, size in ((jnp.bool_, 1), (jnp.complex64, 8)):
        with jax.numpy_dtype_promotion("standard"):
            (row,) = explain(matmul, floats(5, 64, dtype=dtype), stored((64, 24)))
        results = 5 * 24 * max(size, 4)
        assert row.bytes == 5 * 64 * size + 64 * 24 + 4 * 24 + results


def test_only_the_branch_of_the_platform_is_explained():
    def run(x, q):
        forced = partial(matmul, implementation="blocks")
        return jax.lax.platform_dependent(
            x, q, cuda=forced, tpu=matmul, default=lambda x, q: x @ q.dequantize()
        )

    found = {
        p: [r.is_forced for r in explain(run, X, stored((64, 520)), platform=p)] for p in PLATFORMS
    }
    assert found == {"cpu": [], "tpu": [False], "gpu": [True]}


def test_a_function_without_quantized_products_has_no_rows_and_says_so():
    for function in (lambda x, q: x @ x.T, lambda x, q: take(q, jnp.arange(3), 0)):
        found = explain(function, X, SMALL)
        assert (list(found), len(found)) == ([], 0)
        assert "This function does not contain quantized products." in str(found)


def test_platforms_are_machines_and_others_are_errors():
    machines = {p: explain(matmul, X, SMALL, platform=p).machine.name for p in (*PLATFORMS, "v6e")}
    assert machines == {"cpu": "cpu", "tpu": "v5e", "gpu": "h200", "v6e": "v6e"}
    with pytest.raises(
        ValueError,
        match="platform must be one of cpu, tpu, v5e, v6e, gpu, h200, or None for the default "
        "device's; got 'npu'",
    ):
        explain(matmul, X, SMALL, platform="npu")


def test_the_default_is_the_device_of_this_process(monkeypatch):
    assert explain(matmul, X, SMALL).machine.name == "cpu"
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert explain(matmul, X, SMALL).machine.name == "v6e"
    assert explain(matmul, X, SMALL, platform="tpu").machine.name == "v6e"
    assert explain(matmul, X, SMALL, platform="v5e").machine.name == "v5e"
    device.device_kind = "TPU v6e"
    assert explain(matmul, X, SMALL).machine.name == "v6e"


def test_anything_but_a_function_is_an_error():
    array: Any = weight(ArrayConfig(), (64, 24))
    with pytest.raises(ValueError, match=r"explain expects a function .*; got QTensor\(int8"):
        explain(array)


def test_records_are_short_where_programs_are_printed():
    x = record.operand_record(np.zeros(3))
    assert repr(record.Record("", x, x, (3,), 4, 1, None, (), False)) == "Record(, )"
