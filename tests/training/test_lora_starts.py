"""Where adapters start (PiSSA, LoftQ), their ranks and factors, against NumPy."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import INT4, NF4, ArrayConfig, Rule
from jaxquant.training import LoftQ, PiSSA, lora_init, merge

from .. import oracles

KEY = jax.random.key(0)
RANK = 3
INT4_G16 = ArrayConfig(format=INT4, group_size=16)
# Shape of the weight, axis of its scales, the matrices (stack, rows, columns) of its adapters.
LAYOUTS = {
    "kernel": ((32, 20), 0, (1, 32, 20)),
    "rows are outputs": ((20, 32), 1, (1, 20, 32)),
    "from heads": ((2, 16, 20), (0, 1), (1, 32, 20)),
    "stack": ((2, 32, 20), 1, (2, 32, 20)),
}


def normal(*shape, seed=0):
    """With singular values that fall, as those of weights do."""
    x = np.random.default_rng(seed).normal(size=shape) * np.linspace(0.1, 2, shape[-1])
    return x.astype(np.float32)


def values_of(x, config, axis):
    """What the codes of x stand for."""
    sizes = config.group_size if isinstance(axis, int) else (1, config.group_size)
    config = dataclasses.replace(config, group_size=sizes)
    codes, scale, zero_point = oracles.quantize(x, config, axis, oracles.abs_max_range)
    codes = codes - oracles.repeat_groups(zero_point, x.shape)
    return codes * oracles.repeat_groups(scale, x.shape)


def principal(x, rank):
    """The nearest matrices of a rank, by NumPy's singular values."""
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    return np.einsum("sir,sr,srj->sij", left[..., :rank], singular[..., :rank], right[:, :rank])


def slow_pissa(w, quantized, rank):
    """Meng et al. 2024, section 3 and 4: adapters first, then the rest is quantized."""
    low_rank = principal(w, rank)
    return quantized(w - low_rank), low_rank


def slow_loftq(w, quantized, rank, steps):
    """Li et al. 2023, algorithm 1, and the step with the least error."""
    low_rank, found = np.zeros_like(w), []
    for _ in range(steps):
        base = quantized(w - low_rank)
        low_rank = principal(w - base, rank)
        found.append((np.linalg.norm(w - base - low_rank), base, low_rank))
    return min(found, key=lambda step: step[0])[1:]


STARTS: dict[str, tuple[Any, Any]] = {
    "PiSSA": (PiSSA(), slow_pissa),
    "LoftQ": (LoftQ(steps=3), partial(slow_loftq, steps=3)),
}


def adapter_product(x, matrices):
    """factor a b as matrices, in float64."""
    stack, rows, columns = matrices
    a = np.asarray(x.a, np.float64).reshape(stack, rows, x.rank)
    b = np.asarray(x.b, np.float64).reshape(stack, x.rank, columns)
    return x.factor * np.einsum("sir,srj->sij", a, b)


@pytest.mark.some_rows(4)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", STARTS)
def test_starts_are_those_of_the_paper(name, layout):
    shape, axis, matrices = LAYOUTS[layout]
    start, slow = STARTS[name]
    group = (1, 16) if isinstance(axis, tuple) else 16
    w = normal(*shape)
    rule = Rule("*", INT4_G16, axis=axis, group_size=group)
    x = lora_init(jnp.asarray(w), rule, RANK, KEY, alpha=2.0, start=start)

    def quantized(x):
        return values_of(x.reshape(shape).astype(np.float32), INT4_G16, axis).reshape(matrices)

    base, low_rank = slow(w.reshape(matrices).astype(np.float64), quantized, RANK)
    np.testing.assert_allclose(adapter_product(x, matrices), low_rank, atol=2e-5)
    np.testing.assert_allclose(x.base.dequantize().reshape(matrices), base, atol=2e-5)
    assert x.alpha == 2
    # Both factors get the same share of the singular values.
    np.testing.assert_allclose(jnp.linalg.norm(x.a), jnp.linalg.norm(x.b), rtol=1e-5)


@pytest.mark.parametrize("name", STARTS)
def test_starts_come_closer_to_the_weight_than_its_codes(name):
    w = jnp.asarray(normal(64, 48))
    rule = Rule("*", ArrayConfig(format=jq.INT2, group_size=32))
    plain = jnp.linalg.norm(lora_init(w, rule, 8, KEY).dequantize() - w)
    found = jnp.linalg.norm(lora_init(w, rule, 8, KEY, start=STARTS[name][0]).dequantize() - w)
    assert found < 0.8 * plain


def test_more_steps_are_never_worse():
    """Nearer to the weight in 4 bits; in INT2 by the largest magnitude, the first step is best."""
    w = jnp.asarray(normal(64, 48))
    for format, is_better in ((NF4, True), (jq.INT2, False)):
        rule = Rule("*", ArrayConfig(format=format, group_size=32))
        errors = [
            float(jnp.linalg.norm(lora_init(w, rule, 8, KEY, start=LoftQ(n)).dequantize() - w))
            for n in (1, 5)
        ]
        assert errors[1] <= errors[0] * (1 + 1e-6)
        assert (errors[1] < 0.99 * errors[0]) == is_better


@pytest.mark.parametrize("format", [jq.INT2, jq.NVFP4], ids=str)
def test_compiled_starts_keep_the_same_step(format):
    w = jnp.asarray(normal(64, 48))
    rule = Rule("*", ArrayConfig(format=format))
    run = partial(lora_init, rules=rule, rank=8, key=KEY, start=LoftQ(3))
    distances = [jnp.linalg.norm(x.dequantize() - w) for x in (run(w), jax.jit(run)(w))]
    np.testing.assert_allclose(*distances, rtol=1e-3)


def test_a_randomized_decomposition_is_close_to_the_exact_one():
    w = jnp.asarray(normal(64, 48))
    rule = Rule("*", INT4_G16)
    exact = lora_init(w, rule, 4, KEY, start=PiSSA())
    rest = w - adapter_product(exact, (1, 64, 48))[0]
    for iterations, bound in ((0, 1.2), (8, 1.001)):
        found = lora_init(w, rule, 4, KEY, start=PiSSA(iterations))
        left = w - adapter_product(found, (1, 64, 48))[0]
        assert 1 - 1e-4 < jnp.linalg.norm(left) / jnp.linalg.norm(rest) < bound


def test_bfloat16_weights_and_adapters():
    w = jnp.asarray(normal(32, 20), jnp.bfloat16)
    x = lora_init(w, Rule("*", INT4_G16), RANK, KEY, start=LoftQ(), dtype=jnp.bfloat16)
    assert (x.dtype, x.a.dtype, x.b.dtype) == (jnp.bfloat16,) * 3
    plain = lora_init(w, Rule("*", INT4_G16), RANK, KEY)
    errors = [
        jnp.linalg.norm(y.dequantize().astype(jnp.float32) - w.astype(jnp.float32))
        for y in (x, plain)
    ]
    assert errors[0] < errors[1]
    assert merge({"w": x})["w"].dtype == jnp.bfloat16


def test_rank_stabilized_adapters_are_scaled_by_the_root_of_the_rank():
    """rsLoRA, eq. 4: the adapters' product does not shrink as the rank grows."""
    w = jnp.asarray(normal(32, 20))
    for rank in (4, 16):
        x = lora_init(w, Rule("*", INT4_G16), rank, KEY, alpha=8.0, use_rslora=True)
        assert x.factor == pytest.approx(8 / rank**0.5)
        plain = lora_init(w, Rule("*", INT4_G16), rank, KEY, alpha=8.0)
        assert plain.factor == 8 / rank
        started = lora_init(
            w, Rule("*", INT4_G16), rank, KEY, alpha=8.0, use_rslora=True, start=PiSSA()
        )
        expected = principal(np.asarray(w, np.float64)[None], rank)
        np.testing.assert_allclose(adapter_product(started, (1, 32, 20)), expected, atol=2e-5)


def test_ranks_by_pattern():
    params = {n: jnp.asarray(normal(32, 20)) for n in ("attention/q", "attention/k", "mlp")}
    params["norm"] = jnp.ones(20)
    rules = Rule("*", INT4_G16, where=lambda _, x: x.ndim == 2)
    found = lora_init(params, rules, {"*/q": 2, "attention/*": 4, "re:m.*": 5}, KEY)
    assert {n: found[n].rank for n in ("attention/q", "attention/k", "mlp")} == {
        "attention/q": 2,
        "attention/k": 4,
        "mlp": 5,
    }
    assert found["norm"] is params["norm"]


W = {"w": jnp.asarray(normal(32, 20))}
RULES = Rule("*", INT4_G16)
ERRORS = {
    "no pattern": (
        lambda: lora_init(W, RULES, {"v": 2}, KEY),
        "Each pattern of rank must match a selected leaf; got 'v', and the selected leaves w",
    ),
    "no leaf": (
        lambda: lora_init({**W, "v": W["w"]}, RULES, {"v": 2}, KEY),
        r"must have a pattern for each selected leaf; got \{'v': 2\}, which has none for w",
    ),
    "rank": (
        lambda: lora_init(W, RULES, {"*": 0}, KEY),
        "rank must be a positive int; got 0",
    ),
    "rslora": (
        lambda: lora_init(W, RULES, 2, KEY, use_rslora=True),
        r"use_rslora scales adapters by alpha / sqrt\(rank\), and needs alpha; got None",
    ),
    "start": (
        lambda: lora_init(W, RULES, 2, KEY, start=PiSSA),  # pyright: ignore[reportArgumentType]
        r"start must be PiSSA\(\), LoftQ\(\) or None; got <class.*Write start=PiSSA\(\)",
    ),
    "small": (
        lambda: lora_init(W, RULES, 21, KEY, start=LoftQ()),
        r"rank must be at most 20 for w of shape \(32, 20\), with start=LoftQ.*got 21",
    ),
    "quantized": (
        lambda: lora_init(jq.tree.quantize(W, RULES), RULES, 2, KEY, start=PiSSA()),
        r"start=PiSSA\(iterations=None\) needs the float weight of w; got QTensor",
    ),
    "iterations": (lambda: PiSSA(-1), "iterations must be an int of at least 0; got -1"),
    "steps": (lambda: LoftQ(0), "steps must be an int of at least 1; got 0"),
    "no steps": (lambda: LoftQ(None), "steps must be an int of at least 1; got None"),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(name):
    run, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        run()


def test_groups_of_nf4():
    """A codebook, as QLoRA and LoftQ use it."""
    w = jnp.asarray(normal(64, 20))
    rule = Rule("*", ArrayConfig(format=NF4, group_size=64))
    x = lora_init(w, rule, 4, KEY, start=LoftQ())
    plain = lora_init(w, rule, 4, KEY)
    assert jnp.linalg.norm(x.dequantize() - w) < 0.9 * jnp.linalg.norm(plain.dequantize() - w)
