"""What runs, and what is said of it."""

import re
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from jax.sharding import PartitionSpec as P

from benchmarks.measured import lines, with_speeds
from jaxquant import (
    FP8_E4M3,
    INT4,
    NF4,
    NVFP4,
    ArrayConfig,
    Inputs,
    conv_general_dilated,
    einsum,
    explain,
    matmul,
    quantize,
    ragged_dot,
    scan,
    take,
)
from jaxquant.explain import speeds as tables
from jaxquant.explain.speeds import MEASUREMENTS, Measurement, Speeds, speeds_near
from jaxquant.kernels import cpu
from jaxquant.ops import record

from ..ops.products import normal, weight, with_inputs

K, N = 384, 701
HAS_NATIVE = cpu.unavailable() is None
PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}


def stored(shape=(K, N), order=(-1, -2), inputs=None, axis=0, **config):
    """Shapes alone of weights that are stored column by column."""

    whole = jax.ShapeDtypeStruct(shape, jnp.float32)
    q = jax.eval_shape(lambda w: quantize(w, ArrayConfig(**config), axis).reorder(order), whole)
    return with_inputs(q, inputs and Inputs(inputs))


def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


INT8_INPUTS = ArrayConfig()
W8A8 = {"inputs": INT8_INPUTS}
G128 = {"format": INT4, "group_size": 128}
convolve = partial(
    conv_general_dilated,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NCHW", "HWIO", "NCHW"),
)
KERNEL = stored((3, 3, 4, 6), None, INT8_INPUTS, axis=(0, 1, 2))
EXPERTS = stored((2, 8, 6), None, INT8_INPUTS, axis=1)
# With other instructions, XLA multiplies many rows.
HAS_PANELS = cpu.instruction_sets()[:1] == ("AVX512-VNNI",)
if_native = {True: "native"}.get(HAS_NATIVE, "blocks")


def if_panels(otherwise):
    return {True: "native"}.get(HAS_PANELS, otherwise)


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
        if_panels("integer"),
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
        "blocks",
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


WHOLE = {"W8A8": True, "W4A16": False, "W8A16": False, "convolution": True, "ragged": True}


@pytest.mark.parametrize("name", WHOLE)
def test_the_row_says_whether_codes_are_multiplied_as_whole_numbers(name):
    function, arguments, *_ = CASES[name]
    for platform in ("cpu", "tpu"):
        (row,) = explain(function, *arguments, platform=platform)
        assert row.is_integer == WHOLE[name], platform
    (row,) = explain(partial(function, implementation="dequantize"), *arguments)
    assert not row.is_integer


@pytest.mark.parametrize("rows", [5, 600])
def test_groups_of_4_bits_are_whole_numbers_by_the_native_kernels_and_floats_by_xla(rows):
    (row,) = explain(matmul, floats(rows, K), stored(**G128, **W8A8), platform="cpu")
    assert (
        row.is_integer
        == (row.implementation == "native")
        == (HAS_PANELS or (HAS_NATIVE and rows == 5))
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


def test_earlier_rows_of_the_platform_say_why_they_do_not_run():
    arguments = floats(200, K), stored(order=None)
    (row,) = explain(matmul, *arguments, platform="cpu")
    assert row.not_selected == (
        ("native", "the right operand is not stored as a matrix whose last axis is contracted"),
        ("blocks", "the right operand is not stored with one free axis, first"),
        ("integer", "an operand of float32 has no codes"),
    )
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
    assert row.not_selected[-1][1] == "an operand of float32 has no codes"
    (row,) = explain(matmul, floats(5, K), stored(**G128), platform="gpu")
    assert row.not_selected[0] == ("triton", "not measured on a GPU yet")


def test_what_is_forced_is_said_to_be():
    run = partial(matmul, implementation="blocks")
    for platform in PLATFORMS:
        (row,) = explain(run, floats(5, K), stored(), platform=platform)
        assert (row.implementation, row.is_forced, row.not_selected) == ("blocks", True, ())
    with pytest.raises(ValueError, match="implementation='integer' cannot run"):
        explain(partial(matmul, implementation="integer"), floats(5, K), stored())


def test_the_row_says_that_machine_code_is_missing(monkeypatch):
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


# Of a (5, 64) by (64, 24) product.
OPERATIONS = 2 * 5 * 64 * 24
INPUTS, WEIGHTS, RESULTS = 4 * 5 * 64, 64 * 24 + 4 * 24, 4 * 5 * 24
ALL = INPUTS + WEIGHTS + RESULTS
SMALL = stored((64, 24))
X = floats(5, 64)


def product(x, q):
    return jnp.tanh(matmul(x, q))


def total(x, q):
    return jnp.sum(product(x, q))


def in_scans(x, q):
    def inner(total, _):
        return total + product(x, q), None

    def outer(total, _):
        return jax.lax.scan(inner, total, None, length=3)[0], None

    return jax.lax.scan(outer, jnp.zeros((5, 24)), None, length=4)[0]


def in_a_while_loop(x, q):
    return jax.lax.while_loop(lambda out: jnp.max(out) < 1, lambda _: product(x, q), x[:, :24])


def in_branches(x, q):
    return jax.lax.cond(jnp.max(x) > 0, product, lambda x, q: -product(x, q), x, q)


def in_shards(x, q):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = P(None), jax.tree.map(lambda _: P(None), q)
    return jax.shard_map(product, mesh=mesh, in_specs=specs, out_specs=P(None))(x, q)


def transposed(x, q):
    return jax.linear_transpose(lambda x: matmul(x, q), x)(jnp.zeros((5, 24)))


stacked = partial(jax.tree.map, lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype))
# Name: (function, x, weights, [(copies, times, bytes, operations) of each row]).
TRANSFORMED = {
    "plain": (product, X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "jit": (jax.jit(jax.jit(product)), X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "vmap of inputs": (
        jax.vmap(product, (0, None)),
        stacked(X),
        SMALL,
        [(3, 1, 3 * INPUTS + WEIGHTS + 3 * RESULTS, 3 * OPERATIONS)],
    ),
    "vmap of weights": (
        jax.vmap(product, (None, 0)),
        X,
        stacked(SMALL),
        [(3, 1, INPUTS + 3 * WEIGHTS + 3 * RESULTS, 3 * OPERATIONS)],
    ),
    "vmap of both": (
        jax.vmap(product),
        stacked(X),
        stacked(SMALL),
        [(3, 1, 3 * ALL, 3 * OPERATIONS)],
    ),
    "vmap twice": (
        jax.vmap(jax.vmap(product, (0, None)), (None, 0)),
        stacked(X),
        stacked(SMALL),
        [(9, 1, 3 * INPUTS + 3 * WEIGHTS + 9 * RESULTS, 9 * OPERATIONS)],
    ),
    "scans": (in_scans, X, SMALL, [(1, 12, 12 * ALL, 12 * OPERATIONS)]),
    "while loop": (in_a_while_loop, floats(5, 64), stored((64, 24)), [(1, None, ALL, OPERATIONS)]),
    "branches": (in_branches, X, SMALL, [(1, 1, ALL, OPERATIONS)] * 2),
    "shards": (in_shards, X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "gradient": (jax.grad(total), X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "gradient of remat": (
        jax.grad(jax.checkpoint(total)),
        X,
        SMALL,
        [(1, 1, ALL, OPERATIONS)] * 2,
    ),
    "hessian": (jax.jacfwd(jax.grad(total)), X, SMALL, [(1, 1, ALL, OPERATIONS)]),
    "transposed": (transposed, X, SMALL, []),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_rows_survive_transformations(name):
    function, x, q, wanted = TRANSFORMED[name]
    rows = explain(function, x, q)
    assert [(r.copies, r.times, r.bytes, r.operations) for r in rows] == wanted


def test_what_was_traced_and_compiled_before_has_its_rows_again():
    x, q = jnp.asarray(normal(5, 64)), weight(ArrayConfig(), (64, 24))
    run = jax.jit(product)
    run(x, q).block_until_ready()
    for _ in range(2):
        assert len(explain(run, x, q)) == 1
        assert len(explain(lambda x: run(x, q) + run(2 * x, q), x)) == 2


def test_paths_are_scopes_and_jitted_functions_from_the_outside_in():
    @jax.jit
    def feed_forward(x, q):
        with jax.named_scope("up"):
            return product(x, q)

    def model(x, q):
        with jax.named_scope("layer[red]"):
            hidden = feed_forward(x, q)
        return hidden, jax.vmap(product, (0, None))(x.reshape(5, 1, 64), q)

    first, second = explain(model, X, SMALL)
    assert (first.path, second.path) == ("layer[red]/jit(feed_forward)/up", "vmap()")
    text = str(explain(model, X, SMALL))
    assert "layer[red]/jit(fe" in text


def test_lines_are_those_of_the_caller_also_when_traced_before():
    def one(x, q):
        return product(x, q)

    def other(x, q):
        return matmul(x, q)

    start = other.__code__.co_firstlineno
    for function in (one, other, one):
        (row,) = explain(function, X, SMALL)
        line = start + 1 if function is other else product.__code__.co_firstlineno + 1
        assert row.line == f"test_explain.py:{line}"
    with jax.disable_jit():
        assert len(explain(one, X, SMALL)) == 1


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
        assert "This function has no quantized products." in str(found)


def test_platforms_are_machines_and_others_are_refused():
    machines = {p: explain(matmul, X, SMALL, platform=p).machine.name for p in (*PLATFORMS, "v6e")}
    assert machines == {"cpu": "cpu", "tpu": "v5e", "gpu": "h200", "v6e": "v6e"}
    with pytest.raises(
        ValueError,
        match="platform must be one of cpu, tpu, v5e, v6e, gpu, h200, or None for the default "
        "device's; got 'npu'",
    ):
        explain(matmul, X, SMALL, platform="npu")


def test_the_default_is_the_device_that_is_here(monkeypatch):
    assert explain(matmul, X, SMALL).machine.name == "cpu"
    device = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert explain(matmul, X, SMALL).machine.name == "v6e"
    assert explain(matmul, X, SMALL, platform="tpu").machine.name == "v6e"
    assert explain(matmul, X, SMALL, platform="v5e").machine.name == "v5e"
    device.device_kind = "TPU v6e"
    assert explain(matmul, X, SMALL).machine.name == "v6e"


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


def test_float_products_that_were_faster_are_warned_of(monkeypatch):
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
        assert (speeds, words) == ([], None)
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
@pytest.mark.skipif(not HAS_PANELS, reason="it was measured with AVX512-VNNI")
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


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_every_estimate_for_a_tpu_is_of_what_still_runs_and_warns_as_an_estimate(chip):
    configs = {"int8": {}, "int4 g128": G128, "fp8_e4m3": {"format": FP8_E4M3}}
    configs["nvfp4 g16"] = {"format": NVFP4}
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
def test_schemes_that_are_slower_on_a_tpu_at_real_widths_are_warned_of(
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
        f"int8 | int8 | {if_panels('integer')} | 384x701 | 600:1.23 700:0.50",
    ]
    assert [tables._line(line).by_rows for line in found] == [{600: 2.0}, {600: 1.23, 700: 0.5}]


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match=r"explain expects a function .*; got QTensor\(int8"):
        explain(weight(ArrayConfig(), (64, 24)))


def sliced_by_index(x, layers):
    for i in range(3):
        x = matmul(x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
    return x


def taken_in_a_loop(x, layers):
    def step(i, x):
        return matmul(x, jax.tree.map(lambda leaf: jnp.take(leaf, i, 0), layers))

    return jax.lax.fori_loop(0, 3, step, x)


def by_a(scan, x, layers):
    return scan(lambda x, q: (jax.jit(matmul)(x, q), None), x, layers)[0]


def gradient_of(scan, x, layers):
    return jax.grad(lambda x: jnp.sum(by_a(scan, x, layers)))(x)


# What slices the weights of its products, by whether they are copied one by one.
SLICES = {
    "scan": (partial(by_a, jax.lax.scan), True),
    "ours": (partial(by_a, scan), False),
    "gradient of ours": (partial(gradient_of, scan), True),
    "vmap of ours": (lambda x, q: jax.vmap(partial(by_a, scan), (0, None))(x[None], q), False),
    "indices": (sliced_by_index, True),
    "take in a loop": (taken_in_a_loop, True),
    "ours in a scan": (
        lambda x, q: jax.lax.scan(
            lambda x, q: (by_a(scan, x, q), None),
            x,
            jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q),
        )[0],
        True,
    ),
    "one, turned": (lambda x, q: matmul(x, q.reorder(None).reorder((-1, -2))), False),
    "one in a loop": (
        lambda x, q: jax.lax.fori_loop(0, 3, lambda _, x: matmul(x, q), x),
        False,
    ),
}


@pytest.mark.skipif(not HAS_NATIVE, reason="XLA reads 4-bit weights as slowly as it slices them")
@pytest.mark.parametrize("name", SLICES)
def test_4_bit_weights_that_xla_slices_are_warned_of_on_cpu(name):
    function, is_slow = SLICES[name]
    words = (
        "XLA slices 4-bit weights one element at a time: use jaxquant.scan (without gradients), or "
        "keep the layers in separate arrays"
    )
    x = floats(5, 256)
    for config, platform, wanted in ((G128, "cpu", words), (G128, "tpu", None), ({}, "cpu", None)):
        q = stored((256, 256), **config)
        found = explain(function, x, q if "one" in name else stacked(q), platform=platform)
        assert {row.warning for row in found} == {wanted if is_slow else None}


def test_a_loop_copies_nothing_that_xla_reads_itself():
    layers = stacked(stored((128, 128), **G128))
    (row,) = explain(partial(by_a, jax.lax.scan), floats(5, 128), layers, platform="cpu")
    assert (row.implementation, row.warning) == ("dequantize", None)


def test_the_table_shows_each_row_and_how_often_it_runs():
    def model(x, q):
        forced = partial(matmul, implementation="dequantize")
        return (
            in_scans(x, q),
            in_a_while_loop(x, q),
            jax.vmap(forced, (0, None))(x.reshape(5, 1, 64), q),
        )

    found = explain(model, X, SMALL, platform="tpu")
    console = rich.console.Console(width=200, record=True)
    console.print(found)
    text = console.export_text()
    for words in (
        "5x64 by 64x24",
        "float32 by int8 per channel",
        "12 times in a loop",
        "in a loop of unknown length",
        "5 copies by vmap",
        "dequantize, in floating point, as requested",
        "not integer: an operand of float32 has no codes",
        "not measured",
        "memory",
        f"{12 * ALL / 1e6:.3f}",
        f"{12 * OPERATIONS / 1e6:.2f}",
        "is an estimate",
    ):
        assert words in text
    assert found.table().row_count == 3


@pytest.mark.parametrize(
    "config", [ArrayConfig(), ArrayConfig(format=INT4, group_size=32)], ids=str
)
def test_products_can_still_be_transposed(config):
    q, cotangent = weight(config, (64, 24)), jnp.asarray(normal(5, 24))
    (got,) = jax.linear_transpose(lambda x: matmul(x, q), X)(cotangent)
    np.testing.assert_allclose(got, cotangent @ q.dequantize().T, rtol=1e-4)


def test_records_are_short_where_programs_are_printed():
    x = record.operand_record(np.zeros(3))
    assert repr(record.Record("", x, x, (3,), 4, 1, None, (), False)) == "Record(, )"
