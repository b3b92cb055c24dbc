"""Which products of experts the Pallas kernel for TPUs computes, and from what."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import FP8_E4M3, INT4, NF4, ArrayConfig, Inputs, explain, quantize, ragged_dot
from jaxquant.ops.ragged import RaggedSpec
from jaxquant.ops.rows import tpu_ragged

from ...cases import Case
from ..products import assert_close, normal, quantized, values, with_inputs
from ..products import ragged_dot as slow_ragged_dot

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, EXPERTS, K, N = 20, 4, 64, 24
SIZES = np.array([4, 3, 0, 9], np.int32)
G32 = ArrayConfig(format=INT4, group_size=32)
LEFT = {
    "bfloat16": None,
    "int8 per row": Case(ArrayConfig(), -1),
    "int8 for all": Case(ArrayConfig(per_tensor=True)),
    "int8 asymmetric": Case(ArrayConfig(symmetric=False), -1),
}
RIGHT = {
    "int4 g32": Case(G32, 1),
    "int4 asymmetric": Case(ArrayConfig(format=INT4, group_size=32, symmetric=False), 1),
    "int8": Case(ArrayConfig(), 1),
    "int8 in pairs": Case(ArrayConfig(group_size=(2, K, 8)), (0, 1, 2)),
}
product = jax.jit(partial(tpu_ragged.run, interpret=True), static_argnames="dtype")


def experts(case, columns=N):
    return quantized(normal(EXPERTS, K, columns, seed=1), *case)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("right", RIGHT)
@pytest.mark.parametrize("left", LEFT)
def test_operands_as_they_are_stored_match_numpy(left, right):
    q, x = experts(RIGHT[right]), jnp.asarray(normal(ROWS, K), jnp.bfloat16)
    if LEFT[left] is not None:
        x = quantized(x.astype(jnp.float32), *LEFT[left])
    # Values of rows with zero points, and scaled weights of short groups, are rounded to bfloat16.
    tolerance = 2.0**-7 if left == "int8 asymmetric" or right.startswith("int4") else 2e-6
    size = slow_ragged_dot(np.abs(values(x)), np.abs(values(q)), SIZES)
    wanted = slow_ragged_dot(values(x), values(q), SIZES)
    assert_close(product(x, q, SIZES, dtype=jnp.float32), wanted, size, tolerance)
    half = product(x, q, SIZES, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert_close(half, wanted, size, 2.0**-6)


UNSUPPORTED = {
    "the experts are not stored with columns last": (G32, (-1, -2), {}),
    "nf4 codes are not integers of 4 or 8 bits": (ArrayConfig(format=NF4, group_size=32), None, {}),
    "groups of 16 are not a multiple of 32": (ArrayConfig(format=INT4, group_size=16), None, {}),
    "a precision of highest is more than": (G32, None, {"precision": "highest"}),
    "group_offset moves the groups": (G32, None, {"group_offset": np.array([0], np.int32)}),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_operands_raise_with_the_reason(message):
    config, order, options = UNSUPPORTED[message]
    q = quantize(jnp.asarray(normal(EXPERTS, K, N)), config, axis=1)
    q = q if order is None else q.reorder(order)
    with pytest.raises(ValueError, match=message):
        ragged_dot(jnp.ones((ROWS, K)), q, SIZES, implementation="pallas", **options)


def test_the_kernel_is_selected_for_chips_that_it_was_compiled_for():
    q, x = experts(RIGHT["int4 g32"]), jnp.ones((ROWS, K))
    for chip in ("v5e", "v6e"):
        for name, is_integer in (("int4 g32", False), ("int8", True)):
            for columns, wanted in ((128, ("pallas", is_integer)), (N, None)):
                weights = with_inputs(experts(RIGHT[name], columns), Inputs(ArrayConfig()))
                (row,) = explain(ragged_dot, x, weights, SIZES, platform=chip).rows
                # Others would be copied into another layout.
                found = row.implementation, row.is_integer
                assert found == wanted if wanted else row.implementation != "pallas"
    text = jax.jit(ragged_dot).trace(x, q, SIZES).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in text  # The chip is not known.
    with pytest.raises(ValueError, match="'pallas' needs a TPU; got a program for cpu"):
        ragged_dot(x, q, SIZES, implementation="pallas")


@pytest.mark.parametrize("right", ["int4 asymmetric", "int8"])
def test_experts_of_one_layer_of_a_stack(right):
    """Those of all layers, of which only one layer's have rows."""
    each = [quantize(normal(EXPERTS, K, N, seed=seed), *RIGHT[right]) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    spec = RaggedSpec((0, 1, 2), np.dtype("float32"), None, jnp.asarray(SIZES))
    spec = dataclasses.replace(spec, stack=stack, layer=jnp.int32(1))
    x = jnp.asarray(normal(ROWS, K), jnp.bfloat16)
    experts, sizes = spec.in_place(each[1])
    assert experts.shape == (3 * EXPERTS, K, N)
    assert sizes.tolist() == [0] * EXPERTS + SIZES.tolist() + [0] * EXPERTS
    found = tpu_ragged.run(x, experts, sizes, jnp.float32, most=EXPERTS, interpret=True)
    wanted = tpu_ragged.run(x, each[1], jnp.asarray(SIZES), jnp.float32, interpret=True)
    np.testing.assert_array_equal(found, wanted)


# Of these, only the codes are read in the stack.
OTHER_SCALES = {
    "blocks": ArrayConfig(format=FP8_E4M3, group_size=(32, 8)),
    "bfloat16": ArrayConfig(format=INT4, group_size=32, symmetric=False, scale_dtype="bfloat16"),
    "nested": ArrayConfig(format=INT4, group_size=32, scale_dtype="float8_e4m3fn"),
}


@pytest.mark.parametrize("name", OTHER_SCALES)
def test_scales_that_must_be_repeated_or_converted_are_those_of_one_layer(name):
    config = OTHER_SCALES[name]
    axis = (1, 2) if name == "blocks" else 1
    each = [quantize(normal(EXPERTS, K, N, seed=seed), config, axis) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    spec = RaggedSpec((0, 1, 2), np.dtype("float32"), None, jnp.asarray(SIZES))
    spec = dataclasses.replace(spec, stack=stack, layer=jnp.int32(2))
    x = jnp.asarray(normal(ROWS, K), jnp.bfloat16)
    experts, own = spec.in_place(each[2])
    assert experts is each[2]
    np.testing.assert_array_equal(own, SIZES)
    codes, sizes = spec.codes_in_place(each[2])
    spoiled = dataclasses.replace(experts, codes=jnp.zeros_like(experts.codes))
    run = partial(tpu_ragged.run, x, interpret=True, dtype=jnp.float32)
    found = run(spoiled, sizes=sizes, codes=codes, most=EXPERTS)
    np.testing.assert_array_equal(found, run(experts, sizes=own))
