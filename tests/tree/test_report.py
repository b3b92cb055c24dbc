import builtins
import dataclasses
import io
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from jaxquant import (
    FP8,
    FP8_E5M2,
    INT2,
    INT4,
    INT8,
    MXFP4A16,
    MXFP8A8,
    NF4A16,
    NVFP4A16,
    W4A8,
    W4A16,
    W4A16_ASYM,
    W8A8,
    W8A16,
    ArrayConfig,
    Format,
    Rule,
    explain,
    matmul,
    quantize,
    tree,
)

from .. import oracles
from .trees import leaves_of, normal, parameters

RULES = [
    Rule("embed/*", W8A16, axis=-1),
    Rule("*norm*", None, note="a norm"),
    Rule("*/kernel", W4A8, group_size=32),
    Rule("*bias", None),
    Rule("out/0", W8A8),
]
# Path: bytes before, bytes after, scheme or reason.
WANTED = {
    "embed/table": (48 * 64 * 4, 48 * 64 + 48 * 4, "int8 per channel"),
    "layers/norm/scale": (2 * 64 * 4, 2 * 64 * 4, "a norm"),
    "layers/up/bias": (2 * 128 * 4, 2 * 128 * 4, "left by rule '*bias'"),
    "layers/up/kernel": (
        2 * 64 * 128 * 4,
        2 * 64 * 128 // 2 + 2 * 2 * 128 * 4,
        "int4 g32, int8 inputs",
    ),
    "out/0": (64 * 32 * 4, 64 * 32 + 32 * 4, "int8 per channel, int8 inputs"),
    "out/1": (32 * 4, 32 * 4, "no rule matches"),
    "steps": (6 * 4, 6 * 4, "no rule matches"),
}


def rows_of(params, quantized, rules=None):
    return {row.path: row for row in tree.report(params, quantized, rules).rows}


def test_each_leaf_has_a_row_with_its_bytes_and_scheme_or_reason():
    params = parameters()
    quantized = tree.quantize(params, RULES)
    rows = rows_of(params, quantized, RULES)
    assert list(rows) == list(leaves_of(params))
    for path, (before, after, what) in WANTED.items():
        row = rows[path]
        is_left = leaves_of(quantized)[path] is leaves_of(params)[path]
        assert (row.reason, row.scheme) == ((what, None) if is_left else (None, what))
        assert (row.bytes_before, row.bytes_after) == (before, after)
        assert row.shape == leaves_of(params)[path].shape
        assert row.bits_per_weight == 8 * after / math.prod(row.shape)


def test_the_total_sums_the_rows():
    params = parameters()
    total = tree.report(params, tree.quantize(params, RULES), RULES).total
    before, after = (sum(sizes) for sizes in list(zip(*WANTED.values(), strict=True))[:2])
    size = sum(leaf.size for leaf in leaves_of(params).values())
    assert (total.bytes_before, total.bytes_after, total.shape) == (before, after, (size,))
    assert total.bits_per_weight == 8 * after / size
    assert total.scheme == "3 of 7 leaves quantized"
    assert (total.path, total.sqnr, total.reason) == ("total", None, None)


def test_the_total_of_an_empty_report_is_zero():
    report = tree.report({}, {})
    assert report.rows == ()
    assert (report.total.bytes_after, report.total.bits_per_weight) == (0, 0)
    assert "0 of 0 leaves quantized" in str(report)


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", [W8A8, W4A16_ASYM, NVFP4A16], ids=["W8A8", "W4A16_ASYM", "NVFP4A16"]
)
def test_signal_to_noise_equals_that_of_the_oracle(scheme):
    params = {"w": jnp.asarray(normal(256, 32)), "v": jnp.asarray(normal(2, 128, 8, seed=1))}
    quantized = tree.quantize(params, scheme)
    for path, row in rows_of(params, quantized).items():
        wanted = oracles.sqnr(params[path], oracles.dequantize(quantized[path]))
        assert row.sqnr is not None
        assert abs(row.sqnr - wanted) < 1e-3


@pytest.mark.parametrize("magnitude", [1e-36, 1e-30, 1e-19, 1.0, 1e20, 1e30])
def test_signal_to_noise_does_not_depend_on_the_unit(magnitude):
    params = {"w": jnp.asarray(normal(256, 32) * np.float32(magnitude))}
    quantized = {"w": quantize(params["w"], ArrayConfig(format=INT4, group_size=64))}
    wanted = oracles.sqnr(params["w"], oracles.dequantize(quantized["w"]))
    assert rows_of(params, quantized)["w"].sqnr == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("magnitude", [1e-60, 1.0, 1e60])
def test_signal_to_noise_of_float64_is_computed_in_float64(magnitude):
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(normal(256, 32).astype(np.float64) * magnitude)}
        config = ArrayConfig(format=INT8, scale_dtype="float64")
        quantized = {"w": quantize(params["w"], config)}
        found = rows_of(params, quantized)["w"].sqnr
    wanted = oracles.sqnr(params["w"], oracles.dequantize(quantized["w"]))
    assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.slow
def test_signal_to_noise_is_infinite_without_noise_and_absent_without_a_comparison():
    grid = jnp.asarray(np.arange(-127, 129, 2).reshape(8, 16), jnp.float32)
    lossless = jnp.clip(grid, -127, 127).at[0].set(127)
    params = {"a": lossless, "b": jnp.zeros((8, 4)), "c": jnp.zeros((8, 4)), "d": jnp.ones(3)}
    config = ArrayConfig()
    quantized = {k: quantize(v, config) for k, v in params.items() if k != "d"}
    quantized |= {"c": quantize(jnp.ones((8, 4)), config), "d": params["d"]}
    report = tree.report(params, quantized)
    assert [r.sqnr for r in report.rows] == [math.inf, math.inf, -math.inf, None]
    assert [r["sqnr"] for r in report.to_json()["rows"]] == [None] * 4
    assert [r.sqnr for r in tree.report(None, quantized).rows] == [None] * 4
    assert [r.sqnr for r in tree.report(quantized, quantized).rows] == [None] * 4


@pytest.mark.parametrize(
    "leaf, reason, bytes_before",
    [
        (np.ones((2, 3), np.int64), "not floating: int64", 48),
        (np.ones(3, bool), "not floating: bool", 3),
        (jnp.ones((3, 5), jnp.int4), "not floating: int4", 8),
        (jnp.ones(5, jnp.bfloat16), "left as bfloat16, 1 axis", 10),
        (np.ones((2, 3), np.float64), "left as float64, 2 axes", 48),
        (2.5, "not an array: float", 8),
        (np.float32(2), "left as float32, 0 axes", 4),
    ],
)
def test_a_leaf_left_in_float_has_a_reason(leaf, reason, bytes_before):
    row = rows_of({"x": leaf}, {"x": leaf})["x"]
    assert row.reason == reason
    assert (row.bytes_before, row.bytes_after, row.codes) == (bytes_before, bytes_before, ())


def test_default_rules_give_the_name_as_reason_to_skip_a_norm():
    params = parameters()
    rows = rows_of(params, tree.quantize(params, W8A8), W8A8)
    assert rows["layers/norm/scale"].reason == "a norm or bias, by its name"
    assert rows["out/1"].reason == "no rule matches"


def test_without_the_float_tree_bytes_before_are_those_of_its_dtype():
    x = jnp.asarray(normal(64, 32)).astype(jnp.bfloat16)
    row = rows_of(None, tree.quantize({"x": x}, W8A16))["x"]
    assert (row.bytes_before, row.bytes_after) == (64 * 32 * 2, 64 * 32 + 32 * 4)


@pytest.mark.slow
@pytest.mark.some_rows(3)
@pytest.mark.parametrize(
    "scheme, text",
    [
        (W8A8, "int8 per channel, int8 inputs"),
        (W8A16, "int8 per channel"),
        (W4A16, "int4 g128"),
        (W4A16_ASYM, "int4 g128 asymmetric"),
        (W4A8, "int4 g128, int8 inputs"),
        (FP8, "fp8_e4m3 per channel, fp8_e4m3 inputs"),
        (NF4A16, "nf4 g64"),
        (MXFP8A8, "mxfp8 g32, mxfp8 inputs"),
        (MXFP4A16, "mxfp4 g32"),
        (NVFP4A16, "nvfp4 g16"),
        (ArrayConfig(format=INT2, per_tensor=True), "int2 per tensor"),
        (Rule("w", ArrayConfig(group_size=(32, 16)), axis=(0, 1)), "int8 g32x16"),
        (ArrayConfig(symmetric=False), "int8 per channel asymmetric"),
    ],
)
def test_schemes_are_described_in_the_words_of_the_field(scheme, text):
    rule = scheme if isinstance(scheme, Rule) else Rule("w", scheme)
    q = tree.quantize({"w": np.ones((256, 64), np.float32)}, rule)["w"]
    for order in (None, (-1, -2)):
        assert tree.describe(q.reorder(order)) == text


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "config, bins",
    [
        (ArrayConfig(format=INT8), 16),
        (ArrayConfig(format=INT4), 16),
        (ArrayConfig(format=INT2), 4),
        (ArrayConfig(format=INT2, symmetric=False), 4),
        (ArrayConfig(format=FP8_E5M2), 16),
        (NF4A16.weights, 16),
        (MXFP4A16.weights, 16),
    ],
    ids=lambda v: str(getattr(v, "format", v)),
)
def test_the_histogram_counts_codes_in_equal_bins_over_the_range_of_the_format(config, bins):
    q = quantize(normal(64, 32), config)
    codes = np.asarray(q.codes).astype(np.float64).reshape(-1)
    low, high = config.format.qmin, config.format.qmax
    if config.format.codebook is not None:
        low, high = 0, len(config.format.codebook) - 1
    if np.all(codes == codes.round()) and high - low < 300:
        edges = np.linspace(low, high + 1, bins + 1)
    else:
        edges = np.linspace(low, high, bins + 1)
    wanted = np.histogram(np.clip(codes, low, None), edges)[0]
    found = rows_of(None, {"q": q})["q"].codes
    assert sum(found) == q.size
    assert list(found) == wanted.tolist()


def test_codes_are_counted_exactly_for_any_size_dtype_and_devices():
    odd = quantize(normal(5, 7), ArrayConfig(format=INT8))
    wide = ArrayConfig(format=Format("int16", "int16", -32768, 32767))
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    codes = jax.NamedSharding(mesh, jax.P("a"))
    sharded = quantize(normal(64, 32), ArrayConfig(format=INT8))
    sharded = dataclasses.replace(sharded, codes=jax.device_put(sharded.codes, codes))
    trees = {
        "odd": odd,
        "wide": quantize(normal(5, 7), wide),
        "NaN": quantize(np.full((5, 7), np.nan, np.float32), FP8.weights),
        "sharded": sharded,
        "empty": quantize(np.zeros((0, 7), np.float32), ArrayConfig()),
    }
    rows = rows_of(None, trees)
    for name, q in trees.items():
        assert sum(rows[name].codes) == q.size, name
    for name in ("odd", "wide", "sharded"):
        low, high = (trees[name].format.qmin, trees[name].format.qmax + 1)
        wanted = np.histogram(np.asarray(trees[name].codes), np.linspace(low, high, 17))[0]
        assert rows[name].codes == tuple(wanted.tolist())


@pytest.mark.some_rows(4)
@pytest.mark.parametrize(
    "path, shape, rules, text",
    [
        ("attention/query", (64, 2, 32), W8A8, "scales take 16.0 bits per weight; give a rule"),
        ("attention/query", (64, 2, 32), {"*": W8A8}, "scales take 16.0 bits per weight; give a"),
        ("attention/query", (4, 64, 32), W8A8, "taken as a stack of matrices; if it is not, give"),
        ("dense.weight", (64, 32), W8A8, "taken as (in, out); if it is (out, in), use default_ru"),
        ("weight", (64, 32), W8A8.weights, "taken as (in, out); if it is (out, in), use default"),
        ("attention/query", (4, 64, 32), tree.default_rules(W8A8), "taken as a stack of matrices"),
        ("dense.weight", (64, 32), tree.default_rules(W8A8), "taken as (in, out); if it is"),
        ("a.weight", (64, 32), [Rule("b", None, required=False), *tree.default_rules(W8A8)], "ta"),
        ("dense.weight", (64, 32), tree.default_rules(W8A8, axis=-1), None),
        ("dense/kernel", (64, 32), tree.default_rules(W8A8, axis=-1), "taken as (out, in); if it"),
        ("q.weight", (4, 64, 32), tree.default_rules(W8A8, axis=-1), "taken as a stack"),
        ("dense.weight", (64, 32), {"*": W8A8}, None),
        ("layers/up/kernel", (4, 64, 32), W8A8, None),
        ("h/up/kernel", (4, 64, 32), W8A8, None),
        ("conv/kernel", (4, 64, 32), W8A8, None),
        ("dense/kernel", (64, 32), W8A8, None),
        ("embed.weight", (64, 32), W8A8, None),
        ("dense/kernel", (64, 32), NVFP4A16, None),
    ],
)
def test_a_row_warns_where_the_axis_may_be_wrong(path, shape, rules, text):
    params = {path: np.ones(shape, np.float32)}
    report = tree.report(params, tree.quantize(params, rules), rules)
    (row,) = report.rows
    assert (row.warning or "").startswith(text or "")
    assert (row.warning is None) == (text is None)
    assert ("warning: " in str(report)) == (text is not None)


def test_reports_are_texts_in_jupyter_too(monkeypatch):
    params = {"kernel": jnp.ones((32, 16))}
    quantized = tree.quantize(params, W8A8)
    report = tree.report(params, quantized)
    explanation = explain(matmul, jnp.ones((2, 32)), quantized["kernel"])
    wanted = str(report), str(explanation)
    # Rich knows Jupyter by the class of its shell, and displays tables instead of writing them.
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    assert rich.console.Console().is_jupyter
    assert (str(report), str(explanation)) == wanted
    assert "int8 per channel" in wanted[0]
    assert "dot_general" in wanted[1]


def test_json_holds_rows_and_total():
    params = parameters()
    report = tree.report(params, tree.quantize(params, RULES), RULES)
    values = json.loads(json.dumps(report.to_json(), allow_nan=False))
    for row, read in zip(
        [*report.rows, report.total], [*values["rows"], values["total"]], strict=True
    ):
        fields = dataclasses.asdict(row)
        assert read == {**fields, "shape": list(row.shape), "codes": list(row.codes)}


def test_the_table_shows_every_row_and_the_total():
    params = parameters() | {"[red]a[/red]": jnp.ones(3), "scalar": jnp.float32(1)}
    report = tree.report(params, tree.quantize(params, RULES), RULES)
    output = io.StringIO()
    rich.console.Console(width=200, file=output).print(report.table())
    for text in (output.getvalue(), str(report)):
        for row in report.rows:
            assert row.path in text
            assert str(row.scheme or row.reason) in text
        assert "2x64x128" in text
        assert "scalar" in text
        assert f"{report.rows[1].sqnr:.1f}" in text
        assert "3 of 9 leaves quantized" in text
        for number in (report.total.bytes_before / 1e6, report.total.bytes_after / 1e6):
            assert f"{number:.3f}" in text
        assert f"{report.total.bits_per_weight:.2f}" in text


@pytest.mark.parametrize(
    "before, after, text",
    [
        (
            {"a": normal(4, 4), "b": normal(4, 4)},
            {"a": normal(4, 4), "c": normal(4, 4)},
            "the same leaves; got 2 and 2, which differ at b, c. Pass the tree that was quantized",
        ),
        ({"a": normal(4, 4)}, {}, "the same leaves; got 1 and 0, which differ at a."),
        (
            {"a": normal(4, 8)},
            {"a": quantize(normal(8, 4), ArrayConfig())},
            r"the same shapes; got \(4, 8\) and \(8, 4\) at a. Pass the tree that was quantized",
        ),
    ],
)
def test_trees_that_do_not_match_raise(before, after, text):
    with pytest.raises(ValueError, match=text):
        tree.report(before, after)


def test_a_report_does_not_change_the_trees():
    params = parameters()
    quantized = tree.quantize(params, RULES)
    copies = jax.tree.map(np.array, (params, quantized))
    tree.report(params, quantized, RULES)
    for a, b in zip(jax.tree.leaves(copies), jax.tree.leaves((params, quantized)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_counting_the_codes_of_a_leaf_is_faster_than_numpy():
    codes = np.random.default_rng(0).integers(-127, 128, (4096, 4096)).astype(np.int8)
    q = quantize(jnp.ones((4, 4096)), ArrayConfig())
    params = {"w": dataclasses.replace(q, codes=jnp.asarray(codes))}

    def seconds(function):
        times = []
        for _ in range(3):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return min(times)

    # XLA's scatter on CPU is twice as slow as `bincount`; counting pairs of codes is twice as fast.
    counting = seconds(lambda: np.bincount(codes.reshape(-1).view(np.uint8)))
    assert seconds(lambda: tree.report(None, params)) < 1.3 * counting
