"""What a lifted function says where it cannot keep a parameter quantized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq

from . import cases


def test_a_value_that_is_no_function_is_named():
    with pytest.raises(ValueError, match=r"lift expects a function, as in .*; got dict"):
        jq.lift({"a": 1})  # pyright: ignore[reportArgumentType]


def test_a_flag_that_is_neither_true_nor_false_is_named():
    with pytest.raises(ValueError, match="strict must be True or False; got 'no'"):
        jq.lift(jnp.exp, strict="no")  # pyright: ignore[reportArgumentType]


def test_strict_names_the_parameter_the_operation_and_the_line():
    params = {"layers": [{"kernel": cases.parameter("int8")}]}
    lifted = jq.lift(lambda p: jnp.exp(p["layers"][0]["kernel"]), strict=True)
    text = (
        r"strict=True does not allow to dequantize a parameter; got layers/0/kernel in exp at "
        r".*test_errors\.py:\d+: it has no form for quantized arrays\. Leave it in float"
    )
    with pytest.raises(ValueError, match=text):
        lifted(params)


def test_a_function_with_its_own_derivative_dequantizes_as_a_whole_and_says_why():
    @jax.custom_jvp
    def fn(w):
        return jnp.exp(w)

    fn.defjvps(lambda t, out, w: 3 * t)
    q = cases.parameter("int8")
    (row,) = jq.explain(jq.lift(fn), q).dequantized
    assert row.primitive == "custom_jvp_call"
    assert row.why.startswith("it has its own derivative, and dequantizes 0 in exp at ")
    # The derivative is that of the function, not that of its parts.
    gradient = jax.grad(lambda scale: jq.lift(fn)(dataclasses.replace(q, scale=scale)).sum())(
        q.scale
    )
    codes = np.asarray(q.codes, np.float32)
    np.testing.assert_allclose(gradient, 3 * codes.sum(0, keepdims=True), rtol=1e-4)


def test_parameters_that_are_joined_are_named_together():
    params = {"gate": cases.parameter("int4 g32"), "up": cases.parameter("int4 g32")}

    def apply(p):
        return cases.rows() @ jnp.concatenate([p["gate"], p["up"]], axis=1)

    (row,) = jq.explain(jq.lift(apply), params)
    assert row.parameter == "gate + up"


def test_a_line_inside_of_a_library_is_that_of_the_call_of_the_library():
    lifted = jq.lift(lambda w: jnp.linalg.norm(w), strict=True)
    for fn in (lifted, jax.jit(lifted)):
        with pytest.raises(ValueError, match=r"got 0 in mul at .*test_errors\.py:\d+: it mult"):
            fn(cases.parameter("int8"))


def test_paths_name_the_argument_if_several_hold_parameters():
    q = cases.parameter("int8")
    with pytest.raises(ValueError, match="got 1/w in exp"):
        jq.lift(lambda a, b: cases.rows() @ a["w"] + jnp.exp(b["w"]).sum(), strict=True)(
            {"w": q}, {"w": q}
        )


def test_explain_lists_what_is_dequantized_and_why():
    q = cases.parameter("int4 g32")

    def apply(params):
        return (
            cases.rows() @ params["w"] + jnp.sum(jnp.tanh(params["w"])) + params["w"][3:67, :].sum()
        )

    found = jq.explain(jq.lift(apply), {"w": q})
    (product,) = found
    assert product.parameter == "w"
    assert product.line.startswith("test_errors.py:")
    reasons = {row.primitive: row for row in found.dequantized}
    assert set(reasons) == {"tanh", "slice"}
    assert "does not keep the blocks of 32 whole" in reasons["slice"].why
    assert reasons["tanh"].parameter == "w"
    assert reasons["tanh"].times == 1
    assert reasons["tanh"].bytes == q.nbytes
    assert "tanh: it has no form" in str(found)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", ["multiplier", "permutation", "rotation"])
def test_what_changes_the_activations_may_not_be_dropped(name):
    rotation = jq.BlockRotation(jnp.ones(64, jnp.int8), 16)
    inputs, seen = {
        "multiplier": (jq.Inputs(multiplier=jnp.full(64, 2.0)), 2 * cases.rows()),
        "permutation": (jq.Inputs(permutation=jnp.arange(64)[::-1]), cases.rows()[:, ::-1]),
        "rotation": (jq.Inputs(rotation=rotation), rotation.apply(cases.rows(), (1,))),
    }[name]
    q = dataclasses.replace(cases.parameter("int8"), inputs=inputs)
    product = jq.lift(lambda w: cases.rows() @ w)(q)
    assert jnp.allclose(product, seen @ q.dequantize(), rtol=1e-4, atol=1e-3)
    for fn in (jnp.exp, lambda w: cases.rows(32) @ w[32:], lambda w: w[cases.INDEX]):
        with pytest.raises(ValueError, match=rf"^0 can only .* inputs\.{name} changes"):
            jax.eval_shape(jq.lift(fn), q)
