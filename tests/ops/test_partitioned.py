"""Programs that XLA partitions among devices: plain `jit` with arrays sharded over a mesh."""

import dataclasses
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import (
    INT4,
    SCHEMES,
    ArrayConfig,
    Format,
    Rule,
    conv_general_dilated,
    einsum,
    explain,
    matmul,
    quantize,
    refine_blocks,
    specs,
    tree,
)
from jaxquant.kernels import cpu

from .products import normal

needs_native = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
ROWS, K, N = 3, 256, 1024
DEVICES = 8


def mesh(*lengths, kind=jax.sharding.AxisType.Auto):
    kinds = (kind,) * len(lengths)
    return jax.make_mesh(lengths, ("a", "b")[: len(lengths)], axis_types=kinds)


def placed(q, spec, on):
    """q on the devices of a mesh, as `specs` divides it."""
    return jax.device_put(q, jax.tree.map(lambda s: jax.NamedSharding(on, s), specs(q, spec, on)))


def text_of(function, *args):
    text = function.lower(*args).compile().as_text()
    assert text is not None
    return text


def implementations(x, q, function=matmul):
    return [row.implementation for row in explain(function, x, q)]


def collectives(text):
    """(name, number of elements) of each collective."""
    found = re.findall(r"\[([\d,]*)\]\S* (all-\w+|reduce-scatter|collective-\w+)\(", text)
    return [(name, math.prod(map(int, shape.split(",")))) for shape, name in found]


def sharded(q, axis):
    """The array with one logical axis of its codes, scales and zero points split over devices."""
    (stored,) = q.stored_axes([axis])

    def place(x):
        spec = [None] * x.ndim
        if x.ndim > stored and x.shape[stored] % DEVICES == 0:
            spec[stored] = "a"
        return jax.device_put(x, jax.NamedSharding(mesh(DEVICES), jax.P(*spec)))

    return jax.tree.map(place, q)


def weight_of(scheme, k=K, n=N, seed=0):
    w = {"w": normal(k, n, seed=seed)}
    return tree.quantize(w, [Rule("w", SCHEMES[scheme])], platform="cpu")["w"]


# The weights of these lie as those of others do: codes with scales per column or per group.
ALIKE = ("W8A16", "W4A16", "FP8", "NF4A16", "MXFP8A8", "MXFP4A16")


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name not in ALIKE])
def test_sharded_weights_stay_where_they_are(scheme):
    q, x = weight_of(scheme), jnp.asarray(normal(ROWS, K))
    parts = [sharded(q, axis) for axis in (0, 1)]
    run = jax.jit(lambda x, parts: [matmul(x, q) for q in parts])

    text = text_of(run, x, parts)

    assert ("jaxquant_dot" in text) == ("jaxquant_dot" in text_of(jax.jit(matmul), x, q))
    # The activations may be gathered, codes and scales may not.
    gathered = [size for name, size in collectives(text) if name == "all-gather"]
    assert max(gathered, default=0) <= x.size
    wanted = matmul(x, q, implementation="dequantize")
    for out in run(x, parts):
        np.testing.assert_allclose(out, wanted, rtol=2e-3, atol=2e-2)


PRODUCTS = {"columns": jax.P(None, "a"), "rows": jax.P("a", None), "both": jax.P("a", "b")}
COLLECTIVES = {"columns": [], "rows": ["all-reduce"], "both": ["all-reduce"]}


@pytest.mark.some_rows(1)
@needs_native
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16", "W4A8", "NVFP4A16"])
def test_each_device_multiplies_its_part_by_the_native_kernel(scheme, name):
    q, x = weight_of(scheme, 1024), jnp.asarray(normal(2, ROWS, 1024))
    on = mesh(4, 2) if name == "both" else mesh(DEVICES)
    parts = placed(q, PRODUCTS[name], on)

    text = text_of(jax.jit(matmul), x, parts)

    assert "jaxquant_dot" in text
    # Rows of quantized activations share the largest magnitude, too.
    found = [c for c, size in collectives(text) if size > 2 * ROWS]
    assert found == COLLECTIVES[name]
    assert implementations(x, parts) == ["native"]
    out = jax.jit(matmul)(x, parts)
    np.testing.assert_allclose(out, jax.jit(matmul)(x, q), rtol=1e-5, atol=1e-4)
    wanted = jax.NamedSharding(on, jax.P(None, None, PRODUCTS[name][1]))
    assert out.sharding.is_equivalent_to(wanted, 3)


def explicit(*lengths):
    return mesh(*lengths, kind=jax.sharding.AxisType.Explicit)


@pytest.mark.some_rows(1)
@needs_native
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16", "W4A16", "W4A8", "NVFP4A16"])
def test_each_device_multiplies_the_part_that_types_say_it_has(scheme, name):
    q, on = weight_of(scheme, 1024), explicit(4, 2)
    x = jax.device_put(normal(4, ROWS, 1024), jax.NamedSharding(on, jax.P("b")))
    parts = placed(q, PRODUCTS[name], on)
    is_summed = "all-reduce" in COLLECTIVES[name]
    wanted = jax.P("b", None, None) if is_summed else jax.P("b", None, "a")
    run = jax.jit(partial(matmul, out_sharding=wanted if is_summed else None))

    with jax.set_mesh(on):
        out, text = run(x, parts), text_of(run, x, parts)
        forced = matmul(x, parts, out_sharding=wanted, implementation="native")
        both = jax.vmap(run, in_axes=(1, None), out_axes=1)(x, parts)
        turned = einsum("bmk,kn->nbm", x, parts, out_sharding=jax.P(wanted[2], "b"))
        assert implementations(x, parts, run) == ["native"]
        if name == "rows":
            assert jax.typeof(jax.jit(matmul)(x, parts)).sharding.spec == wanted

    assert "jaxquant_dot" in text
    assert "all-reduce" not in text or is_summed or scheme == "W8A8"
    gathered = [size for name, size in collectives(text) if name == "all-gather"]
    assert max(gathered, default=0) <= x.size
    assert jax.typeof(out).sharding.spec == wanted
    whole = jax.jit(matmul)(np.asarray(x), q)
    assert jax.typeof(turned).sharding.spec == jax.P(wanted[2], "b", None)
    # Sums of float32 in another order differ by so many units of what is added.
    added = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(q.dequantize(), np.float64))
    for got in (out, forced, both, turned.transpose(1, 2, 0)):
        assert np.all(np.abs(got - whole) <= 4 * np.finfo(np.float32).eps * added)


@needs_native
def test_products_of_typed_parts_have_the_gradients_of_others():
    q, on = weight_of("W8A8"), explicit(4, 2)
    x, parts = jnp.asarray(normal(4, K)), placed(q, PRODUCTS["columns"], on)
    # Each device quantizes rows that all have, too.
    text = text_of(jax.jit(matmul), jax.device_put(x, jax.NamedSharding(on, jax.P())), parts)
    assert "jaxquant_quantize_rows" in text
    x = jax.device_put(x, jax.NamedSharding(on, jax.P("b")))

    def loss(x, q):
        return jnp.sum(jnp.square(matmul(x, q)))

    found = jax.jit(jax.grad(loss))(x, parts)

    assert jax.typeof(found).sharding.spec == jax.P("b", None)
    wanted = jax.jit(jax.grad(loss))(np.asarray(x), q)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-2)


def test_typed_parts_are_multiplied_by_the_pallas_kernel_on_tpus():
    on = explicit(4, 2)
    x = jax.device_put(normal(4, 1024), jax.NamedSharding(on, jax.P("b")))
    w = tree.quantize({"w": normal(1024, N)}, [Rule("w", SCHEMES["W4A16"])], platform="tpu")["w"]
    for spec, out in ((jax.P(None, "a"), None), (jax.P("a"), jax.P("b"))):
        with jax.set_mesh(on):
            run = jax.jit(partial(matmul, out_sharding=out, implementation="pallas"))
            traced = run.trace(x, placed(w, spec, on))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert f"tensor<2x{1024 // 4 if out else 1024}xf32>" in text
        assert "tpu_custom_call" in text


@needs_native
def test_kernels_leave_meshes_with_automatic_axes_to_xla():
    kinds = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto
    on = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    q, x = weight_of("W8A8"), jnp.asarray(normal(4, K))
    parts = placed(q, PRODUCTS["columns"], on)
    assert implementations(x, parts) == ["integer"]
    np.testing.assert_allclose(jax.jit(matmul)(x, parts), matmul(x, q), rtol=1e-5, atol=1e-4)


@pytest.mark.some_rows(1)
@needs_native
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_rows_of_activations_and_columns_are_divided_at_once(scheme):
    q, on = weight_of(scheme), mesh(4, 2)
    x = jax.device_put(normal(8, K), jax.NamedSharding(on, jax.P("a")))

    def transposed(x, q):
        return einsum("mk,kn->nm", x, q)

    parts = placed(q, jax.P(None, "b"), on)
    text = text_of(jax.jit(transposed), x, parts)
    assert "jaxquant_dot" in text
    assert collectives(text) == []
    out = jax.jit(transposed)(x, parts)
    assert out.sharding.spec == jax.P("b", "a")
    np.testing.assert_allclose(out, transposed(x, q), rtol=1e-5, atol=1e-4)
    # The weights stay; the activations move.
    parts = placed(q, jax.P(None, ("a", "b")), on)
    text = text_of(jax.jit(matmul), x, parts)
    assert "jaxquant_dot" in text
    assert {name for name, _ in collectives(text)} == {"all-gather"}
    assert max(size for _, size in collectives(text)) <= x.size
    np.testing.assert_allclose(jax.jit(matmul)(x, parts), matmul(x, q), rtol=1e-5, atol=1e-4)


# (equation, shape of the weights, how they are divided, collectives): kernels of attention.
QUERY, OUT = ("btd,dnh->btnh", (768, 8, 64)), ("btnh,nhd->btd", (8, 64, 768))
ATTENTION = [
    (*QUERY, jax.P(None, "a"), []),
    (*QUERY, jax.P(None, None, "a"), []),
    (*QUERY, jax.P("b", "a"), ["all-reduce"]),
    (*QUERY, jax.P("b", None, "a"), ["all-reduce"]),
    (*OUT, jax.P("a"), ["all-reduce"]),
    (*OUT, jax.P("b", "a"), ["all-reduce"]),
    (*OUT, jax.P("b", None, "a"), ["all-reduce"]),
    (*OUT, jax.P(None, None, ("a", "b")), []),
]


@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize("equation, shape, spec, wanted", ATTENTION, ids=str)
def test_parts_of_kernels_of_attention_stay_where_they_are(equation, shape, spec, wanted):
    is_out = equation == OUT[0]
    contracted = (0, 1) if is_out else (0,)
    x = jnp.asarray(normal(2, ROWS, *(shape[:2] if is_out else shape[:1])))
    for scheme in (SCHEMES["W8A8"], ArrayConfig(format=INT4, group_size=32, symmetric=False)):
        axis = contracted if scheme == SCHEMES["W8A8"] else contracted[-1]
        rule = Rule("w", scheme, axis=axis, contracted=contracted)
        q = tree.quantize({"w": normal(*shape, seed=1)}, [rule], platform="cpu")["w"]
        parts = placed(q, spec, mesh(4, 2))
        run = jax.jit(partial(einsum, equation))

        text = text_of(run, x, parts)

        assert "jaxquant_dot" in text
        # The largest magnitudes of rows and sums are shared; codes and scales are not.
        assert [c for c, size in collectives(text) if size > 8 * ROWS] == wanted
        assert implementations(x, parts, run) == ["native"]
        np.testing.assert_allclose(run(x, parts), run(x, q), rtol=1e-4, atol=1e-3)
        on = explicit(4, 2)
        with jax.set_mesh(on):
            run_in_types = jax.jit(partial(einsum, equation, out_sharding=jax.P()))
            out, typed = run(x, q), placed(q, spec, on)
            assert "jaxquant_dot" in text_of(run_in_types, x, typed)
            np.testing.assert_allclose(run_in_types(x, typed), out, rtol=1e-4, atol=1e-3)


@pytest.mark.some_rows(1)
@needs_native
@pytest.mark.parametrize("shape", [(3072, 512), (512, 3072)], ids=str)
def test_blocks_that_span_devices_are_cut(shape):
    # 12 groups along the axis that 8 devices share.
    sizes = (256, 1) if shape[0] > shape[1] else (512, 256)
    config = ArrayConfig(format=INT4, group_size=sizes, symmetric=False)
    q = quantize(normal(*shape), config, axis=(0, 1)).reorder((-1, -2))
    parts = placed(q, jax.P("a") if shape[0] > shape[1] else jax.P(None, "a"), mesh(DEVICES))
    x = jnp.asarray(normal(ROWS, shape[0]))
    text = text_of(jax.jit(matmul), x, parts)
    assert "jaxquant_dot" in text
    assert "all-gather" not in text
    wanted = matmul(x, q, implementation="dequantize")
    np.testing.assert_allclose(jax.jit(matmul)(x, parts), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@needs_native
@pytest.mark.parametrize(
    ("scheme", "k", "spec", "name"),
    [
        ("W8A16", 1024, jax.P(None, "a"), "native"),
        ("W4A16", 1152, jax.P(None, "a"), "native"),
        # 144 elements, in groups of 16 of the 128.
        ("W4A16", 1152, jax.P("a"), "native"),
        # Fewer than 32768 weights.
        ("W8A8", 128, jax.P(None, "a"), "integer"),
    ],
)
def test_the_row_names_what_runs_on_the_parts(scheme, k, spec, name):
    q, x = weight_of(scheme, k), jnp.asarray(normal(ROWS, k))
    parts = placed(q, spec, mesh(DEVICES))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, q)
    stacked = placed(stacked, jax.P(None, *spec), mesh(DEVICES))

    def loop(x, stack):
        return jax.lax.scan(lambda c, q: (c, matmul(x, q)), 0, stack)[1]

    for function, weights in ((matmul, parts), (jax.jit(matmul), parts), (loop, stacked)):
        (row,) = explain(function, x, weights, platform="cpu")
        assert row.implementation == name
        if name != "native":
            shape = (N // 8, k) if spec[0] is None else (N, k // 8)
            assert row.not_selected[0][0] == "native"
            assert row.not_selected[0][1].startswith(f"on parts of {shape}: ")
    assert ("jaxquant_dot" in text_of(jax.jit(matmul), x, parts)) == (name == "native")
    np.testing.assert_allclose(
        jax.jit(matmul)(x, parts), jax.jit(matmul)(x, q), rtol=1e-4, atol=1e-3
    )


@needs_native
def test_rows_are_named_without_cpu_devices(monkeypatch):
    """As with JAX_PLATFORMS=cuda."""

    def unknown(platform=None):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "device_count", unknown)
    assert implementations(jnp.asarray(normal(ROWS, K)), weight_of("W8A8")) == ["native"]


@needs_native
def test_programs_of_formats_with_the_same_arrays_differ():
    """JAX's cache of compiled programs does not know the functions of the parts."""
    q, x = weight_of("W4A16"), jnp.asarray(normal(ROWS, K))
    formats = [Format("other", "int4", -1, top, (-1, -0.5, 0, 0.5, top)) for top in (1, 2)]
    others = [dataclasses.replace(q, format=f) for f in formats]
    # Their scales are codes.
    scales = [dataclasses.replace(quantize(q.scale, ArrayConfig()), format=f) for f in formats]
    scales = [dataclasses.replace(x, codes=x.codes.astype(jnp.int4)) for x in scales]
    twice = [dataclasses.replace(q, scale=scale) for scale in scales]

    def text(q):
        text = jax.jit(matmul).lower(x, placed(q, jax.P(None, "a"), mesh(DEVICES))).as_text()
        return re.sub(r'backend_config = "\d+"', "", text)

    assert text(q) == text(q)
    texts = [*map(text, (q, *others, *twice))]
    assert len(set(texts)) == len(texts)


@needs_native
def test_parts_of_16_bits_are_added_in_float32():
    q, x = weight_of("W4A16", 1024).astype(jnp.bfloat16), jnp.asarray(normal(ROWS, 1024))
    x, parts = x.astype(jnp.bfloat16), placed(q, jax.P("a"), mesh(DEVICES))
    text = text_of(jax.jit(matmul), x, parts)
    assert "jaxquant_dot" in text
    assert re.findall(r"= (\w+)\[[\d,]*\]\S* all-reduce\(", text) == ["f32"]
    out = jax.jit(matmul)(x, parts)
    assert out.dtype == jnp.bfloat16
    wanted = jax.jit(matmul)(x, q)
    np.testing.assert_allclose(
        out.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2.0**-7, atol=1e-2
    )


@needs_native
def test_meshes_of_any_order_and_several_of_them_divide_programs():
    q, x = weight_of("W8A8"), jnp.asarray(normal(8, K))
    backwards = jax.sharding.Mesh(np.array(jax.devices()[::-1]).reshape(2, 4), ("a", "b"))
    other = jax.sharding.Mesh(np.array(jax.devices()[::-1]), ("c",))
    parts = placed(q, jax.P(None, "b"), backwards)
    rows = jax.device_put(x, jax.NamedSharding(other, jax.P("c")))
    run = jax.jit(lambda x, q, rows: (matmul(x, q), rows + 1))
    assert "jaxquant_dot" in text_of(run, x, parts, rows)
    out, more = run(x, parts, rows)
    np.testing.assert_array_equal(out, matmul(x, q))
    np.testing.assert_array_equal(more, x + 1)


@needs_native
def test_abstract_meshes_and_other_numbers_of_devices():
    x, kinds = jnp.asarray(normal(ROWS, K)), (jax.sharding.AxisType.Auto,)
    abstract = jax.sharding.AbstractMesh((DEVICES,), ("a",), axis_types=kinds)
    sharding = jax.NamedSharding(abstract, jax.P("a"))
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), weight_of("W8A8")
    )
    assert jax.jit(matmul).trace(x, shapes).lower(lowering_platforms=("cpu",)) is not None
    # 2 x 3 or 3 x 2: XLA computes.
    parts = placed(weight_of("W8A8", n=1536), jax.P(None, "a"), mesh(6))
    text = text_of(jax.jit(matmul), x, parts)
    assert "jaxquant_dot" not in text
    assert implementations(x, parts) == ["integer"]


@pytest.mark.slow
@needs_native
def test_gradients_loops_and_vmap_divide_alike():
    layers = [weight_of("W4A16", 512, 512, seed) for seed in range(2)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    x = jnp.asarray(normal(4, 512))
    parts = placed(stack, jax.P(None, None, "a"), mesh(DEVICES))

    def through(x, stack):
        return jax.lax.scan(lambda x, q: (matmul(x, q) / 20, None), x, stack)[0]

    assert "jaxquant_dot" in text_of(jax.jit(through), x, parts)
    np.testing.assert_allclose(jax.jit(through)(x, parts), through(x, stack), rtol=1e-4, atol=1e-4)
    part = placed(layers[0], jax.P("a"), mesh(4))
    slope = jax.jit(jax.grad(lambda x, q: (matmul(x, q) ** 2).sum()))
    assert "jaxquant_dot" in text_of(slope, x, part)
    np.testing.assert_allclose(slope(x, part), slope(x, layers[0]), rtol=1e-3, atol=1e-1)
    each = jax.jit(jax.vmap(matmul, (0, None)))
    wanted = jax.jit(matmul)(x, layers[0])
    np.testing.assert_allclose(each(x[:, None], part)[:, 0], wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("implementation", [None, "images"])
def test_sharded_kernels_of_convolutions_stay_where_they_are(axis, implementation):
    # (outputs, inputs, height, width): the axes are moved.
    rules = [Rule("k", SCHEMES["W8A8"], axis=(1, 2, 3))]
    q = tree.quantize({"k": normal(64, 32, 3, 3)}, rules, platform="cpu")["k"]
    x = jnp.asarray(normal(2, 32, 5, 5))

    def run(x, q, implementation=implementation):
        return conv_general_dilated(x, q, (1, 1), "SAME", implementation=implementation)

    compiled = jax.jit(run).lower(x, sharded(q, axis)).compile()

    text = compiled.as_text()
    assert text is not None
    assert "convolution" in text
    assert "all-gather" not in text
    wanted = run(x, q, "dequantize")
    np.testing.assert_allclose(compiled(x, sharded(q, axis)), wanted, rtol=2e-3, atol=2e-2)


@pytest.mark.some_rows(1)
@needs_native
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
@pytest.mark.parametrize("name", ["columns", "rows"])
def test_parts_of_weights_run_the_native_kernels_inside_shard_map(scheme, name):
    # 24 groups of 128 along the contracted axis, which 8 devices share.
    q = weight_of(scheme, 3072)
    x = jnp.asarray(normal(ROWS, q.shape[0]))
    spec, on = PRODUCTS[name], mesh(DEVICES)
    q = refine_blocks(q, spec, on)

    def product(x, q):
        out = matmul(x, q)
        return jax.lax.psum(out, "a") if name == "rows" else out

    part = jax.shard_map(
        product,
        mesh=on,
        in_specs=(jax.P(None, spec[0]), specs(q, spec, on)),
        out_specs=jax.P(None, spec[1]),
    )
    parts = placed(q, spec, on)
    text = text_of(jax.jit(part), x, parts)
    assert "jaxquant_dot" in text
    assert [c for c, _ in collectives(text)] == COLLECTIVES[name]
    assert implementations(x, parts, part) == ["native"]
    wanted = matmul(x, q, implementation="dequantize")
    # Each device quantizes its own channels of the activations.
    rtol, atol = (5e-2, 1.0) if scheme == "W8A8" else (1e-4, 1e-3)
    np.testing.assert_allclose(jax.jit(part)(x, parts), wanted, rtol=rtol, atol=atol)


@needs_native
@pytest.mark.parametrize("scheme", ["W8A8", "W4A16"])
def test_replicated_weights_keep_the_native_kernels_inside_shard_map(scheme):
    q, x = weight_of(scheme), jnp.asarray(normal(DEVICES, K))
    given = {"in_specs": (jax.P("a"), jax.P()), "out_specs": jax.P("a")}

    run = jax.jit(jax.shard_map(matmul, mesh=mesh(DEVICES), **given))

    assert "jaxquant_dot" in run.lower(x, q).as_text()
    one_device = jax.jit(matmul)
    assert "jaxquant_dot" in one_device.lower(x, q).as_text()
    np.testing.assert_allclose(run(x, q), one_device(x, q), rtol=1e-5, atol=1e-4)
