"""Matrix multiplications by the native kernels of the CPU, where they were compiled."""

import collections
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    FORMATS,
    FP8_E4M3,
    INT2,
    INT4,
    INT8,
    NF4,
    W8A8,
    AbsMax,
    ArrayConfig,
    Format,
    Inputs,
    Percentile,
    dot_general,
    einsum,
    matmul,
    quantize,
)
from jaxquant.kernels import cpu
from jaxquant.ops.inputs import quantize_inputs
from jaxquant.ops.rows import cpu_native

from ...cases import Case
from ..products import assert_product, normal, quantized, weight, with_inputs

needs_native = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"
)
# Large enough, and neither a power of two nor equal.
K, N = 384, 701
WEIGHTS = {
    "int8": ArrayConfig(),
    "int8-tensor": ArrayConfig(per_tensor=True),
    "int8-asym": ArrayConfig(symmetric=False),
    "int8-g32": ArrayConfig(group_size=32),
    "int8-asym-g96": ArrayConfig(group_size=96, symmetric=False),
    "int8-blocks": Case(ArrayConfig(group_size=(K, 1)), (0, 1)),
    "int4": ArrayConfig(format=INT4),
    "int4-asym": ArrayConfig(format=INT4, symmetric=False),
    "int4-tensor": ArrayConfig(format=INT4, per_tensor=True),
    "int4-g128": ArrayConfig(format=INT4, group_size=128),
    "int4-asym-g32": ArrayConfig(format=INT4, group_size=32, symmetric=False),
    "int4-nested": ArrayConfig(format=INT4, group_size=64, scale_dtype="float8_e4m3fn"),
    "nf4-g64": ArrayConfig(format=NF4, group_size=64),
    "nf4-int4": ArrayConfig(format=dataclasses.replace(NF4, dtype="int4"), group_size=64),
    "mxfp4": ArrayConfig(format=FORMATS["mxfp4"]),
    "nvfp4": ArrayConfig(format=FORMATS["nvfp4"]),
    "unsigned": ArrayConfig(
        format=Format("uint4", "uint4", 0, 15), group_size=128, symmetric=False
    ),
    "seven": ArrayConfig(format=Format("seven", "int4", -1, 1, (-1, -0.5, -0.2, 0, 0.2, 0.5, 1))),
}
INPUTS = {"float": None, "int8": ArrayConfig(), "int8-tensor": ArrayConfig(per_tensor=True)}
LIMITS = {name: getattr(cpu_native, name) for name in ("_LEAST_WEIGHTS", "_LEAST_COLUMNS")}
forced = partial(matmul, implementation="native")
run = jax.jit(forced, static_argnames="preferred_element_type")


@pytest.fixture(autouse=True)
def any_number_of_rows(monkeypatch):
    """Kernels compute any number of rows, also with instructions with which XLA is faster."""
    monkeypatch.setattr(cpu_native, "_MOST_ROWS", collections.defaultdict(dict))
    for name in LIMITS:
        monkeypatch.setattr(cpu_native, name, (0, 0))


def stored(name, shape=(K, N), seed=1):
    return weight(WEIGHTS[name], shape, seed).reorder((-1, -2))


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize("name", [n for n in WEIGHTS if n not in ("int4", "int8-blocks", "mxfp4")])
def test_every_combination_matches_numpy_and_is_selected(name):
    # Few rows for some, and enough for panels for the others.
    rows = 5 if len(name) % 2 else 18
    q, x = stored(name), jnp.asarray(normal(rows, K))
    left = {name: x if c is None else quantized(x, c, axis=-1) for name, c in INPUTS.items()}
    products = jax.jit(
        lambda left, q: {name: (forced(x, q), matmul(x, q)) for name, x in left.items()}
    )
    for name, (got, chosen) in products(left, q).items():
        assert_product(got, "mk,kn->mn", left[name], q)
        np.testing.assert_array_equal(chosen, got)


@needs_native
@pytest.mark.parametrize("name", ["int8", "int8-g32", "int4-g128", "int4-asym-g32", "nf4-g64"])
def test_scales_may_be_negative(name):
    q = stored(name)
    negative = dataclasses.replace(q, scale=-q.scale)
    for rows in (1, 5, 18):
        x = jnp.asarray(normal(rows, K))
        for left in (x, quantized(x, ArrayConfig(), axis=-1)):
            np.testing.assert_array_equal(run(left, negative), -run(left, q))


# (K, N) and elements per group, or None: rows that end within a vector or a byte, one column, and
# widths and groups of models.
SIZES = [("int4", (576, 192), 32), ("int4-asym", (576, 192), 96), ("nf4-g64", (896, 130), 64)]
SIZES += [("int4-asym", (1536, 67), 16), ("int4", (4864, 9), 256), ("nf4-g64", (11008, 6), 128)]
SIZES += [("int4-asym", (1000, 1003), 40), ("int4", (1003, 36), None), ("nf4-g64", (33000, 1), 8)]
SIZES += [("int4-asym", (102, 700), None), ("nf4-g64", (576, 100), 192)]
SIZES += [("int8", (576, 192), 32), ("int8-asym", (1003, 66), None), ("int8-asym", (4848, 7), 48)]


@needs_native
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name, shape, group", SIZES, ids=str)
def test_every_width_and_group_is_native_and_matches_numpy(name, shape, group):
    q = weight(dataclasses.replace(WEIGHTS[name], group_size=group), shape).reorder((-1, -2))
    kinds = INPUTS["float"], INPUTS["int8"]
    for rows, dtype in ((0, "float32"), (1, "bfloat16"), (5, "float32"), (18, "float32")):
        x, w = jnp.asarray(normal(rows, shape[0]), dtype), q.astype(dtype)
        left = [x if config is None else quantized(x, config, axis=-1) for config in kinds]
        products = jax.jit(lambda left, w: [forced(x, w) for x in left])(left, w)
        for got, operand in zip(products, left, strict=True):
            assert got.dtype == dtype
            tolerance = 2e-6 if dtype == "float32" else 2.0**-8
            assert_product(got, "mk,kn->mn", operand, w, tolerance=tolerance)


# (equation, shape of the weights, case, order): what attention multiplies by, as it is stored.
GROUPED = ArrayConfig(format=INT4, group_size=32)
QUERY = "btd,dnh->btnh", (288, 5, 32), (-2, -1, -3)
OUT = "btnh,nhd->btd", (6, 32, 200), (-1, -3, -2)
ATTENTION = {
    "query, int8": (*QUERY, Case(ArrayConfig())),
    "query, one scale per head": (*QUERY, Case(ArrayConfig(group_size=(None, 1, None)), (0, 1, 2))),
    "query, boxes": (*QUERY, Case(ArrayConfig(group_size=(None, 1, 8)), (0, 1, 2))),
    "query, groups": (*QUERY, Case(dataclasses.replace(GROUPED, symmetric=False))),
    "query, per tensor": (*QUERY, Case(WEIGHTS["int4-tensor"])),
    "query, quantized scales": (*QUERY, Case(WEIGHTS["nvfp4"])),
    "out, int8": (*OUT, Case(ArrayConfig(), (0, 1))),
    "out, groups": (*OUT, Case(GROUPED, 1)),
    "out, groups over heads": (
        *OUT,
        Case(dataclasses.replace(GROUPED, group_size=(2, None), symmetric=False), (0, 1)),
    ),
    "out, groups beside heads": (
        *OUT,
        Case(dataclasses.replace(GROUPED, group_size=(None, 16)), (0, 1)),
    ),
}


@pytest.mark.some_rows(3)
@needs_native
@pytest.mark.parametrize("name", ATTENTION)
def test_kernels_of_attention_are_matrices(name):
    equation, shape, order, case = ATTENTION[name]
    q = quantize(normal(*shape, seed=1), *case).reorder(order)
    inner = shape[: 2 if equation == OUT[0] else 1]
    axes = tuple(range(-len(inner), 0))
    products = jax.jit(
        lambda x, q: (einsum(equation, x, q, implementation="native"), einsum(equation, x, q))
    )
    for rows in (0, 1, 9):
        x = jnp.asarray(normal(2, rows, *inner))
        for left in (x, quantized(x, ArrayConfig(), axes), quantized(x, ArrayConfig(), -1)):
            got, chosen = products(left, q)
            assert_product(got, equation, left, q)
            np.testing.assert_array_equal(chosen, got)


@needs_native
def test_batches_of_matrices_are_not_one_matrix():
    q = quantize(normal(3, 64, 512), ArrayConfig(), axis=-1)
    with pytest.raises(ValueError, match="not stored as a matrix whose last axis is contracted"):
        einsum("bmk,bnk->bmn", jnp.ones((3, 5, 512)), q, implementation="native")


@needs_native
@pytest.mark.parametrize(
    "length, columns", [(11264, 3), (2048, 17), (1088, 40), (1088, 64), (1088, 130), (64, 1030)]
)
def test_threads_share_the_rows_of_few_columns(length, columns):
    """Vectors of columns that are not full, more groups than are loaded at once, and rows enough
    for a thread to take several parts of them together."""
    x = jnp.asarray(normal(600, length))
    for name in ("int8-g32", "int8-asym", "int4", "int4-asym-g32", "nf4-g64"):
        q = weight(WEIGHTS[name], (length, columns)).reorder((-1, -2))
        assert_product(jax.jit(forced)(x, q), "mk,kn->mn", x, q, tolerance=2e-6)


@needs_native
def test_inputs_of_either_kind_are_quantized_first():
    x = jnp.asarray(normal(2, 3, K))
    of_groups, uneven = ArrayConfig(group_size=64), ArrayConfig(symmetric=False)
    kinds = [(ArrayConfig(), "int4-g128"), (uneven, "int4-g128"), (uneven, "int8")]
    for config, name in (*kinds, (of_groups, "int8")):
        q = with_inputs(stored(name), Inputs(config))
        assert_product(run(x, q), "abk,kn->abn", quantize(x, config, -1), q)


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize("zero", [7.5, 3.3])
@pytest.mark.parametrize("inputs", [None, ArrayConfig()], ids=["float rows", "int8 rows"])
def test_fractions_of_zero_points_are_kept(inputs, zero):
    q = weight(ArrayConfig(format=INT4, group_size=64, symmetric=False), (K, N)).reorder((-1, -2))
    q = dataclasses.replace(q, zero_point=jnp.full_like(q.scale, zero))
    x = jnp.asarray(normal(6, K))
    x = x if inputs is None else quantize(x, inputs, axis=1)
    got = jax.jit(partial(matmul, implementation="native"))(x, q)
    assert_product(got, "mk,kn->mn", x, q)


def by_xla(rows, q, dtype=None):
    """The product of codes by XLA."""
    product = partial(matmul, implementation="integer", preferred_element_type=dtype)
    return jax.jit(product)(rows, q)


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize(
    "config, dtype, rows",
    [
        (ArrayConfig(), "float32", 1),
        (ArrayConfig(), "bfloat16", 20),
        (ArrayConfig(), "float16", 3),
        (ArrayConfig(per_tensor=True), "float32", 20),
        (ArrayConfig(symmetric=False), "float32", 4),
        (ArrayConfig(value_range=(-100, 90)), "bfloat16", 5),
    ],
    ids=["row", "bfloat16", "float16", "tensor", "asymmetric", "bounds"],
)
def test_products_of_int8_codes_have_the_bits_of_xla(config, dtype, rows):
    q, x = stored("int8").astype(dtype), jnp.asarray(normal(rows, K), dtype)
    found = jax.jit(matmul)(x, with_inputs(q, Inputs(config)))
    rows = quantize(x, config, axis=-1)
    wanted = by_xla(rows, q)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)
    found = run(rows, q, preferred_element_type=jnp.bfloat16)
    np.testing.assert_array_equal(found, by_xla(rows, q, jnp.bfloat16))


@needs_native
def test_scales_that_several_rows_share_are_spread():
    q, x = stored("int8"), jnp.asarray(normal(3, 4, K))
    for case in (Case(ArrayConfig(group_size=(2, K)), (1, 2)), Case(ArrayConfig(), (0, 2))):
        met = quantized(x, *case)
        np.testing.assert_array_equal(run(met, q), by_xla(met, q))
        four = stored("int4-g128")
        assert_product(run(met, four), "abk,kn->abn", met, four)


@needs_native
@pytest.mark.parametrize("name", ["int8", "int4-g128"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_with_quantized_inputs_is_two_calls_and_nothing_else(name, dtype):
    q, x = stored(name).astype(dtype), jnp.asarray(normal(1, K), dtype)
    text = jax.jit(matmul).lower(x, with_inputs(q, Inputs(W8A8.inputs))).compile().as_text()
    assert text is not None
    assert text.count("custom_call_target=") == 2
    assert " fusion(" not in text
    assert "jaxquant_quantize_rows" in text


def calls(function, *arguments):
    return jax.jit(function).lower(*arguments).as_text().count("@jaxquant_quantize_rows")


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize(
    "case, dtype",
    [
        (Case(ArrayConfig(per_tensor=True)), "float32"),
        (Case(ArrayConfig(), 0), "float32"),
        (Case(ArrayConfig(symmetric=False), -1), "float32"),
        (Case(ArrayConfig(group_size=64), -1), "float32"),
        (Case(ArrayConfig(scale_dtype="bfloat16"), -1), "float32"),
        (Case(ArrayConfig(range=Percentile(99)), -1), "float32"),
        (Case(ArrayConfig(format=INT4), -1), "float32"),
        (Case(ArrayConfig(), -1), "float16"),
    ],
    ids=str,
)
def test_other_rows_are_quantized_by_xla(case, dtype):
    x = jnp.asarray(normal(7, K), dtype)
    plain = ArrayConfig(range=AbsMax())
    assert calls(lambda x: quantize_inputs(x, plain, -1).codes, x) == (dtype != "float16")
    assert calls(lambda x: quantize_inputs(x, *case).codes, x) == 0


def test_one_number_is_quantized_as_core_does():
    x, config = jnp.float32(3), ArrayConfig(per_tensor=True)
    got = quantize_inputs(x, config, -1)
    jax.tree.map(np.testing.assert_array_equal, got, quantize(x, config))


@needs_native
def test_rows_on_several_devices_are_quantized_where_they_lie():
    x, config = jnp.asarray(normal(8, K)), ArrayConfig()
    wanted = quantize(x, config, -1)

    def run(x):
        return quantize_inputs(x, config, -1)

    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("a",), axis_types=(kind,))
        parts = jax.device_put(x, jax.NamedSharding(mesh, jax.P("a")))
        assert calls(run, parts) == (kind == jax.sharding.AxisType.Explicit)
        found = jax.jit(run)(parts)
        assert found.codes.sharding.spec[0] == found.scale.sharding.spec[0] == "a"
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    columns = jax.device_put(x, jax.NamedSharding(mesh, jax.P(None, "a")))
    assert calls(run, columns) == 0
    jax.tree.map(np.testing.assert_array_equal, jax.jit(run)(columns), wanted)
    part = jax.shard_map(run, mesh=mesh, in_specs=jax.P("a"), out_specs=jax.P("a"))
    assert calls(part, parts) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.jit(part)(parts), wanted)


@needs_native
def test_gradients_pass_straight_through_quantized_rows():
    q, x = with_inputs(stored("int8"), Inputs(W8A8.inputs)), jnp.asarray(normal(3, K))
    found = jax.jit(jax.grad(lambda x: (matmul(x, q) ** 2).sum()))(x)
    wanted = 2 * np.asarray(jax.jit(matmul)(x, q)) @ np.asarray(q.dequantize()).T
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-2)


@needs_native
def test_results_have_the_axes_and_the_dtype_that_are_asked_for():
    q, x = stored("int8"), jnp.asarray(normal(5, K), jnp.bfloat16)
    x8 = quantized(x, ArrayConfig(), axis=-1)
    got = einsum("mk,kn->nm", x8, q, implementation="native", preferred_element_type=jnp.bfloat16)
    assert (got.shape, got.dtype) == ((N, 5), jnp.bfloat16)
    assert_product(got, "mk,kn->nm", x8, q, tolerance=2.0**-8)
    with jax.enable_x64(True):
        wide = run(x8, q, preferred_element_type=jnp.float64)
        assert wide.dtype == jnp.float64
        assert_product(wide, "mk,kn->mn", x8, q)


@needs_native
def test_gradients_and_vmap_are_those_of_the_other_implementations():
    q, x = stored("int4-asym-g32"), jnp.asarray(normal(4, K))
    plain = partial(matmul, implementation="dequantize")
    gradients = [jax.jit(jax.grad(lambda x, f=f: (f(x, q) ** 2).sum())) for f in (forced, plain)]
    np.testing.assert_allclose(gradients[0](x), gradients[1](x), rtol=1e-4, atol=1e-2)
    weights = q, stored("int4-asym-g32", seed=2)
    both = jax.tree.map(lambda *leaves: np.stack(leaves), *weights)
    found = jax.jit(jax.vmap(forced))(np.stack([x, 2 * np.asarray(x)]), both)
    for i, one in enumerate(weights):
        np.testing.assert_allclose(
            found[i], run((i + 1) * np.asarray(x), one), rtol=1e-5, atol=1e-4
        )


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize("shape", [(K,), (0, K), (2, 0, K), (2, 3, K)], ids=str)
@pytest.mark.parametrize("name", ["int8", "int4-g128"])
def test_any_number_of_axes_and_of_rows(name, shape):
    q, x = stored(name), jnp.asarray(normal(*shape))
    letters = "abm"[3 - len(shape) + 1 :]
    for inputs in (x, quantized(x, ArrayConfig(), axis=-1)):
        assert_product(run(inputs, q), f"{letters}k,kn->{letters}n", inputs, q)


@needs_native
@pytest.mark.parametrize("format", [INT8, FP8_E4M3], ids=str)
def test_inputs_may_be_stored_in_another_order(format):
    q = stored("int4-g128")
    x = quantized(jnp.asarray(normal(K, 3, 5)), ArrayConfig(format=format))
    x = x.reorder((-2, -1, -3))
    found = dot_general(x, q, (((0,), (0,)), ((), ())), implementation="native")
    assert_product(found, "kab,kn->abn", x, q)


@needs_native
def test_scans_and_rematerialization_keep_the_native_kernels():
    q, x = stored("int4-g128"), jnp.asarray(normal(2, K))
    weights = q, stored("int4-g128", seed=2)
    layers = jax.tree.map(lambda *leaves: np.stack(leaves), *weights)

    def product(x, layers):
        return jax.lax.scan(lambda x, layer: (x, run(x, layer)), x, layers)[1]

    assert "jaxquant_dot" in jax.jit(product).lower(x, layers).as_text()
    wanted = np.stack([run(x, one) for one in weights])
    np.testing.assert_array_equal(jax.jit(product)(x, layers), wanted)
    plain = jax.jit(jax.grad(lambda x: (run(x, q) ** 2).sum()))
    again = jax.jit(jax.grad(jax.checkpoint(lambda x: (run(x, q) ** 2).sum())))
    np.testing.assert_allclose(again(x), plain(x), rtol=1e-5)


@needs_native
def test_eager_operations_use_the_native_kernels():
    q, x = stored("int4-g128"), jnp.asarray(normal(2, K))
    with jax.disable_jit():
        eager = forced(x, q)
    np.testing.assert_array_equal(eager, run(x, q))


@needs_native
def test_exported_programs_do_without():
    q, x = stored("int4-g128"), jnp.asarray(normal(2, K))
    assert "jaxquant_dot" in jax.jit(matmul).lower(x, q).as_text()
    assert W8A8.inputs is not None
    q = with_inputs(q, Inputs(W8A8.inputs))
    assert calls(matmul, x, q) == 1
    exported = jax.export.export(jax.jit(matmul))(x, q)
    assert "jaxquant_" not in exported.mlir_module()
    read = jax.export.deserialize(exported.serialize())
    assert_product(read.call(x, q), "mk,kn->mn", quantize(x, W8A8.inputs, -1), q)


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("name", ["int8", "int4-g128"])
def test_columns_and_rows_may_lie_on_several_devices(name):
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    q, x = stored(name, (K, 2 * 701)), jnp.asarray(normal(8, K))
    place = partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("b")))
    assert_product(jax.jit(matmul)(x, jax.tree.map(place, q)), "mk,kn->mn", x, q)

    specs = jax.tree.map(lambda _: jax.P("b"), q)
    for rows in (jax.P(), jax.P("a")):
        part = jax.shard_map(
            matmul, mesh=mesh, in_specs=(rows, specs), out_specs=jax.P(*rows or (None,), "b")
        )
        assert "jaxquant_dot" in jax.jit(part).lower(x, q).as_text()
        assert_product(jax.jit(part)(x, q), "mk,kn->mn", x, q)


UNSUPPORTED = {
    "fewer than 32768 weights": lambda: (normal(2, 64), stored("int8", (64, 501))),
    "not stored as a matrix whose last axis": lambda: (
        normal(2, K),
        weight(WEIGHTS["int8"], (K, N)),
    ),
    "groups of 12 along 384 elements": lambda: (
        normal(2, K),
        weight(ArrayConfig(format=INT4, group_size=12), (K, N)).reorder((-1, -2)),
    ),
    "fp8_e4m3 codes are not integers within int8": lambda: (
        normal(2, K),
        weight(ArrayConfig(format=FP8_E4M3), (K, N)).reorder((-1, -2)),
    ),
    "int2 weights have codes of neither 4 nor 8 bits": lambda: (
        normal(2, K),
        weight(ArrayConfig(format=INT2), (K, N)).reorder((-1, -2)),
    ),
    "the right operand is not quantized": lambda: (stored("int8", (N, K)), normal(N, K)),
}


@needs_native
@pytest.mark.parametrize(
    "shape, least, most, reason",
    [
        ((1024, 127), 128, 64, "fewer than 128 columns for more than 64 float rows"),
        ((256, 255), 256, 8, "fewer than 65536 weights for more than 8 float rows"),
    ],
)
def test_more_float_rows_by_few_columns_or_weights_are_left_to_xla(
    monkeypatch, shape, least, most, reason
):
    for name, limit in LIMITS.items():
        monkeypatch.setattr(cpu_native, name, limit)
    config, x = ArrayConfig(format=INT4, group_size=32), normal(most + 1, shape[0])
    q = weight(config, shape).reorder((-1, -2))
    assert forced(x[:-1], q).shape == (most, shape[1])
    with pytest.raises(ValueError, match=reason):
        forced(x, q)
    enough = weight(config, (shape[0], least)).reorder((-1, -2))
    assert forced(x, enough).shape == (most + 1, least)


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_unsupported_native_raises_with_the_reason(reason):
    x, w = UNSUPPORTED[reason]()
    equation = "mk,kn->mn" if x.shape[1] == w.shape[0] else "km,kn->mn"
    with pytest.raises(ValueError, match=f"implementation='native' cannot run .*{reason}"):
        einsum(equation, x, w, implementation="native")


@needs_native
@pytest.mark.parametrize(
    "name, inputs, most", [("int8", "int8", 8), ("int8", "float", 8), ("int4", "int8", 32)]
)
def test_other_instructions_leave_many_rows_to_xla(monkeypatch, name, inputs, most):
    monkeypatch.setattr(cpu, "instruction_sets", lambda: ("AVX2",))
    monkeypatch.setattr(cpu_native, "_MOST_ROWS", {"AVX2": cpu_native._FEW_ROWS})
    config, q = INPUTS[inputs], stored(name, (K, 704))
    many, few = (jnp.asarray(normal(rows, K)) for rows in (most + 1, most))
    if config is not None:
        many, few = quantized(many, config, -1), quantized(few, config, -1)
    kind = "float" if config is None else "int8"
    reason = f"more than {most} {kind} rows by {q.format.bits}-bit weights, with AVX2"
    with pytest.raises(ValueError, match=reason):
        forced(many, q)
    assert_product(forced(few, q), "mk,kn->mn", few, q)


def test_without_native_kernels_native_raises_and_xla_computes(monkeypatch):
    monkeypatch.setattr(cpu, "unavailable", lambda: "there is no compiler")
    q, x = stored("nf4-g64", (K, 702)), normal(3, K)
    with pytest.raises(ValueError, match="there is no compiler"):
        forced(x, q)
    assert_product(matmul(x, q), "mk,kn->mn", x, q)
