"""Loops over layers, whose products read weights in the stack of all layers."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import INT4, NF4, ArrayConfig, Inputs, einsum, lift, quantize, scan
from jaxquant.kernels import cpu

from .products import normal

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.skipif(cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"),
]

LAYERS, K, N = 3, 256, 256
W4 = ArrayConfig(format=INT4, group_size=32, scale_dtype="float16")
# Weights, whether activations are quantized, and the number of axes of the weights.
CASES = {
    "W8A8": (ArrayConfig(), True, 2),
    "W8A8 in groups": (ArrayConfig(group_size=64, scale_dtype="bfloat16"), True, 2),
    "W4A8": (W4, True, 2),
    "W4A8 by heads": (W4, True, 3),
    "W8A8 by heads": (ArrayConfig(), True, 3),
    "W4A16": (W4, False, 2),
    "NF4": (ArrayConfig(format=NF4, group_size=64), False, 2),
    "W8A16": (ArrayConfig(), False, 2),
    "in blocks": (ArrayConfig(format=INT4, group_size=(64, 32), scale_dtype="float16"), True, 2),
    "heads in blocks": (ArrayConfig(format=INT4, group_size=(64, 32)), True, 3),
    "shared by heads": (ArrayConfig(format=INT4, group_size=(4, 1, 32)), True, 3),
    "nested": (ArrayConfig(format=INT4, group_size=32, scale_dtype="float8_e4m3fn"), True, 2),
    "asymmetric": (ArrayConfig(format=INT4, group_size=32, symmetric=False), True, 2),
}


def layers(name):
    config, has_inputs, ndim = CASES[name]
    shape = (N, K) if ndim == 2 else (4, N // 4, K)
    arrays = [jnp.asarray(normal(*shape, seed=i)) / 16 for i in range(LAYERS)]
    inputs = Inputs(ArrayConfig()) if has_inputs else None
    sizes = config.group_size if isinstance(config.group_size, tuple) else (config.group_size,)
    axes = tuple(range(-len(sizes), 0))
    return [dataclasses.replace(quantize(w, config, axis=axes), inputs=inputs) for w in arrays]


def product(x, q):
    if q.ndim == 2:
        return einsum("mk,nk->mn", x, q)
    return einsum("mk,hnk->mhn", x, q).reshape(x.shape[0], -1)


def through(loop, x, stack):
    def step(x, q):
        y = product(x, q)
        return jnp.tanh(y), y

    return loop(step, x, stack)[1]


LOOPS = {
    "scan": partial(through, scan),
    "backwards": partial(through, partial(scan, reverse=True)),
    "unrolled": partial(through, partial(scan, unroll=2)),
    "lifted": lift(partial(through, jax.lax.scan)),
}


def stacked(each):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", CASES)
def test_products_of_a_loop_read_the_stack(name, loop, rows):
    each = layers(name)
    run, x, stack = jax.jit(LOOPS[loop]), jnp.asarray(normal(rows, K)), stacked(each)
    found = run(x, stack)
    one, carried = jax.jit(product), x
    order = range(LAYERS)[::-1] if loop == "backwards" else range(LAYERS)
    for i in order:
        wanted = one(carried, each[i])
        # What XLA fuses with `tanh` is rounded otherwise, after which a code may differ by 1.
        np.testing.assert_allclose(found[i], wanted, rtol=1e-3, atol=2e-3)
        carried = jnp.tanh(found[i])
    text = run.lower(x, stack).compile().as_text() or ""
    assert "jaxquant_dot" in text
    # No codes are copied: no operation returns a slice of them.
    kind = "s8" if each[0].codes.dtype == jnp.int8 else "s4"
    shape = re.escape(",".join(map(str, each[0].codes.shape)))
    copied = rf"{kind}\[(1,)?{shape}\]\S* (dynamic-slice|fusion|copy|custom-call)"
    assert not re.search(copied, text)


def test_a_loop_under_vmap_reads_slices_of_each_stack():
    each = layers("W4A8")
    stacks = jax.tree.map(lambda a, b: jnp.stack([a, b]), stacked(each), stacked(each[::-1]))
    x = jnp.asarray(normal(2, 1, K))
    run = LOOPS["scan"]
    for axes in ((0, None), (None, 0), (0, 0)):
        given = [a if axis == 0 else jax.tree.map(lambda leaf: leaf[0], a)
                 for a, axis in zip((x, stacks), axes, strict=True)]  # fmt: skip
        found = jax.jit(jax.vmap(run, axes))(*given)
        for i in range(2):
            one = [a if axis is None else jax.tree.map(lambda leaf, i=i: leaf[i], a)
                   for a, axis in zip(given, axes, strict=True)]  # fmt: skip
            np.testing.assert_allclose(found[i], jax.jit(run)(*one), rtol=1e-3, atol=2e-3)


def test_a_loop_differentiates_with_respect_to_its_inputs():
    stack, x = stacked(layers("W4A16")), jnp.asarray(normal(1, K))
    losses = [
        jax.jit(jax.grad(lambda x, loop=loop: jnp.sum(through(loop, x, stack) ** 2)))
        for loop in (scan, jax.lax.scan)
    ]
    found, wanted = (loss(x) for loss in losses)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


# How many operands of the product of one row are stacks: codes, and scales of each column that are
# stored in a dtype of the kernels. Those of 16 bits are converted for 8 rows.
STACKS = {
    "W8A8": (1, 1),
    "W8A8 in groups": (2, 1),
    "W4A8": (2, 1),
    "W4A8 by heads": (2, 1),
    "in blocks": (1, 1),
    "heads in blocks": (1, 1),
    "shared by heads": (1, 1),
    "nested": (1, 1),
    "asymmetric": (2, 2),
}


@pytest.mark.parametrize("name", STACKS)
def test_operands_that_are_stacks(name):
    stack = stacked(layers(name))
    for rows, count in zip((1, 8), STACKS[name], strict=True):
        text = jax.jit(LOOPS["scan"]).lower(jnp.ones((rows, K)), stack).as_text()
        (types,) = re.findall(r"@jaxquant_dot_\w+\(.* : \((.*)\) ->", text)
        assert types.count(f"tensor<{LAYERS}x") == count
