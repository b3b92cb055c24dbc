"""Which products the Pallas kernels for GPUs compute, and from what."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxquant import (
    FP8_E4M3,
    FP8_E5M2,
    INT4,
    MXFP8,
    NF4,
    ArrayConfig,
    Format,
    einsum,
    explain,
    matmul,
    quantize,
)
from jaxquant.kernels import pallas_gpu
from jaxquant.ops.rows import gpu_triton

from ...cases import Case
from ...triton import lowered_for_gpu, mesh_of_gpus
from ..products import assert_product, normal, quantized, spec_of_rows, weight

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N = 256, 72
G128 = ArrayConfig(format=INT4, group_size=128)
LEFT = {
    "bfloat16": None,
    "float16": None,
    "int8 per row": ArrayConfig(),
    "int8 asymmetric": ArrayConfig(symmetric=False),
}
RIGHT = {
    "bfloat16": ArrayConfig(format=INT4, group_size=64, symmetric=False),
    "float16": ArrayConfig(format=INT4, group_size=32, scale_dtype="float8_e4m3fn"),
    "int8 per row": ArrayConfig(format=INT4, per_tensor=True),
    "int8 asymmetric": Case(ArrayConfig(format=INT4, group_size=(128, 8)), (0, 1)),
}
product = jax.jit(partial(gpu_triton.run, interpret=True), static_argnames="dtype")
forced = partial(matmul, implementation="triton")


def stored(config: Any = G128, order=(-1, -2), seed=1):
    """A weight with its contracted axis last, as `tree.quantize` stores it for GPUs."""
    return weight(config, (K, N), seed).reorder(order)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", LEFT)
def test_products_of_operands_as_they_are_stored_match_numpy(name):
    q, config = stored(RIGHT[name]), LEFT[name]
    floats = normal(2, 3, K)
    x = jnp.asarray(floats, name) if config is None else quantized(floats, config, axis=-1)
    assert_product(product(x, q, dtype=jnp.float32), "abk,kn->abn", x, q)
    narrow = jax.eval_shape(partial(product, dtype=jnp.bfloat16), x, q)
    assert (narrow.shape, narrow.dtype) == ((2, 3, N), jnp.bfloat16)


# (zero point, tolerance): codes less 3.3 are rounded to bfloat16.
FRACTIONS = [(7.5, 2e-6), (3.3, 2.0**-8)]


@pytest.mark.slow
@pytest.mark.some_rows(1)
@pytest.mark.parametrize("zero, tolerance", FRACTIONS)
@pytest.mark.parametrize("name", ["bfloat16", "int8 per row"])
def test_fractions_of_zero_points_are_kept(name, zero, tolerance):
    q, x = stored(RIGHT["bfloat16"]), jnp.asarray(normal(2, 3, K), jnp.bfloat16)
    q = dataclasses.replace(q, zero_point=jnp.full_like(q.scale, zero))
    if LEFT[name] is not None:
        x = quantize(x.astype(jnp.float32), LEFT[name], axis=-1)
    got = product(x, q, dtype=jnp.float32)
    assert_product(got, "abk,kn->abn", x, q, tolerance=tolerance)


def test_vmap_runs_the_kernel_for_each():
    one, two = (stored(seed=seed) for seed in (1, 2))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
    x = jnp.asarray(normal(2, 3, K), jnp.bfloat16)
    run = partial(product, dtype=jnp.float32)
    got = jax.jit(jax.vmap(run))(x, both)
    np.testing.assert_allclose(got[0], run(x[0], one), rtol=1e-6)
    np.testing.assert_allclose(got[1], run(x[1], two), rtol=1e-6)


UNSUPPORTED = {
    "nf4 codes are not 4-bit integers": (NF4, {}, {}),
    "whose last axis is contracted": (INT4, {"order": None}, {}),
    "a precision of highest is more than tensorfloat32": (INT4, {}, {"precision": "highest"}),
    "an operand is empty": (INT4, {"rows": 0}, {}),
    "offsets in arrays of 2147483648 elements may overflow int32": (INT4, {"rows": 2**23}, {}),
    "groups of 8 are not a multiple of 16": (INT4, {"group_size": 8}, {}),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_triton_raises_with_the_reason(reason):
    format, given, options = UNSUPPORTED[reason]
    config = ArrayConfig(format=format, group_size=given.get("group_size", 64))
    q = stored(config, given.get("order", (-1, -2)))
    x = jax.ShapeDtypeStruct((given.get("rows", 2), K), jnp.float32)
    with pytest.raises(ValueError, match=f"implementation='triton' cannot run .*{reason}"):
        jax.eval_shape(partial(forced, **options), x, q)


PER_ROW, PER_COLUMN = (Case(ArrayConfig(), axis) for axis in (-1, 0))
FP8_ROWS, FP8_COLUMNS = (Case(ArrayConfig(format=FP8_E4M3), axis) for axis in (-1, 0))
THIRDS = Format("thirds", dtype="int8", qmin=-1, qmax=1, codebook=(-1, -1 / 3, 0, 1 / 3, 1))
# Cases of a (3, 4, K) left operand and of the weight.
CODES = {
    "float32": (PER_ROW, PER_COLUMN),
    "bfloat16": (Case(ArrayConfig(group_size=(2, K)), (1, 2)), Case(ArrayConfig(per_tensor=True))),
    "float16": (
        Case(ArrayConfig(per_tensor=True, scale_dtype="bfloat16")),
        Case(ArrayConfig(group_size=(K, 8), scale_dtype="float8_e4m3fn"), (0, 1)),
    ),
}


@pytest.mark.some_rows(1)
@pytest.mark.parametrize("name", CODES)
def test_products_of_int8_codes_have_the_bits_of_the_integer_row(name):
    left, right = CODES[name]
    q, x = stored(right), quantized(normal(3, 4, K, seed=2), *left)
    got = product(x, q, dtype=name)
    by_xla = partial(matmul, implementation="integer", preferred_element_type=name)
    np.testing.assert_array_equal(got, jax.jit(by_xla)(x, q), strict=True)


def test_products_of_float8_codes_match_numpy():
    q, x = stored(FP8_COLUMNS), quantized(normal(2, 3, K), *FP8_ROWS)
    assert_product(product(x, q, dtype=jnp.float32), "abk,kn->abn", x, q)


UNSUPPORTED_CODES = {
    "an operand of float32 does not have codes to multiply with int8 codes": (None, PER_COLUMN, {}),
    "int8 by fp8_e4m3 codes are not both int8 or both float8_e4m3fn": (PER_ROW, FP8_COLUMNS, {}),
    "fp8_e5m2 by fp8_e5m2 codes are not both int8 or both float8_e4m3fn": (
        Case(ArrayConfig(format=FP8_E5M2), -1),
        ArrayConfig(format=FP8_E5M2),
        {},
    ),
    "thirds by thirds codes are not both int8 or both float8_e4m3fn": (
        Case(ArrayConfig(format=THIRDS), -1),
        ArrayConfig(format=THIRDS),
        {},
    ),
    "int8 codes have zero points": (Case(ArrayConfig(symmetric=False), -1), PER_COLUMN, {}),
    "scales .* change along the contracted axes": (
        FP8_ROWS,
        ArrayConfig(format=MXFP8),
        {},
    ),
    "a precision of highest is more than tensorfloat32": (
        FP8_ROWS,
        FP8_COLUMNS,
        {"precision": "highest"},
    ),
}


@pytest.mark.parametrize("reason", UNSUPPORTED_CODES)
def test_unsupported_codes_raise_with_the_reason(reason):
    left, right, options = UNSUPPORTED_CODES[reason]
    x = jnp.asarray(normal(3, K))
    x = x if left is None else quantized(x, *left)
    with pytest.raises(ValueError, match=f"implementation='triton' cannot run .*{reason}"):
        forced(x, stored(right), **options)


def test_sums_that_may_overflow_int32_raise():
    def of(*shape):
        return jax.eval_shape(partial(quantize, axis=-1), jnp.zeros(shape), ArrayConfig())

    x, q = of(2, 2**17), of(3, 2**17)
    assert (
        gpu_triton.why_unsupported(x, q, spec_of_rows(1)) == "sums of 131072 codes may leave int32"
    )
    assert gpu_triton.why_unsupported(of(2, 2**16), of(3, 2**16), spec_of_rows(1)) is None


def test_without_triton_nothing_is_taken(monkeypatch):
    why = pallas_gpu.why_unsupported_platform.__wrapped__
    monkeypatch.setattr(pallas_gpu, "_TRITON", ("jaxlib.no_triton",))
    monkeypatch.setattr(pallas_gpu, "why_unsupported_platform", why)
    x = jnp.zeros((2, K))
    for left, right in ((x, stored()), (quantized(x, *PER_ROW), stored(PER_COLUMN))):
        assert (
            gpu_triton.why_unsupported(left, right, spec_of_rows(1))
            == "this JAX does not include Triton"
        )


def test_integer_codes_ignore_precision():
    x, q = quantized(normal(3, K), *PER_ROW), stored(PER_COLUMN)
    with jax.default_matmul_precision("float32"):
        assert gpu_triton.why_unsupported(x, q, spec_of_rows(1, "highest")) is None


def test_a_default_precision_above_tf32_is_respected():
    q, x = stored(), jnp.zeros((2, K))
    assert gpu_triton.why_unsupported(x, q, spec_of_rows(1)) is None
    with jax.default_matmul_precision("float32"):
        assert "a precision of float32" in str(gpu_triton.why_unsupported(x, q, spec_of_rows(1)))
        assert (
            gpu_triton.why_unsupported(
                x.astype(jnp.bfloat16), q.astype(jnp.bfloat16), spec_of_rows(1)
            )
            is None
        )


def test_float64_raises():
    with jax.enable_x64(True):
        q, x = stored(), jnp.zeros((2, K), jnp.float32)
        with pytest.raises(ValueError, match=r"cannot run .*: the result is float64"):
            forced(x, q, preferred_element_type=jnp.float64)
        reason = "float64 by float32 are not float32 or bfloat16 or float16"
        assert gpu_triton.why_unsupported(x.astype(jnp.float64), q, spec_of_rows(1)) == reason


def test_without_a_gpu_triton_fails_with_the_reason():
    with pytest.raises(ValueError, match="'triton' needs a GPU with CUDA; got a program for cpu"):
        forced(jnp.asarray(normal(3, K)), stored())


def calls(function, *arguments, platforms=("cuda",)):
    """How many of Triton's kernels the program for a GPU has."""
    return text_of(function, *arguments, platforms=platforms).count("gpu.triton")


def text_of(function, *arguments, platforms=("cuda",)):
    return lowered_for_gpu(function, *arguments, platforms=platforms)


def test_the_kernel_runs_only_where_it_is_asked_for():
    q, x = stored().astype(jnp.bfloat16), jnp.ones((16, K), jnp.bfloat16)
    assert calls(forced, x, q) == 1
    assert calls(matmul, x, q) == 0
    assert calls(lambda x, q: forced(x, q).sum(), x, q) == 1
    transposed = partial(einsum, "mk,kn->nm", implementation="triton")
    assert calls(transposed, x, q) == 1
    assert jax.eval_shape(transposed, x, q).shape == (N, 16)


def test_programs_for_several_platforms_or_devices_do_without():
    q, x = stored().astype(jnp.bfloat16), jnp.ones((18, K), jnp.bfloat16)
    assert calls(forced, x, q, platforms=("cuda", "cpu")) == 0
    exported = export.export(jax.jit(forced), platforms=["cuda"])(x, q)
    assert "gpu.triton" not in exported.mlir_module()
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("a",), axis_types=kinds)
    columns = jax.device_put(q, jax.NamedSharding(mesh, jax.P("a")))
    assert calls(forced, x, columns) == 0
    specs = jax.tree.map(lambda _: jax.P("a"), q)
    part = partial(jax.shard_map, mesh=mesh_of_gpus(a=4))
    by_columns = part(forced, in_specs=(jax.P(), specs), out_specs=jax.P(None, "a"))
    assert calls(by_columns, x, q) == 1


def test_gradients_and_batches_of_codes_run_the_kernel_once():
    q = stored(PER_COLUMN).astype(jnp.bfloat16)
    x = quantized(jnp.ones((16, K), jnp.bfloat16), *PER_ROW)
    text = text_of(forced, x, q)
    assert text.count("gpu.triton") == 1
    # The result is written in its dtype, and nothing wider.
    assert f"tensor<16x{N}xbf16>" in text
    assert f"tensor<16x{N}xf32>" not in text
    assert calls(matmul, x, q) == 0
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), x)
    assert calls(jax.vmap(forced, (0, None)), several, q) == 1

    def loss(scale, x, q):
        return forced(dataclasses.replace(x, scale=scale), q).sum().astype(jnp.float32)

    assert calls(jax.value_and_grad(loss), x.scale, x, q) == 1


def test_explain_says_what_the_kernel_multiplies():
    x, q = jnp.ones((16, K)), stored(PER_COLUMN)
    (row,) = explain(matmul, quantized(x, *PER_ROW), q, platform="gpu")
    assert (row.implementation, row.is_integer) == ("integer", True)
    assert row.not_selected == (("triton", "not measured on a GPU yet"),)
    (row,) = explain(forced, quantized(x, *PER_ROW), q, platform="gpu")
    assert (row.implementation, row.is_integer) == ("triton", True)
    for left, right in ((PER_ROW, G128), (FP8_ROWS, FP8_COLUMNS)):
        (row,) = explain(forced, quantized(x, *left), stored(right), platform="gpu")
        assert not row.is_integer
