"""Which products the Pallas kernel for TPUs computes, and from what."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tpu_compiler
from jaxquant import (
    FP8_E4M3,
    FP8_E5M2,
    INT4,
    INT8,
    NF4,
    SCHEMES,
    W8A8,
    ArrayConfig,
    Inputs,
    Rule,
    Scheme,
    einsum,
    matmul,
    quantize,
    scan,
    tree,
)
from jaxquant.jaxprs import chips
from jaxquant.ops import inputs
from jaxquant.ops.rows import tpu_pallas

from ...cases import Case
from ..products import assert_product, normal, quantized, spec_of_rows, weight, with_inputs

pytestmark = pytest.mark.usefixtures("quick_compilation")

K, N = 256, 72
G128 = ArrayConfig(format=INT4, group_size=128)
LEFT = {
    "bfloat16": None,
    "int8 per row": ArrayConfig(),
    "int8 asymmetric": ArrayConfig(symmetric=False),
}
RIGHT = {
    "bfloat16": ArrayConfig(format=INT4, group_size=64, symmetric=False),
    "int8 per row": ArrayConfig(format=INT4, per_tensor=True),
    "int8 asymmetric": Case(ArrayConfig(format=INT4, group_size=(128, 8)), (0, 1)),
}
product = jax.jit(partial(tpu_pallas.run, interpret=True), static_argnames="dtype")


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", LEFT)
def test_products_of_operands_as_they_are_stored_match_numpy(name):
    q, x = weight(RIGHT[name], (K, N)), jnp.asarray(normal(2, 3, K), jnp.bfloat16)
    if LEFT[name] is not None:
        x = quantized(x.astype(jnp.float32), LEFT[name], axis=-1)
    # Values, not codes, are rounded to bfloat16.
    tolerance = 2.0**-8 if name == "int8 asymmetric" else 2e-6
    got = product(x, q, dtype=jnp.float32)
    assert_product(got, "abk,kn->abn", x, q, tolerance=tolerance)
    narrow = jax.eval_shape(partial(product, dtype=jnp.bfloat16), x, q)
    assert (narrow.shape, narrow.dtype) == ((2, 3, N), jnp.bfloat16)


# (zero point, tolerance): codes less 3.3 are rounded to bfloat16.
FRACTIONS = [(7.5, 2e-6), (3.3, 2.0**-8)]


@pytest.mark.parametrize("zero, tolerance", FRACTIONS)
@pytest.mark.parametrize("name", ["bfloat16", "int8 per row"])
def test_fractions_of_zero_points_are_kept(name, zero, tolerance):
    q, x = weight(RIGHT["bfloat16"], (K, N)), jnp.asarray(normal(2, 3, K), jnp.bfloat16)
    q = dataclasses.replace(q, zero_point=jnp.full_like(q.scale, zero))
    if LEFT[name] is not None:
        x = quantize(x.astype(jnp.float32), LEFT[name], axis=-1)
    got = product(x, q, dtype=jnp.float32)
    assert_product(got, "abk,kn->abn", x, q, tolerance=tolerance)


def test_one_scale_for_all_rows_and_results_of_16_bits():
    q, x = weight(G128, (K, N)), quantized(normal(2, 3, K), ArrayConfig(per_tensor=True))
    for dtype, tolerance in ((jnp.float32, 2e-6), (jnp.bfloat16, 2.0**-8)):
        got = product(x, q, dtype=dtype)
        assert got.dtype == dtype
        assert_product(got.astype(jnp.float32), "abk,kn->abn", x, q, tolerance=tolerance)


def test_vmap_runs_the_kernel_for_each():
    one, two = (weight(G128, (K, N), seed) for seed in (1, 2))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two)
    x = jnp.asarray(normal(2, 3, K), jnp.bfloat16)
    run = partial(product, dtype=jnp.float32)
    got = jax.jit(jax.vmap(run))(x, both)
    np.testing.assert_allclose(got[0], run(x[0], one), rtol=1e-6)
    np.testing.assert_allclose(got[1], run(x[1], two), rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [ArrayConfig(value_range=(-100, 100)), ArrayConfig(format=FP8_E4M3)],
    ids=["int8", "fp8"],
)
def test_rows_of_any_number_of_axes_are_quantized_as_core_does(config):
    x = jnp.asarray(normal(2, 3, 50))
    run = jax.jit(partial(inputs.quantize_rows, config=config, interpret=True))
    got, wanted = run(x), quantize(x, config, axis=2)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    special = x.at[0, 0, 0].set(jnp.nan).at[1, 1, 1].set(jnp.inf).at[1, 2].set(0)
    got, wanted = (
        jax.tree.map(np.float32, q) for q in (run(special), quantize(special, config, axis=2))
    )
    np.testing.assert_array_equal(got.scale, wanted.scale)
    np.testing.assert_array_equal(got.codes, wanted.codes)


def test_without_a_tpu_pallas_fails_with_the_reason():
    q, x = weight(G128, (K, N)), jnp.asarray(normal(3, K))
    with pytest.raises(ValueError, match="'pallas' needs a TPU; got a program for cpu"):
        matmul(x, q, implementation="pallas")


UNSUPPORTED = {
    "nf4 codes are not 4-bit integers": (NF4, {}, {}),
    "whose first axis is contracted": (INT4, {"order": (-1, -2)}, {}),
    "float16 by float16 are not float32 or bfloat16": (INT4, {"dtype": jnp.float16}, {}),
    "a precision of highest is more than bfloat16": (INT4, {}, {"precision": "highest"}),
    "an operand is empty": (INT4, {"rows": 0}, {}),
    "groups of 16 are not a multiple of 32": (INT4, {"group_size": 16}, {}),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_pallas_raises_with_the_reason(reason):
    format, given, options = UNSUPPORTED[reason]
    config = ArrayConfig(format=format, group_size=given.get("group_size", 64))
    q = weight(config, (K, N)).reorder(given.get("order"))
    q = q.astype(given.get("dtype", jnp.float32))
    x = jnp.zeros((given.get("rows", 2), K), q.dtype)
    with pytest.raises(ValueError, match=f"implementation='pallas' cannot run .*{reason}"):
        matmul(x, q, implementation="pallas", **options)


def test_a_default_precision_of_more_than_one_pass_is_heeded():
    q, x = weight(G128, (K, N)), jnp.zeros((2, K))
    assert tpu_pallas.why_unsupported(x, q, spec_of_rows(0)) is None
    with jax.default_matmul_precision("float32"):
        assert "a precision of float32" in str(tpu_pallas.why_unsupported(x, q, spec_of_rows(0)))
        assert tpu_pallas.why_unsupported(x, q, spec_of_rows(0, jax.lax.Precision.DEFAULT)) is None


def calls(function, *arguments, platforms=("tpu",)):
    """How many Pallas kernels the program for a TPU has."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms)
    return lowered.as_text().count("tpu_custom_call")


def w8a8(x, q):
    return matmul(x, with_inputs(q, Inputs(W8A8.inputs)))


# Chip, group size, rows, whether inputs are quantized first, kernels. No two cases have equal
# shapes: JAX keeps what it has traced.
CHOSEN = [
    ("v6e", 128, 8, False, 1),
    ("v6e", 128, 2048, False, 1),
    ("v6e", 256, 256, False, 1),
    ("v6e", 256, 257, False, 0),
    ("v5e", 128, 10, False, 1),
    ("v5e", 128, 258, False, 0),
    ("v5e", 256, 259, False, 0),
    ("v4", 128, 11, False, 0),
    (None, 128, 12, False, 0),
    ("v6e", 128, 511, True, 1),
    ("v6e", 128, 512, True, 2),
    ("v5e", 128, 513, True, 1),
    (None, 128, 514, True, 0),
]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("chip, group_size, rows, quantizes, count", CHOSEN, ids=str)
def test_the_chip_and_the_rows_decide(monkeypatch, chip, group_size, rows, quantizes, count):
    monkeypatch.setattr(chips, "target", lambda module: chip)
    q = weight(ArrayConfig(format=INT4, group_size=group_size), (K, N))
    x = jnp.zeros((rows, K), jnp.float32)
    assert calls(w8a8 if quantizes else matmul, x, q) == count


def test_this_process_has_no_tpu_and_quantizes_as_core_does():
    assert chips.generation() is None
    x = jnp.asarray(normal(600, K))
    got = inputs.quantize_inputs(x, ArrayConfig(), -1)
    jax.tree.map(np.testing.assert_array_equal, got, quantize(x, ArrayConfig(), axis=-1))


@pytest.fixture
def on_v6e(monkeypatch):
    monkeypatch.setattr(chips, "target", lambda module: "v6e")


@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    "config",
    [
        ArrayConfig(per_tensor=True),
        ArrayConfig(symmetric=False),
        ArrayConfig(group_size=64),
        ArrayConfig(scale_dtype="bfloat16"),
        ArrayConfig(format=INT4),
        ArrayConfig(format=FP8_E5M2),
    ],
    ids=["tensor", "asymmetric", "groups", "bfloat16", "int4", "e5m2"],
)
def test_other_inputs_are_left_to_xla(on_v6e, config):
    x = jnp.zeros((700, K))
    assert calls(lambda x: inputs.quantize_inputs(x, ArrayConfig(), -1).codes, x) == 1
    assert calls(lambda x: inputs.quantize_inputs(x, config, -1).codes, x) == 0


def test_rows_too_long_for_a_core_are_left_to_xla(on_v6e):
    for length, count in ((2**16, 1), (2**16 + 1, 0)):
        x = jax.ShapeDtypeStruct((512, length), jnp.float32)
        assert calls(lambda x: inputs.quantize_inputs(x, ArrayConfig(), -1).codes, x) == count


def test_programs_for_several_platforms_or_devices_do_without(on_v6e):
    q, x = weight(G128, (K, N)), jnp.asarray(normal(16, K))
    assert calls(matmul, x, q) == 1
    assert calls(matmul, x, q, platforms=("tpu", "cpu")) == 0
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("a",), axis_types=kinds)
    columns = jax.device_put(q, jax.NamedSharding(mesh, jax.P(None, "a")))
    assert calls(matmul, x, columns) == 0
    specs = jax.tree.map(lambda _: jax.P(None, "a"), q)
    part = partial(jax.shard_map, mesh=mesh)
    by_columns = part(matmul, in_specs=(jax.P(), specs), out_specs=jax.P(None, "a"))
    assert calls(by_columns, x, columns) == 1
    assert_product(by_columns(x, columns), "mk,kn->mn", x, q)


def test_gradients_pass_through_the_kernels(on_v6e):
    q, x = weight(ArrayConfig(), (K, N)), jnp.asarray(normal(640, K))
    gradient = jax.grad(lambda x: (w8a8(x, q) ** 2).sum())
    assert calls(gradient, x) > 0
    plain = jax.grad(lambda x: (2 * w8a8(jax.lax.stop_gradient(x), q) * (x @ q.dequantize())).sum())
    np.testing.assert_allclose(gradient(x), plain(x), rtol=1e-3, atol=1e-2)


def test_axes_of_the_result_follow_the_equation(on_v6e):
    q, x = weight(G128, (K, N)), jnp.ones((17, K))
    transposed = partial(einsum, "mk,kn->nm")
    assert calls(transposed, x, q) == 1
    assert jax.eval_shape(transposed, x, q).shape == (N, 17)


LAYERS = 3
# (weights, activations) of a stack.
IN_STACK = {
    "int8 by int8": (ArrayConfig(), ArrayConfig()),
    "int8 by bfloat16": (ArrayConfig(group_size=128), None),
    "int4 by bfloat16": (RIGHT["bfloat16"], None),
    "int4 by int8": (G128, ArrayConfig()),
    "fp8 by bfloat16": (ArrayConfig(format=FP8_E5M2, group_size=64), None),
    "fp8 by fp8": (ArrayConfig(format=FP8_E4M3), ArrayConfig(format=FP8_E4M3)),
    "fp8 in blocks": (ArrayConfig(format=FP8_E4M3, group_size=(128, 24)), None),
    "scales of 16 bits": (ArrayConfig(scale_dtype="bfloat16"), ArrayConfig()),
    "nested scales": (
        ArrayConfig(format=INT4, group_size=64, symmetric=False, scale_dtype="float8_e4m3fn"),
        None,
    ),
}


# Scales that are converted or repeated, those of one layer.
OF_LAYER = ("fp8 in blocks", "scales of 16 bits", "nested scales")


@pytest.mark.parametrize("name", IN_STACK)
def test_few_rows_meet_one_matrix_of_a_stack_where_it_is(name):
    config, of_rows = IN_STACK[name]
    axis = (1, 2) if isinstance(config.group_size, tuple) else 1
    stack = quantize(jnp.asarray(normal(LAYERS, K, N, center=0)), config, axis=axis)
    x = jnp.asarray(normal(2, 150, K), jnp.bfloat16)
    if of_rows is not None:
        x = quantize(x.astype(jnp.float32), of_rows, axis=-1)
    run = jax.jit(partial(tpu_pallas.run_in_stack, dtype=jnp.float32, interpret=True))
    for layer in range(LAYERS):
        one = jax.tree.map(lambda leaf, i=layer: leaf[i], stack)
        # What is read of the stack, and what of the layer.
        nothing = partial(jax.tree.map, jnp.zeros_like)
        of_layer, of_stack = dataclasses.replace(one, codes=nothing(one.codes)), stack
        if name in OF_LAYER:
            of_stack = dataclasses.replace(stack, scale=nothing(stack.scale))
        else:
            of_layer = dataclasses.replace(of_layer, scale=nothing(one.scale))
        got = run(x, of_layer, of_stack, jnp.int32(layer))
        # Of so many rows, codes are scaled before they are rounded, unless they are integers.
        is_exact = name in ("int8 by int8", "scales of 16 bits")
        tolerance = 2e-6 if is_exact else 2.0**-8
        assert_product(got, "abk,kn->abn", x, one, tolerance=tolerance)


def test_rows_of_fp8_keep_their_codes_if_each_has_one_scale():
    x = jnp.asarray(normal(4, 6, K))
    for per_tensor, axis in ((False, -1), (True, None)):
        q = quantize(x, ArrayConfig(format=FP8_E4M3, per_tensor=per_tensor), axis)
        codes, scale = tpu_pallas.rows_of(q)
        np.testing.assert_array_equal(codes, q.codes.astype(jnp.bfloat16))
        np.testing.assert_array_equal(scale, q.scale)
    for size, axes in ((64, -1), ((2, K), (-2, -1))):
        q = quantize(x, ArrayConfig(format=FP8_E4M3, group_size=size), axes)
        values, scale = tpu_pallas.rows_of(q)
        np.testing.assert_array_equal(values, q.dequantize())
        assert scale is None


@pytest.mark.parametrize("rows, is_there", [(5, True), (65, False)])
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
def test_rows_of_a_stack_are_quantized_where_they_are_multiplied(rows, is_there, format):
    config = ArrayConfig(format=format)
    stack = quantize(jnp.asarray(normal(LAYERS, K, N, center=0)), config, axis=1)
    x = jnp.asarray(normal(rows, K))
    one = jax.tree.map(lambda leaf: leaf[1], stack)
    given = quantize(x, config, axis=-1), one, stack, jnp.int32(1)
    run = jax.jit(partial(tpu_pallas.run_in_stack, dtype=jnp.float32, interpret=True))
    found = run(*given, unquantized=x)
    np.testing.assert_array_equal(found, run(*given))
    spoiled = run(*given, unquantized=x * jnp.nan)
    assert np.isnan(spoiled).any() == is_there


X = jnp.asarray(normal(3, K))


def gives_rows(config, **fields):
    """Whether `treat` gives rows for a kernel to quantize, and whether these are as they were."""
    q = with_inputs(weight(ArrayConfig(), (K, N)), Inputs(config, **fields))
    *_, rows = inputs.treat(X, q, ((1,), (0,)), ((1,), (0,)))
    return rows is not None, rows is X


def test_rows_with_one_scale_for_each_are_given_to_kernels():
    assert gives_rows(ArrayConfig()) == (True, True)
    assert gives_rows(ArrayConfig(format=FP8_E4M3)) == (True, True)
    assert gives_rows(ArrayConfig(), multiplier=jnp.full(K, 2.0)) == (True, False)
    others = [
        None,
        ArrayConfig(per_tensor=True),
        ArrayConfig(group_size=64),
        ArrayConfig(symmetric=False),
        ArrayConfig(value_range=(-100, 100)),
        ArrayConfig(value_range=(-128, 127)),
        ArrayConfig(format=INT4),
        ArrayConfig(format=FP8_E5M2),
    ]
    assert not any(gives_rows(config)[0] for config in others)
    assert not gives_rows(ArrayConfig(), scale=jnp.float32(2))[0]


# (layout of the stack, rows, whether the kernel reads it there).
LOOPS = {
    "one product": (lambda x, q: matmul(x, q), 8, True),
    "two heads": (lambda x, q: einsum("mk,khd->mhd", x, q), 8, False),
    "many rows": (lambda x, q: matmul(x, q), 257, False),
    "columns that do not fill tiles": (lambda x, q: matmul(x, q)[:, :512], 8, False),
    "compiled apart": (lambda x, q: jax.jit(lambda x, q: matmul(x, q))(x, q), 8, False),
    "scaled": (lambda x, q: matmul(x, dataclasses.replace(q, scale=q.scale + 1)), 8, False),
    "FP8": (lambda x, q: matmul(x, q), 8, True),
    "FP8 blocks": (lambda x, q: matmul(x, q), 8, True),
}
SCHEMES_OF_LOOPS = {
    "FP8": SCHEMES["FP8"],
    # As DeepSeek-V3 stores them.
    "FP8 blocks": Scheme(ArrayConfig(format=FP8_E4M3, group_size=(128, 128))),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.usefixtures("libtpu")
def test_loops_over_layers_do_not_slice_what_kernels_read(name):
    product, rows, is_there = LOOPS[name]
    shapes = {"two heads": (512, 4, 128), "columns that do not fill tiles": (512, 576)}
    shape = shapes.get(name, (512, 512))

    def init():
        axis = (1, 2) if name == "FP8 blocks" else 1
        rule = Rule("w", SCHEMES_OF_LOOPS.get(name, W8A8), axis=axis)
        w = {"w": jnp.ones((LAYERS, *shape), jnp.bfloat16)}
        return tree.quantize(w, [rule], platform="tpu")["w"]

    def run(x, stack):
        return scan(lambda x, q: (x + product(x, q).reshape(-1, x.shape[1])[:1], None), x, stack)[0]

    x = jax.ShapeDtypeStruct((rows, 512), jnp.bfloat16)
    compiled = tpu_compiler.compile_for("v5e", run, x, jax.eval_shape(init))
    text = compiled.as_text() or ""
    assert ("ragged_dot/pallas_call" in text) == is_there
    assert ("quantize_rows/pallas_call" in text) == (rows <= 64 and not is_there)
    if is_there:
        memory: Any = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < 512 * 512
