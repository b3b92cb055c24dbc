"""`tree.quantize` by methods: parameters of any layout, statistics, rules, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.methods import GPTQ, SINQ, Importance, MeanSquare, Nearest, Rotation, SecondMoment
from jaxquant.methods.internal import stack_axes

G4 = jq.ArrayConfig(format=jq.INT4, group_size=4)
LAYOUTS = {
    "(K, N)": ((32, 6), jq.Rule("*", dataclasses.replace(G4, group_size=8), axis=0)),
    "(N, K)": ((6, 32), jq.Rule("*", dataclasses.replace(G4, group_size=8), axis=1)),
    "(D, heads, size)": ((32, 2, 3), jq.Rule("*", G4, axis=0)),
    "(heads, size, D)": ((4, 8, 6), jq.Rule("*", G4, axis=(0, 1), group_size=(None, None))),
    "boxes": ((4, 8, 6), jq.Rule("*", G4, axis=(0, 1), group_size=(2, 4))),
    "(heads, D, size)": ((2, 32, 3), jq.Rule("*", G4, axis=1)),
    "layers": ((3, 32, 6), jq.Rule("*", jq.ArrayConfig(format=jq.INT4), axis=1)),
    "asymmetric": ((3, 6, 32), jq.Rule("*", dataclasses.replace(G4, symmetric=False), axis=2)),
    "nvfp4": ((2, 32, 6), jq.Rule("*", jq.NVFP4A16, axis=1)),
    "per tensor": ((32, 6), jq.Rule("*", jq.ArrayConfig(per_tensor=True), axis=0)),
}


def kernel(shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", LAYOUTS)
def test_nearest_is_plain_quantization_in_every_layout(name):
    shape, rule = LAYOUTS[name]
    params = {"w": kernel(shape)}
    found = jq.tree.quantize(params, rule, method=Nearest())
    assert_equal(found, jq.tree.quantize(params, rule))


def test_leading_axes_are_stacked_as_far_as_a_matrix_remains_and_none_is_contracted():
    assert [stack_axes(n, (n - 1,)) for n in (1, 2, 3, 4)] == [0, 0, 1, 2]
    assert [stack_axes(n, (1, 2)) for n in (3, 4, 5)] == [1, 1, 1]
    assert stack_axes(4, (0, 3)) == 0


@pytest.mark.slow
def test_progress_is_called_after_each_leaf():
    calls, rules = [], [jq.Rule("b", G4, axis=0, method=SINQ()), jq.Rule("*", G4, axis=0)]
    params = {name: kernel((8, 6)) for name in "abc"}
    jq.tree.quantize(params, rules, progress=lambda *call: calls.append(call))
    assert calls == [(1, 3, "a"), (2, 3, "b"), (3, 3, "c")]


def test_the_dtype_of_the_parameter_is_kept():
    params = {"w": kernel((32, 6), dtype=jnp.bfloat16)}
    q = jq.tree.quantize(params, jq.Rule("*", jq.W4A8, group_size=16), method=Nearest())["w"]
    assert q.dtype == jnp.bfloat16
    assert q.inputs.config == jq.W4A8.inputs


def second_moment(channels, seed=0):
    x = np.random.default_rng(seed).normal(size=(4 * channels, channels))
    x[:, 1:] += 0.9 * x[:, :-1]
    return SecondMoment((x.T @ x).astype(np.float32), np.float32(len(x)))


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", ["(K, N)", "(D, heads, size)", "boxes", "(heads, size, D)"])
def test_error_feedback_sees_the_contracted_elements_in_order(name):
    shape, rule = LAYOUTS[name]
    params, statistic = {"w": kernel(shape)}, second_moment(32)
    q = jq.tree.quantize(params, rule, method=GPTQ(), statistics={"w": {SecondMoment: statistic}})
    axes = rule.axis if isinstance(rule.axis, tuple) else (rule.axis,)
    error = np.asarray(params["w"] - q["w"].dequantize(), np.float64)
    error = np.moveaxis(error, axes, range(len(axes))).reshape(32, -1)
    mean = np.asarray(statistic.finish(), np.float64)
    nearest = np.asarray(params["w"] - jq.tree.quantize(params, rule)["w"].dequantize(), np.float64)
    nearest = np.moveaxis(nearest, axes, range(len(axes))).reshape(32, -1)
    loss, before = (np.trace(e.T @ mean @ e) for e in (error, nearest))
    assert loss < 0.75 * before


@pytest.mark.slow
def test_each_layer_has_its_own_statistic():
    params, rule = {"w": kernel((2, 32, 6))}, jq.Rule("*", G4, axis=1)
    parts = [second_moment(32, seed) for seed in (0, 1)]
    both = jax.tree.map(lambda *x: np.stack(x), *parts)
    q = jq.tree.quantize(params, rule, method=GPTQ(), statistics={"w": {SecondMoment: both}})["w"]
    for i, part in enumerate(parts):
        one = {"w": params["w"][i]}
        rule = jq.Rule("*", G4, axis=0)
        expected = jq.tree.quantize(
            one, rule, method=GPTQ(), statistics={"w": {SecondMoment: part}}
        )["w"]
        np.testing.assert_array_equal(q.dequantize()[i], expected.dequantize())


def test_a_layer_without_rows_is_rounded_to_nearest():
    params, rule = {"w": kernel((2, 32, 6))}, jq.Rule("*", G4, axis=1)
    part = second_moment(32)
    empty = SecondMoment(np.zeros_like(part.total), np.float32(0))
    both = jax.tree.map(lambda *x: np.stack(x), part, empty)
    q = jq.tree.quantize(params, rule, method=GPTQ(), statistics={"w": {SecondMoment: both}})["w"]
    expected = jq.tree.quantize(params, rule)["w"].dequantize()
    np.testing.assert_array_equal(q.dequantize()[1], expected[1])
    assert np.any(q.dequantize()[0] != expected[0])


@pytest.mark.slow
def test_a_smaller_statistic_is_a_part_of_a_larger_one():
    params, rule = {"w": kernel((32, 6))}, jq.Rule("*", G4, axis=0)
    second = second_moment(32)
    square = MeanSquare(np.diagonal(second.total), second.count)
    found, expected = (
        jq.tree.quantize(params, rule, method=Importance(), statistics={"w": s})["w"]
        for s in ({SecondMoment: second}, {MeanSquare: square})
    )
    assert_equal(found, expected)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("transforms", [[SINQ()], [Rotation(block=8)], [SINQ(), Rotation(block=8)]])
@pytest.mark.parametrize("name", ["(K, N)", "layers", "(heads, size, D)"])
def test_transforms_leave_the_product_as_it_is(name, transforms):
    shape, rule = LAYOUTS[name]
    params = {"w": kernel(shape)}
    fine = jq.Rule("*", jq.ArrayConfig(format=jq.INT8), axis=rule.axis)
    q = jq.tree.quantize(params, fine, method=transforms)["w"]
    assert q.inputs.changes_weight
    specs = {"(K, N)": "bk,kn->bn", "layers": "bk,kn->bn", "(heads, size, D)": "bhd,hdn->bn"}

    def product(w, x):
        return jq.einsum(specs[name], x, w)

    if name == "layers":
        x = kernel((5, 32), 1)
        _, found = jq.scan(lambda x, w: (x, product(w, x)), x, q)
        expected = jnp.stack([x @ w for w in params["w"]])
    else:
        x = kernel((5, *shape[:-1]), 1)
        found, expected = product(q, x), product(params["w"], x)
    np.testing.assert_allclose(found, expected, atol=0.15)


@pytest.mark.slow
def test_a_chain_may_need_several_statistics():
    params, rule = {"w": kernel((32, 6))}, jq.Rule("*", G4, axis=0)
    x = kernel((50, 32), 1)
    chain = [jq.methods.AWQ(), Importance()]
    statistics = jq.collect(lambda p, x: x @ p["w"], params, [x], rule, chain)
    q = jq.tree.quantize(params, rule, method=chain, statistics=statistics)["w"]
    exact, nearest = x @ params["w"], jq.matmul(x, jq.tree.quantize(params, rule)["w"])
    error = jnp.linalg.norm(jq.matmul(x, q) - exact)
    assert error < jnp.linalg.norm(nearest - exact)


def test_a_rule_may_have_its_own_method():
    params = {"a": kernel((32, 6)), "b": kernel((32, 6), 1)}
    rules = [jq.Rule("a", G4, axis=0, method=Importance()), jq.Rule("b", G4, axis=0)]
    statistics = {"a": {SecondMoment: second_moment(32)}}
    found = jq.tree.quantize(params, rules, statistics=statistics)
    assert_equal(found["b"], jq.tree.quantize(params, [*rules[1:], jq.Rule("a", None)])["b"])
    assert np.any(found["a"].scale != jq.quantize(params["a"], G4, 0).reorder((-1, -2)).scale)


@pytest.mark.slow
def test_a_nearly_singular_moment_is_reported():
    x = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    statistics = {"w": {SecondMoment: SecondMoment(x.T @ x, np.float32(3))}}
    with pytest.warns(UserWarning, match=r"w: the second moment .* damping was raised from 1e-12"):
        jq.tree.quantize(
            {"w": kernel((32, 6))},
            jq.Rule("*", G4, axis=0),
            method=GPTQ(damping=1e-12),
            statistics=statistics,
        )


@pytest.mark.parametrize(
    "method, statistics, message",
    [
        (GPTQ(), None, r"statistics must have those of w; got none\. Pass statistics=jq.collect"),
        (
            GPTQ(),
            {"w": {MeanSquare: MeanSquare.init(32)}},
            r"w: the method needs SecondMoment; got MeanSquare\.",
        ),
        (
            GPTQ(),
            {"w": {SecondMoment: np.eye(32)}},
            r"w: statistics must map each class to a statistic of it, .*; got ndarray for .*Second",
        ),
        (
            GPTQ(),
            {"w": {SecondMoment: second_moment(8)}},
            r"w: SecondMoment must have the shape \(32, 32\) for .*; got \(8, 8\)\.",
        ),
        (
            None,
            {"w": {}},
            r"statistics must go with a method; got those of w, and no method\. "
            r"Pass method=, such as jq\.methods\.GPTQ\(\)",
        ),
        (GPTQ, None, r"method must be a method such as jq.methods.GPTQ\(\)"),
        ([GPTQ(), SINQ()], None, r"Only the last method of a list chooses codes; got GPTQ"),
        ([Rotation(block=8), Importance()], None, r"weighs channels by their MeanSquare"),
        ("gptq", None, r"method must be a method such as .*; got 'gptq'\."),
    ],
)
def test_bad_methods_and_statistics(method, statistics, message):
    with pytest.raises(ValueError, match=message):
        jq.tree.quantize(
            {"w": kernel((32, 6))}, jq.Rule("*", G4, axis=0), method=method, statistics=statistics
        )


def test_a_bad_method_of_a_rule():
    with pytest.raises(ValueError, match=r"Rule '\*': method must be a method"):
        jq.Rule("*", G4, method="gptq")
