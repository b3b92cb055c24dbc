"""New values in quantized trees."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import ArrayConfig, Inputs, Rule, Scheme, tree

from .. import checks

SCHEMES: dict[str, Any] = {
    "W8A8": jq.W8A8,
    "W4A16": Rule("*", jq.W4A16, group_size=32),
    "W4A16_ASYM": Rule("*", jq.W4A16_ASYM, group_size=32),
    "FP8": jq.FP8,
    "NF4A16": Rule("*", jq.NF4A16, group_size=32),
    "MXFP8A8": jq.MXFP8A8,
    "NVFP4A16": jq.NVFP4A16,
    "per tensor": Scheme(ArrayConfig(per_tensor=True, scale_dtype="bfloat16")),
    "blocks": Rule("*", ArrayConfig(group_size=(16, 8)), axis=(0, 1)),
}


def params(seed, dtype="float32"):
    random = np.random.default_rng(seed)
    shapes = {"a": (64, 48), "stack": (3, 64, 32)}
    found = {k: jnp.asarray(random.normal(size=s), dtype) for k, s in shapes.items()}
    return found | {"bias": jnp.asarray(random.normal(size=48), dtype)}


def quantized(values, name):
    rule = SCHEMES[name]
    rule = rule if isinstance(rule, Rule) else Rule("*", rule)
    found = {"bias": values["bias"]}
    for key in ("a", "stack"):
        axis: Any = rule.axis
        axis = axis if axis is None else tuple(a + (key == "stack") for a in axis)
        one = dataclasses.replace(rule, pattern=key, axis=axis)
        found |= tree.quantize({key: values[key]}, one)
    return found


@pytest.mark.some_rows(4)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_result_is_that_of_quantizing_the_new_values(name):
    old, new = params(0), params(1)
    like = quantized(old, name)
    codes = like["a"].codes
    found, expected = tree.requantize(new, like=like), quantized(new, name)
    for key in ("a", "stack"):
        checks.assert_equal_quantized(found[key], expected[key])
    np.testing.assert_array_equal(found["bias"], new["bias"])
    assert codes.is_deleted()


def test_arrays_of_the_new_values_are_neither_donated_nor_returned():
    """`quantize` returns the arrays that it does not quantize as they are."""
    values, shared = params(0), jnp.float32(0.5)
    like = quantized(values, "W8A8")
    assert like["bias"] is values["bias"]
    for key in ("a", "stack"):
        like[key] = dataclasses.replace(like[key], inputs=Inputs(jq.W8A8.inputs, shared))
    for _ in range(2):
        like = tree.requantize(values, like=like)
        assert not any(x.is_deleted() for x in values.values())
        pointers = [x.unsafe_buffer_pointer() for x in (like["bias"], values["bias"])]
        assert pointers[0] != pointers[1]
        assert float(like["stack"].inputs.scale) == 0.5
    np.testing.assert_array_equal(like["a"].codes, quantized(values, "W8A8")["a"].codes)


def test_neither_it_nor_what_uses_the_tree_is_compiled_again():
    served, traces = quantized(params(0), "W8A8"), []

    @jax.jit
    def use(tree, x):
        traces.append(1)
        return jq.matmul(x, tree["a"]) + tree["bias"][None]

    x = jnp.ones((2, 64))
    use(served, x)
    for seed in (1, 2, 3):
        served = tree.requantize(params(seed), like=served)
        found = use(served, x)
        exact = x @ params(seed)["a"] + params(seed)["bias"][None]
        assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)
    assert len(traces) == 1


def test_arrays_keep_the_dtypes_of_the_tree():
    like = quantized(params(0, "bfloat16"), "W8A8")
    found = tree.requantize(params(1), like=like)
    assert found["bias"].dtype == found["a"].dtype == jnp.bfloat16


def test_activation_configs_stay():
    like = quantized(params(0), "W8A8")
    like["a"] = dataclasses.replace(like["a"], inputs=Inputs(jq.W8A8.inputs, jnp.float32(0.5)))
    found = tree.requantize(params(1), like=like)
    assert float(found["a"].inputs.scale) == 0.5
    assert found["a"].inputs.config == jq.W8A8.inputs


def with_field(**fields):
    like = quantized(params(0), "W8A8")
    return like | {"a": dataclasses.replace(like["a"], **fields)}


def errors():
    scale = quantized(params(0), "W8A8")["a"].scale
    nested = jq.quantize(jnp.ones(scale.shape), ArrayConfig())
    yield {"a": jnp.ones(3)}, quantized(params(0), "W8A8"), "params must have the structure of like"
    yield (
        params(0) | {"bias": jnp.ones(3)},
        quantized(params(0), "W8A8"),
        "params must have the shapes of like",
    )
    yield params(0), with_field(offset=scale), "got a with offset. Quantize params as like was"
    yield params(0), with_field(inputs=Inputs(multiplier=jnp.ones(64))), "a with inputs.multiplier"
    yield params(0), with_field(scale=nested), "a with scales QTensor"
    smaller = quantized(params(0), "MXFP8A8")
    scale = jnp.repeat(smaller["a"].scale, 2, 0)  # Groups of 16, and not of the format's 32.
    smaller["a"] = dataclasses.replace(smaller["a"], scale=scale)
    yield params(0), smaller, "a with scales Array"
    adapted = jq.training.lora_init(params(0), Rule("a", jq.W8A8), rank=2, key=jax.random.key(0))
    yield params(0), adapted, "a with a LowRank"


@pytest.mark.parametrize("case", range(7))
def test_what_cannot_be_requantized_is_an_error(case):
    new, like, text = list(errors())[case]
    with pytest.raises(ValueError, match=re.escape(text)):
        tree.requantize(new, like=like)
