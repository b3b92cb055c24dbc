import dataclasses
import os
import re
import subprocess
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    SCHEMES,
    W4A16,
    W8A8,
    W8A16,
    ArrayConfig,
    QTensor,
    Rule,
    best_order,
    quantize,
    training,
    tree,
)

from .. import oracles
from .trees import (
    Dense,
    Module,
    State,
    assert_equal_trees,
    is_quantized,
    leaves_of,
    normal,
    parameters,
)

CONTAINERS = {
    "dict": lambda kernel, bias: {"a": {"kernel": kernel, "bias": bias}},
    "list": lambda kernel, bias: [(kernel, bias)],
    "named tuple": lambda kernel, bias: {"a": Dense(kernel, bias)},
    "module": lambda kernel, bias: Module(Module(kernel, bias, width=3), None),
    "state": lambda kernel, bias: State({"a": State({"kernel": kernel, "bias": bias})}),
    "bare": lambda kernel, bias: kernel,
}


@pytest.mark.some_rows(3)
@pytest.mark.parametrize("scheme", [W8A8, W4A16], ids=["W8A8", "W4A16"])
@pytest.mark.parametrize("build", CONTAINERS.values(), ids=CONTAINERS)
def test_quantizing_a_pytree_keeps_its_structure(build, scheme):
    kernel, bias = jnp.asarray(normal(128, 32)), jnp.ones(32)
    params = build(kernel, bias)

    quantized = tree.quantize(params, scheme)

    assert jax.tree.structure(quantized, is_leaf=is_quantized) == jax.tree.structure(params)
    (q,) = [leaf for leaf in jax.tree.leaves(quantized, is_leaf=is_quantized) if leaf is not bias]
    wanted = quantize(kernel, scheme.weights)
    np.testing.assert_array_equal(q.dequantize(), wanted.dequantize())
    np.testing.assert_allclose(q.dequantize(), oracles.dequantize(q), rtol=1e-6)
    assert oracles.sqnr(kernel, q.dequantize()) > (16 if scheme is W4A16 else 38)
    assert (q.inputs and q.inputs.config) == scheme.inputs
    back = tree.dequantize(quantized)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert_equal_trees(back, build(wanted.dequantize(), bias))


def test_leaves_without_a_rule_are_the_same_objects_and_inputs_are_unchanged():
    params = jax.tree.map(np.array, parameters())
    kept = jax.tree.map(np.copy, params)
    quantized = leaves_of(tree.quantize(params, {"out/0": W8A8}))
    assert_equal_trees(params, kept)
    for path, leaf in leaves_of(params).items():
        assert (quantized[path] is leaf) == (path != "out/0")


def test_default_rules_skip_matrices_that_would_not_shrink_and_other_rules_raise():
    params = {"up": normal(64, 32), "time": normal(1, 32), "small": normal(2, 8).astype("float16")}
    quantized = tree.quantize(params, W8A16)
    rows = {r.path: r for r in tree.report(params, quantized, W8A16).rows}
    assert {p: r.reason for p, r in rows.items()} == {
        "up": None,
        "time": "it would not shrink",
        "small": "it would not shrink",
    }
    text = (
        r"time: takes 40\.0 bits per weight, no fewer than float32, shape \(1, 32\): few elements"
    )
    with pytest.raises(ValueError, match=text):
        tree.quantize(params, {"time": W8A16})


@pytest.mark.parametrize("axis, shared", [(None, (0, 1, 2)), (-1, (1, 2, 3))])
def test_convolutions_share_scales_along_all_axes_but_the_output(axis, shared):
    kernel = normal(3, 5, 32, 64)
    rules = tree.default_rules(W8A16, axis=axis)
    q = tree.quantize({"conv_0": {"kernel": kernel}}, rules)["conv_0"]["kernel"]
    assert q.scale.shape == tuple(1 if a in shared else n for a, n in enumerate(kernel.shape))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_floats_are_quantized_and_dequantized_to_their_dtype(dtype):
    kernel = jnp.asarray(normal(64, 32)).astype(dtype)
    q = tree.quantize({"kernel": kernel}, W8A16)["kernel"]
    assert q.dequantize().dtype == dtype
    assert oracles.sqnr(kernel.astype(jnp.float32), q.dequantize().astype(jnp.float32)) > 25


def broken(bad, where=(5, 7)):
    kernel = normal(64, 96)
    kernel[where] = bad
    return kernel


def test_an_error_lists_the_first_20_problems_and_counts_the_others():
    params = {f"{i:03}": jnp.ones((8, 4), jnp.int8) for i in range(23)}
    with pytest.raises(ValueError, match="fix these 23 problems:") as error:
        tree.quantize(params, {"*": W8A8})
    _, *lines = str(error.value).splitlines()
    assert [line.strip()[:4] for line in lines[:-1]] == [f"{i:03}:" for i in range(20)]
    assert lines[-1].strip() == "and 3 more"


def test_one_error_lists_all_problems_before_anything_changes():
    params = {
        "a": {"kernel": normal(64, 32)},
        "b": {"kernel": broken(np.nan)},
        "c": {"kernel": normal(96, 32)},
        "d": {"kernel": normal(64)},
        "e": {"kernel": np.arange(6).reshape(2, 3)},
        "f": {"kernel": quantize(normal(64, 32), W8A16.weights)},
        "g": {"kernel": 2.5},
        "h": {"kernel": jax.ShapeDtypeStruct((64, 32), jnp.float32)},
    }
    kept = jax.tree.map(lambda x: np.copy(x) if hasattr(x, "__array__") else x, params)
    rules = [Rule("c/*", W4A16), Rule("*/kernel", W8A8), Rule("head/*", W8A8), Rule("re:x+", None)]
    calls = []

    with pytest.raises(ValueError, match=r"Nothing was quantized; fix these 9 problems:") as error:
        tree.quantize(params, rules, progress=lambda *call: calls.append(call))

    title, *lines = str(error.value).split("\n  ")
    assert lines == [
        "rule 'head/*' matches no leaf",
        "rule 're:x+' matches no leaf; the paths are a/kernel, b/kernel, c/kernel, d/kernel, "
        "e/kernel, f/kernel, g/kernel, h/kernel",
        "b/kernel: holds NaN or Inf, shape (64, 96); fix it, or give it a rule with None",
        "c/kernel: group_size must divide axis 0; got group_size=128 for shape (96, 32). Pad the "
        "axis, or choose 96.",
        "d/kernel: axis must lie in -1 .. 0 for an array of 1 axes; got axis=-2.",
        "e/kernel: not a floating-point array, got int64 of shape (2, 3); give it a rule with None",
        "f/kernel: already quantized (QTensor(int8 64x32, scale (1, 32), float32)); dequantize it "
        "first (--requantize), or give it a rule with None (--rule PATH=none)",
        "g/kernel: not a floating-point array, got float of shape (); give it a rule with None",
        "h/kernel: not a floating-point array, got ShapeDtypeStruct of shape (64, 32); give it a "
        "rule with None",
    ]
    assert title == "Nothing was quantized; fix these 9 problems:"
    assert calls == []
    for path, leaf in leaves_of(params).items():
        if isinstance(leaf, np.ndarray):
            np.testing.assert_array_equal(leaf, leaves_of(kept)[path])


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [(jnp.float32, np.nan), (jnp.float32, -np.inf), (jnp.bfloat16, np.inf), (jnp.float16, np.nan)],
)
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(where=st.tuples(st.integers(0, 63), st.integers(0, 95)))
def test_nan_and_infinity_raise_anywhere_in_an_array(dtype, bad, where):
    kernel = jnp.asarray(broken(bad, where)).astype(dtype)
    with pytest.raises(ValueError, match=r"x/kernel: holds NaN or Inf, shape \(64, 96\); fix it"):
        tree.quantize({"x": {"kernel": kernel}}, W8A8)


def test_unselected_leaves_may_hold_anything():
    params = {"a": broken(np.nan), "b": normal(64, 32), "c": "text", "d": None, "e": 3}
    params["f"] = quantize(normal(64, 32), W8A16.weights)
    quantized = tree.quantize(params, [Rule("[acdef]", None), Rule("*", W8A8)])
    assert is_quantized(quantized["b"])
    assert all(quantized[k] is params[k] for k in "acdef")


@pytest.mark.parametrize(
    "params, rules, text",
    [
        ({}, W8A8, "the rules select no leaf; the paths are none"),
        ({"bias": np.ones(3)}, W8A8, "the rules select no leaf; the paths are bias"),
        ({"w": normal(4, 4)}, {"w": None}, "the rules select no leaf; the paths are w"),
        (
            {f"w{i}": normal(4, 4) for i in range(9)},
            {"v": W8A8},
            "the paths are w0, w1, w2, w3, w4, w5, w6, w7, ...",
        ),
    ],
)
def test_rules_that_select_nothing_raise(params, rules, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        tree.quantize(params, rules)


def test_a_rule_counts_as_matched_if_an_earlier_rule_selected_its_leaves():
    params = {"kernel": jnp.asarray(normal(64, 32))}
    quantized = tree.quantize(params, [Rule("kernel", W8A8), Rule("k*", W8A16)])
    assert quantized["kernel"].inputs is not None
    optional = tree.quantize(params, [Rule("kernel", W8A8), Rule("none", W8A16, required=False)])
    assert_equal_trees(optional, quantized)


def test_progress_is_called_after_each_leaf():
    calls = []
    tree.quantize(parameters(), W8A8, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3, "embed/table"), (2, 3, "layers/up/kernel"), (3, 3, "out/0")]


@pytest.mark.parametrize("progress, shows", [(True, True), (False, False), (None, False)])
def test_a_progress_bar_goes_to_standard_error(progress, shows, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    tree.quantize(parameters(), W8A8, progress=progress)
    written = capsys.readouterr()
    assert written.out == ""
    assert ("Quantizing" in written.err or "100%" in written.err) is shows


KERNEL = (64, 32)
# Scheme, contracted axis, platform, shape of the stored codes.
ORDERS = [
    (W8A8, -2, "cpu", (32, 64)),
    (W8A8, -2, "gpu", (32, 64)),
    (W8A8, -2, "tpu", (64, 32)),
    (W8A8, -1, "cpu", (64, 32)),
    (W8A8, -1, "tpu", (32, 64)),
    (W4A16, -2, "cpu", (32, 64)),
    (W4A16, -2, "tpu", (64, 32)),
    (W4A16, -1, "cpu", (64, 32)),
    (W4A16, -1, "tpu", (32, 64)),
]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("scheme, axis, platform, stored", ORDERS)
def test_weights_are_stored_in_the_order_that_suits_the_platform(scheme, axis, platform, stored):
    x = jnp.asarray(normal(*KERNEL))
    group_size = 16 if scheme is W4A16 else None
    rules = [Rule("*", scheme, axis=axis, group_size=group_size)]

    q = tree.quantize({"w": x}, rules, platform=platform)["w"]

    assert q.shape == KERNEL
    assert q.codes.shape == stored
    elsewhere = tree.quantize({"w": x}, rules, platform="cpu" if platform == "tpu" else "tpu")
    moved = tree.reorder(elsewhere, platform)["w"]
    assert moved.order == best_order(elsewhere["w"], platform)
    if platform != "tpu" or scheme is W4A16:  # For W8A8 on TPU every order is equally fast.
        assert_equal_trees(moved, q)
    np.testing.assert_array_equal(moved.dequantize(), q.dequantize())
    config = rules[0].resolve()
    assert config is not None
    np.testing.assert_array_equal(q.dequantize(), quantize(x, config.weights, axis).dequantize())


def test_the_default_platform_is_the_current_one():
    q = tree.quantize(parameters(), W8A8)
    assert_equal_trees(q, tree.quantize(parameters(), W8A8, platform=jax.default_backend()))
    elsewhere = tree.quantize(parameters(), W8A8, platform="tpu")
    moved = tree.reorder(elsewhere)
    assert_equal_trees(moved, q)
    assert leaves_of(moved)["steps"] is leaves_of(elsewhere)["steps"]


BLOCKS = ArrayConfig(group_size=(16, 8))


@pytest.mark.parametrize("axis, platform", [(0, "cpu"), (1, "tpu")])
def test_blocks_are_stored_by_the_axis_that_products_sum_over(axis, platform):
    """Scales along two axes do not say which one it is."""
    rule = Rule("w", BLOCKS, axis=(0, 1))
    params = {"w": jnp.asarray(normal(32, 24)), "other": jnp.ones(3)}
    kept = tree.quantize(params, rule, platform=platform)
    assert kept["w"].order is None
    wanted = tree.quantize(params, dataclasses.replace(rule, contracted=axis), platform=platform)
    assert wanted["w"].order == (-1, -2)
    assert tree.reorder(kept, platform)["w"].order is None
    moved = tree.reorder(kept, platform, contracted={"w": (axis,), "other": (0,)})
    assert_equal_trees(moved, wanted)
    with_adapters = training.lora_init(kept, rule, 2, jax.random.key(0))
    adapted = tree.reorder(with_adapters, platform, contracted={"w": (axis,)})["w"]
    assert_equal_trees(adapted.base, wanted["w"])
    np.testing.assert_array_equal(moved["w"].dequantize(), kept["w"].dequantize())
    assert tree.reorder(kept, platform, contracted={"w": (0, 1)})["w"].order is None
    with pytest.raises(ValueError, match=r"axis must lie in -2 \.\. 1"):
        tree.reorder(kept, platform, contracted={"w": 2})


BAD_CONTRACTED: list[tuple[Any, str]] = [
    ({"w": 0, "u": 1}, r"contracted must name leaves of the tree; got u\. It has w\."),
    ([0], r"contracted must map paths to axes, such as .*\.contracted; got list\."),
]


@pytest.mark.parametrize("contracted, text", BAD_CONTRACTED)
def test_contracted_axes_of_other_leaves_raise(contracted, text):
    with pytest.raises(ValueError, match=text):
        tree.reorder({"w": jnp.ones((4, 4))}, "tpu", contracted=contracted)


def test_contracted_axes_without_blocks_raise():
    rule = Rule("w", BLOCKS, axis=(1, 2), contracted=0)
    with pytest.raises(ValueError, match=r"got contracted=0 for axis=\(1, 2\)"):
        tree.quantize({"w": jnp.ones((2, 32, 24))}, rule)


@pytest.mark.parametrize(
    "run",
    [
        lambda: tree.quantize(parameters(), W8A8, platform="npu"),
        lambda: tree.reorder(tree.quantize(parameters(), W8A8), "npu"),
    ],
    ids=["quantize", "reorder"],
)
def test_an_unknown_platform_raises(run):
    with pytest.raises(ValueError, match="platform must be cpu, gpu, tpu; got 'npu'"):
        run()


def test_quantize_works_under_jit_and_abstractly():
    params = parameters()
    wanted = tree.quantize(params, W8A8)

    jitted = jax.jit(lambda p: tree.quantize(p, W8A8))(params)
    shapes = jax.eval_shape(lambda p: tree.quantize(p, W8A8), params)

    assert_equal_trees(jitted, wanted)
    assert jax.tree.structure(shapes) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_under_jit_shapes_are_checked_and_groups_with_nan_become_nan():
    run = jax.jit(lambda p: tree.quantize(p, [Rule("w", ArrayConfig(group_size=16))]))
    with pytest.raises(ValueError, match="w: group_size must divide axis 0; got group_size=16"):
        run({"w": normal(20, 8)})
    values = np.asarray(run({"w": broken(np.nan)})["w"].dequantize())
    np.testing.assert_array_equal(np.argwhere(np.isnan(values).all(1)), np.empty((0, 1)))
    np.testing.assert_array_equal(np.argwhere(np.isnan(values)), [(i, 7) for i in range(16)])


def test_vmap_over_stacked_models_equals_a_loop():
    stack = {"w": jnp.asarray(normal(3, 64, 32))}
    rules = [Rule("w", W8A8)]
    q = jax.vmap(lambda p: tree.quantize(p, rules))(stack)
    for i in range(3):
        one = tree.quantize({"w": stack["w"][i]}, rules)
        assert_equal_trees(jax.tree.map(lambda leaf, i=i: leaf[i], q), one)


def test_empty_leaves_are_quantized_to_empty_ones():
    q = tree.quantize({"w": jnp.zeros((0, 8)), "v": jnp.ones((2, 3))}, W8A8)["w"]
    assert q.shape == (0, 8)
    assert q.dequantize().shape == (0, 8)


_PEAK = r"""
import re
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jaxquant import W8A8, tree

def peak():
    # ru_maxrss would start at the value of the parent process.
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])

def make(rows, count, n):
    random = np.random.default_rng(0)
    shapes = {"embed": (rows, n), **{f"kernel{i}": (n, n) for i in range(count)}}
    return {k: jnp.asarray(random.standard_normal(s, np.float32)) for k, s in shapes.items()}

jax.block_until_ready(tree.quantize(make(16, 1, 8), W8A8))
start = peak()
params = make(24000, 40, 512)
size = sum(leaf.nbytes for leaf in params.values())
for _ in range(2):
    quantized = jax.block_until_ready(tree.quantize(params, W8A8))
print(size, peak() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_stays_below_three_times_the_float_weights():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], capture_output=True, text=True, env=environment, check=True
    )
    size, grown = map(int, done.stdout.split())
    assert size > 90e6
    # Once the weights, and at most twice that for temporaries and results.
    assert size < grown < 3 * size


def test_a_quantized_leaf_is_a_pytree():
    q = tree.quantize(parameters(), W8A8)["out"][0]
    assert isinstance(q, QTensor)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(q)} == {"int8", "float32"}


def test_a_1x1_convolution_kernel_is_not_reordered():
    kernel = jax.random.normal(jax.random.key(0), (1, 1, 64, 32))
    rule = Rule("*", W8A8, axis=(0, 1, 2))
    assert tree.quantize({"kernel": kernel}, rule, platform="cpu")["kernel"].order is None
    rule = dataclasses.replace(rule, contracted=(0, 1, 2))
    q = tree.quantize({"kernel": kernel}, rule, platform="cpu")["kernel"]
    assert q.order == (-1, -4, -3, -2)
    for contracted, text in (
        ((0, 4), r"kernel: contracted: axis must lie in -4 .. 3 for .*; got axis=\(0, 4"),
        ((0, 1), r"must name all axes along .*; got contracted=\(0, 1\) for axis=\(0, 1, 2\)"),
    ):
        with pytest.raises(ValueError, match=text):
            tree.quantize({"kernel": kernel}, dataclasses.replace(rule, contracted=contracted))


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["W4A16_ASYM", "NF4A16", "FP8"])
def test_stored_codes_scales_and_zero_points_equal_those_of_quantize(name):
    kernel = jnp.asarray(normal(128, 32) + np.float32(0.5))
    scheme = SCHEMES[name]
    found = tree.quantize({"kernel": kernel}, scheme, platform="cpu")["kernel"]
    wanted = quantize(kernel, scheme.weights).reorder(found.order)
    assert found.order == (-1, -2)
    assert found.format == wanted.format
    for a, b in zip(
        (found.codes, found.scale, found.zero_point),
        (wanted.codes, wanted.scale, wanted.zero_point),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
