"""Speeds beside the rows, what bounds a product, and warnings."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.measured import lines, with_speeds
from jaxquant import (
    FP8_E4M3,
    INT4,
    NF4,
    NVFP4,
    ArrayConfig,
    explain,
    matmul,
)
from jaxquant.explain import speeds as tables
from jaxquant.explain.speeds import MEASUREMENTS, Measurement, Speeds, speeds_near

from .operands import (
    G128,
    HAS_NATIVE,
    INT8_INPUTS,
    IS_MEASURED,
    SMALL,
    W8A8,
    floats,
    if_integer_panels,
    if_panels,
    stacked,
    stored,
)


@pytest.mark.parametrize(
    "rows, implementation, bound",
    [
        (8, "integer", "memory"),
        # 321 operations per byte: v5e does 481 on int8 in the time of a byte, and 241 on floats.
        (200, "integer", "memory"),
        (200, "dequantize", "arithmetic"),
        (2048, "integer", "arithmetic"),
    ],
)
def test_what_bounds_follows_from_the_rates_of_the_machine(rows, implementation, bound):
    run = partial(matmul, implementation=implementation)
    (row,) = explain(run, floats(rows, 4096), stored((4096, 4096), **W8A8), platform="v5e")
    assert row.bound == bound


LINES = (
    Speeds("int8", "float", "dequantize", (64, 24), {2: 3.0, 8: 0.5}),
    Speeds("int8", "float", "dequantize", (640, 24), {2: 0.4, 8: 0.3}),
    Speeds("int8", "int8", "integer", (64, 24), {5: 1.5}),
    Speeds("int4 g32", "float", "dequantize", (64, 24), {5: 1.1}),
)


@pytest.mark.parametrize(
    "shape, rows, wanted",
    [
        ((64, 24), 2, [(2, (64, 24), 3.0)]),
        ((64, 24), 5, [(2, (64, 24), 3.0), (8, (64, 24), 0.5)]),
        ((24, 64), 8, [(8, (64, 24), 0.5)]),
        ((100, 24), 8, [(8, (64, 24), 0.5), (8, (640, 24), 0.3)]),
        ((64, 24), 1, []),
        ((64, 24), 9, []),
        ((32, 24), 8, []),
        ((641, 24), 8, []),
    ],
)
def test_speeds_are_the_nearest_that_were_measured_on_both_sides(shape, rows, wanted):
    assert list(speeds_near(LINES[:2], shape, rows)) == wanted


def test_speeds_of_the_very_shape_come_before_those_of_its_size():
    turned = Speeds("int8", "float", "dequantize", (24, 64), {2: 2.0})
    assert speeds_near((*LINES[:2], turned), (24, 64), 2) == ((2, (24, 64), 2.0),)
    both = speeds_near((*LINES[:2], turned), (32, 48), 2)
    assert both == ((2, (64, 24), 3.0), (2, (24, 64), 2.0))


def test_rows_slower_than_float_have_a_warning(monkeypatch):
    here = Measurement("cpu", "float32", "the float product", "a test", LINES)
    monkeypatch.setattr(tables, "MEASUREMENTS", (here,))

    def warning(rows, q, **options):
        function = partial(matmul, **options)
        found = explain(function, floats(rows, 64), q, platform="cpu")
        return [speed for *_, speed in found.rows[0].speeds], found.rows[0].warning, str(found)

    assert warning(2, SMALL)[:2] == ([3.0], None)
    assert warning(5, SMALL)[:2] == ([3.0, 0.5], "the float product may be faster")
    speeds, words, text = warning(8, SMALL)
    assert (speeds, words) == ([0.5], "the float product is faster")
    assert "0.50" in text
    assert "the float product is faster" in text
    assert "the float product = 1, from a test" in text
    assert warning(5, stored((64, 24), **W8A8))[0] == [1.5]
    assert warning(5, stored((64, 24), format=INT4, group_size=32))[0] == [1.1]
    for speeds, words, text in (
        warning(9, SMALL),
        warning(5, stored((64, 24), **W8A8), implementation="dequantize"),
        warning(5, stored((64, 24), format=NF4)),
    ):
        assert speeds == []
        assert words is None or "by estimate" in words
        assert "measured" in text
        assert "a test" not in text


def test_speeds_are_of_one_matrix_dtype_and_machine(monkeypatch):
    here = Measurement("cpu", "float32", "the float product", "a test", LINES)
    monkeypatch.setattr(tables, "MEASUREMENTS", (here,))
    of_one = [row.speeds for row in explain(matmul, floats(2, 4, 64), SMALL, platform="cpu")]
    assert of_one == [((8, (64, 24), 0.5),)]
    for function, x, q, platform in (
        (matmul, floats(3, 2, 64), stacked(SMALL), "cpu"),
        (jax.vmap(matmul, (0, None)), floats(3, 2, 64), SMALL, "cpu"),
        (matmul, floats(2, 64, dtype=jnp.bfloat16), SMALL, "cpu"),
        (matmul, floats(2, 64), SMALL, "tpu"),
    ):
        with jax.numpy_dtype_promotion("standard"):
            (row,) = explain(function, x, q, platform=platform)
        assert row.speeds == ()


@pytest.mark.skipif(not HAS_NATIVE, reason="what was measured are the native kernels")
@pytest.mark.skipif(not IS_MEASURED, reason="it was measured with AVX512-VNNI")
def test_every_line_of_the_table_is_of_what_still_runs():
    configs = {"int8": {}, "int4 g128": G128, "nf4 g64": {"format": NF4, "group_size": 64}}
    (measurement,) = (m for m in MEASUREMENTS if m.machine == "cpu")
    for line in measurement.speeds:
        inputs = {"int8": INT8_INPUTS, "float": None}[line.inputs]
        q = stored(line.shape, inputs=inputs, **configs[line.weights])
        for rows, speed in line.by_rows.items():
            x = floats(rows, line.shape[0], dtype=measurement.dtype)
            (row,) = explain(matmul, x, q, platform=measurement.machine)
            assert row.implementation == line.implementation, (line, rows)
            assert row.speeds == ((rows, line.shape, speed),)
            assert (row.warning is None) == (speed >= 1)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_every_estimate_for_a_tpu_is_of_what_still_runs_and_warns_as_an_estimate(chip):
    floating = {"fp8_e4m3": {"format": FP8_E4M3}, "nvfp4 g16": {"format": NVFP4}}
    configs: dict[str, dict[str, Any]] = {"int8": {}, "int4 g128": G128, **floating}
    given = {"int8": INT8_INPUTS, "float": None, "fp8_e4m3": ArrayConfig(format=FP8_E4M3)}
    (measurement,) = (m for m in MEASUREMENTS if m.machine == chip)
    assert measurement.is_estimate
    assert "nothing ran" in measurement.how
    for line in measurement.speeds:
        q = stored(line.shape, None, given[line.inputs], **configs[line.weights])
        q = q.astype(jnp.bfloat16)
        for rows, speed in line.by_rows.items():
            x = floats(rows, line.shape[0], dtype=jnp.bfloat16)
            (row,) = explain(matmul, x, q, platform=chip)
            assert row.implementation == line.implementation, (line, rows)
            assert row.speeds == ((rows, line.shape, speed),)
            warning = "XLA's bfloat16 product is faster, by estimate" if speed < 1 else None
            assert row.warning == warning


# (format, chip, rows, (K, N) of the weights, the range of its estimates or None.)
REAL_WIDTHS = [
    ({"format": NVFP4}, "v5e", 16, (5120, 13824), (0.24, 0.24)),
    ({"format": NVFP4}, "v5e", 16, (3584, 3584), (0.37, 0.37)),
    ({"format": NVFP4}, "v6e", 16, (5120, 13824), (0.21, 0.21)),
    ({"format": NVFP4}, "v6e", 16, (3584, 3584), (0.36, 0.36)),
    ({"format": NVFP4}, "v6e", 1024, (5120, 13824), (0.33, 0.33)),
    (G128, "v5e", 1024, (5120, 13824), (0.52, 0.52)),
    (G128, "v5e", 1024, (3584, 3584), (0.71, 0.71)),
    # Not estimated themselves: those of the rows and sizes around them.
    (G128, "v5e", 1500, (5120, 13824), (0.52, 0.68)),
    ({"format": NVFP4}, "v5e", 60, (3584, 3328), (0.37, 0.62)),
    ({"format": NVFP4}, "v5e", 16, (5120, 5120), (0.24, 1.8)),
    (G128, "v5e", 1024, (8192, 28672), None),
]


@pytest.mark.parametrize("config, chip, rows, shape, wanted", REAL_WIDTHS)
def test_schemes_slower_than_bfloat16_on_a_tpu_have_a_warning_at_real_widths(
    config, chip, rows, shape, wanted
):
    q = stored(shape, None, **config).astype(jnp.bfloat16)
    (row,) = explain(matmul, floats(rows, shape[0], dtype=jnp.bfloat16), q, platform=chip)
    speeds = [speed for *_, speed in row.speeds]
    if wanted is None:
        assert (speeds, row.warning) == ([], None)
        return
    assert (min(speeds), max(speeds)) == wanted
    verb = "is" if max(speeds) < 1 else "may be"
    assert row.warning == f"XLA's bfloat16 product {verb} faster, by estimate"


def test_estimates_become_speeds_where_no_kernel_multiplies():
    def product(contender, time, kernel=0):
        about = {"chip": "v6e", "K": 384, "N": 701, "rows": 600, "operations": 9}
        found = {"is_ours": contender in "W8A8 W4A16", "dtype": "bfloat16"}
        estimate = {"compiler_estimate_microseconds": time, "kernel_operations": kernel}
        return {**about, **found, **estimate, "contender": contender}

    failed = {**product("W4A8", 0), "error": "no such groups"}
    del failed["compiler_estimate_microseconds"]
    products = [product("XLA bfloat16", 6), product("W8A8", 4, 1), product("W4A16", 1, 9), failed]
    found = lines(with_speeds(products), "bfloat16", "v6e")
    assert found == ["int8 | int8 | integer | 384x701 | 600:1.50"]


def test_results_of_the_suite_become_lines_of_the_table():
    result = {"K": 384, "N": 701, "is_ours": True, "in_cache": False, "dtype": "float32"}
    products = [
        {**result, "contender": "W8A8", "rows": 600, "speed": 1.234},
        {**result, "contender": "W8A8", "rows": 700, "speed": 0.5},
        {**result, "contender": "W4A16", "rows": 600, "speed": 2},
        {**result, "contender": "XLA float32", "rows": 600, "speed": 1, "is_ours": False},
        {**result, "contender": "W8A8", "rows": 600, "speed": 9, "in_cache": True},
        {**result, "contender": "W8A8", "rows": 600, "speed": 9, "dtype": "bfloat16"},
    ]
    found = lines(products, "float32")
    assert found == [
        f"int4 g128 | float | {if_panels('dequantize')} | 384x701 | 600:2.00",
        f"int8 | int8 | {if_integer_panels('integer')} | 384x701 | 600:1.23 700:0.50",
    ]
    assert [tables._line(line).by_rows for line in found] == [{600: 2.0}, {600: 1.23, 700: 0.5}]
