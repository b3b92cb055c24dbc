"""Forms of products that are chosen on TPUs, computed here; and the choice by generation."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import FP8_E4M3, NF4, ArrayConfig, dot_general, matmul
from jaxquant.jaxprs import by_generation, chips, tpu_generation
from jaxquant.ops.rows import tpu_pallas, tpu_xla

from ...cases import Case
from ..products import INPUTS, WEIGHTS, K, M, N, assert_product, normal, quantized, weight

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = quantized(normal(M, K), INPUTS["int8"], axis=-1)
WAITING = {
    "int8": WEIGHTS["int8"],
    "int8-tensor": WEIGHTS["int8-tensor"],
    "columns": Case(ArrayConfig(group_size=(K, 8)), (0, 1)),
    "fp8": WEIGHTS["fp8_e4m3"],
    "nested": WEIGHTS["int4-nested"],
}
# Their values must be multiplied.
NOT_WAITING = ("int8-asym", "int4-asym-g32", "nf4", "mxfp8")


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("kind", ["float", "int8", "fp8", "int8-asym", "mxfp8"])
def test_codes_that_are_scaled_after_the_product_match_numpy(kind):
    x = normal(M, K) if kind == "float" else quantized(normal(M, K), INPUTS[kind], axis=-1)
    weights = {name: weight(config) for name, config in WAITING.items()}

    @jax.jit
    def products(x, weights):
        return {n: matmul(x, q, implementation="scaled") for n, q in weights.items()}

    for name, out in products(x, weights).items():
        assert_product(out, "mk,kn->mn", x, weights[name])


def test_one_side_can_be_scaled_after_the_product_and_the_other_before():
    weights = {name: weight(WEIGHTS[name]) for name in NOT_WAITING}

    @jax.jit
    def products(x, weights):
        return {n: matmul(x, q, implementation="scaled") for n, q in weights.items()}

    for name, out in products(ROWS, weights).items():
        assert_product(out, "mk,kn->mn", ROWS, weights[name])


@pytest.mark.parametrize("name", NOT_WAITING)
def test_nothing_is_scaled_after_the_product_that_changes_along_it(name):
    with pytest.raises(ValueError, match=r"'scaled' cannot run .* no operand has codes that"):
        matmul(normal(M, K), weight(WEIGHTS[name]), implementation="scaled")


def test_codes_of_more_than_8_bits_do_not_wait():
    q = weight(WEIGHTS["int8"])
    wide = types.SimpleNamespace(bits=16, codebook=None)
    assert tpu_xla.scales_result(q, (0,))
    object.__setattr__(q, "format", wide)
    assert not tpu_xla.scales_result(q, (0,))


def test_float8_codes_reach_the_product_as_they_are():
    x, q = (
        quantized(normal(M, K), ArrayConfig(format=FP8_E4M3), axis=-1),
        weight(WEIGHTS["fp8_e4m3"]),
    )
    traced = jax.jit(matmul).trace(x, q)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert f"(tensor<{M}x{K}xf8E4M3FN>, tensor<{K}x{N}xf8E4M3FN>) -> tensor<{M}x{N}xf32>" in text


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", ["int4-g32", "int4-asym-g32", "nf4", "nvfp4", "int8-blocks"])
def test_grouped_weights_by_a_computed_array_match_numpy(name, monkeypatch):
    # What v6e runs.
    monkeypatch.setattr(tpu_xla, "force_fusion", tpu_xla.times_one)
    config = {"nf4": ArrayConfig(format=NF4, group_size=16)}
    x, q = normal(M, K), weight(config.get(name, WEIGHTS[name]))
    assert_product(matmul(x, q, implementation="fused"), "mk,kn->mn", x, q)
    turned = x.T, q.reorder((-1, -2))
    numbers = (((0,), (0,)), ((), ()))
    assert_product(
        dot_general(turned[1], turned[0], numbers, implementation="fused"), "kn,km->nm", q, x.T
    )


def test_a_forced_fusion_changes_only_subnormal_values():
    tiny = jnp.finfo(jnp.bfloat16).tiny
    x = jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, tiny, -tiny, 3.3], jnp.bfloat16)
    np.testing.assert_array_equal(
        jax.jit(tpu_xla.times_one)(x).astype(jnp.float32), x.astype(jnp.float32)
    )
    # A multiplication flushes them to zero; jaxlib 0.10 left this one out, jaxlib 0.12 does not.
    subnormal = jnp.asarray([1e-40], jnp.bfloat16)
    found = np.asarray(jax.jit(tpu_xla.times_one)(subnormal), np.float64)
    assert found in (0, np.asarray(subnormal, np.float64))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_only_a_float_array_by_grouped_scales_is_fused(kind):
    x = quantized(normal(M, K), INPUTS[kind], axis=-1)
    for lhs, rhs in ((x, weight(WEIGHTS["int4-g32"])), (normal(M, K), weight(WEIGHTS["int8"]))):
        with pytest.raises(ValueError, match="it is for grouped scales by a float array"):
            matmul(lhs, rhs, implementation="fused")


def choice(x):
    return by_generation({"v6e": lambda x: x + 6, "v5e": lambda x: x + 5}, lambda x: x + 1, x)


def test_other_devices_take_the_default_in_every_transformation():
    x = jnp.arange(6.0).reshape(2, 3)
    exported = jax.export.export(jax.jit(choice), platforms=("cpu", "tpu"))(x)
    for run in (choice, jax.jit(choice), jax.vmap(choice), jax.vmap(choice, 1, 1), exported.call):
        np.testing.assert_array_equal(run(x), x + 1)


@pytest.mark.parametrize("is_exported, wanted", [(False, "v6e"), (True, None)])
def test_what_is_exported_is_for_no_generation(is_exported, wanted):
    device = types.SimpleNamespace(device_kind="TPU v6 lite")
    module: Any = types.SimpleNamespace(
        backend=types.SimpleNamespace(devices=lambda: [device]),
        lowering_parameters=types.SimpleNamespace(for_export=is_exported),
    )
    assert chips.target(module) == wanted
    module.backend = None
    assert chips.target(module) is None


def test_products_are_tuned_for_the_chips_that_are_asked_about():
    assert set(tpu_pallas._MOST_ROWS) == set(tpu_xla._SCALED_ROWS) == set(chips.TUNED)


def test_generations_are_known_by_the_names_that_jax_gives_devices():
    names = {
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "TPU7x": "7x",
        "cpu": None,
    }
    for kind, generation in names.items():
        assert tpu_generation(types.SimpleNamespace(device_kind=kind)) == generation
    assert tpu_generation(jax.devices()[0]) is None
