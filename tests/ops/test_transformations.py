"""Products inside JAX's transformations: loops, batches, devices, export."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxquant import (
    FP8_E4M3,
    INT4,
    NF4,
    NVFP4,
    ArrayConfig,
    Inputs,
    conv_general_dilated,
    einsum,
    matmul,
    quantize,
    take,
)

from .products import (
    WEIGHTS,
    K,
    M,
    assert_product,
    normal,
    quantized,
    values,
    weight,
    with_inputs,
)

LAYERS, WIDTH = 3, 32
STACKS = {
    "int8, inputs": (ArrayConfig(), (-1, -2), Inputs(ArrayConfig())),
    "int4-g16": (ArrayConfig(format=INT4, group_size=16, symmetric=False), (-1, -2), None),
    "nvfp4, inputs": (ArrayConfig(format=NVFP4), None, Inputs(ArrayConfig(format=NVFP4))),
    "multiplier": (ArrayConfig(), None, Inputs(multiplier=jnp.linspace(0.5, 1.5, WIDTH))),
}


def stack_of_layers(name):
    config, order, inputs = STACKS[name]
    weights = normal(LAYERS, WIDTH, WIDTH, center=0) / WIDTH
    layers = [with_inputs(quantized(w, config).reorder(order), inputs) for w in weights]
    return layers, jax.tree.map(lambda *a: np.stack(a), *layers)


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", STACKS)
def test_a_scan_over_stacked_layers_equals_the_loop(name):
    layers, stack = stack_of_layers(name)
    x = jnp.asarray(normal(M, WIDTH))

    def layer(h, q):
        return jnp.tanh(matmul(h, q)), None

    def in_a_scan(x):
        return jax.lax.scan(layer, x, stack)[0]

    def in_a_checkpointed_scan(x):
        return jax.lax.scan(jax.checkpoint(layer), x, stack)[0]

    def in_a_loop(x):
        for q in layers:
            x = layer(x, q)[0]
        return x

    def with_gradient(f):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.square(f(x))))

    @jax.jit
    def all_of_them(x):
        return [with_gradient(f)(x) for f in (in_a_loop, in_a_scan, in_a_checkpointed_scan)]

    (want, want_gradient), *others = all_of_them(x)
    for got, gradient in others:
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["int8, inputs", "int4-g16"])
def test_vmap_over_weights_activations_or_both_equals_the_loop(name):
    layers, stack = stack_of_layers(name)
    x, product = normal(LAYERS, M, WIDTH), jax.jit(matmul)
    for axes in ((None, 0), (0, None), (0, 0)):
        a, b = (x if axes[0] == 0 else x[0]), (stack if axes[1] == 0 else layers[0])
        got = jax.jit(jax.vmap(matmul, in_axes=axes))(a, b)
        want = [
            product(x[i if axes[0] == 0 else 0], layers[i if axes[1] == 0 else 0])
            for i in range(LAYERS)
        ]
        np.testing.assert_allclose(got, np.stack(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [512, 24])
def test_vmap_over_one_row_at_a_time_equals_the_product(columns):
    q = weight(ArrayConfig(format=INT4, group_size=32), (K, columns)).reorder((-1, -2))
    x = jnp.asarray(normal(M, K))
    got = jax.jit(jax.vmap(lambda row: matmul(row, q)))(x)
    assert_product(got, "mk,kn->mn", x, q)


def mesh(*shape, explicit=False):
    axis_type = AxisType.Explicit if explicit else AxisType.Auto
    return jax.make_mesh(shape, ("a", "b")[: len(shape)], axis_types=(axis_type,) * len(shape))


def spec_of(leaf, partition):
    """The partition of the codes, on those axes that a scale has in full."""
    whole = zip(leaf.shape, (*partition, *[None] * leaf.ndim), strict=False)
    return P(*[name if length > 1 else None for length, name in whole])


def specs(q, partition):
    return jax.tree.map(lambda leaf: spec_of(leaf, partition), q)


# Name: (of x, of the weight's (K, N), of the result, axes to sum over).
SHARDINGS = {
    "columns": (P(), (None, ("a", "b")), P(None, ("a", "b")), ()),
    "rows": (P(("a", "b")), (None, None), P(("a", "b")), ()),
    "both": (P("a"), (None, "b"), P("a", "b"), ()),
    "contracted": (P(None, ("a", "b")), (("a", "b"), None), P(), ("a", "b")),
}
SHARDED = {
    "int8": (ArrayConfig(), ArrayConfig()),
    "int4-g4": (ArrayConfig(format=INT4, group_size=4, symmetric=False), None),
    "fp8": (ArrayConfig(format=FP8_E4M3), ArrayConfig(format=FP8_E4M3)),
}


PLACED = [("int8", "columns"), ("int8", "contracted"), ("int4-g4", "rows"), ("int4-g4", "both")]
PLACED += [("int4-g4", "contracted"), ("fp8", "both")]


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name, sharding", PLACED)
def test_products_of_parts_on_eight_devices_match_numpy(name, sharding):
    of_x, of_weight, of_result, summed = SHARDINGS[sharding]
    weights, inputs = SHARDED[name]
    q, x = weight(weights), jnp.asarray(normal(8, K))
    x = x if inputs is None else quantized(x, inputs, axis=1)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh(4, 2),
        in_specs=(specs(x, of_x), specs(q, of_weight)),
        out_specs=of_result,
    )
    def product(x, q):
        out = matmul(x, q)
        return jax.lax.psum(out, summed) if summed else out

    assert_product(product(x, q), "mk,kn->mn", x, q)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name, sharding", PLACED)
def test_the_compiler_divides_products_of_sharded_arrays(name, sharding):
    of_x, of_weight, _, _ = SHARDINGS[sharding]
    weights, inputs = SHARDED[name]
    q, x = weight(weights), jnp.asarray(normal(8, K))
    q = with_inputs(q, None if inputs is None else Inputs(inputs))
    devices = mesh(4, 2)

    def place(tree, partition):
        return jax.tree.map(
            lambda leaf: jax.device_put(leaf, NamedSharding(devices, spec_of(leaf, partition))),
            tree,
        )

    met = x if inputs is None else quantized(x, inputs, axis=1)
    got = jax.jit(matmul)(place(x, of_x), place(q, of_weight))
    assert_product(got, "mk,kn->mn", met, q)


# What XLA's blocks on CPU would cut: wide and stored by columns.
EXPLICIT = {
    "int8": (ArrayConfig(), (-1, -2), "integer"),
    "int8-asym": (ArrayConfig(symmetric=False), None, "integer"),
    "int4-g32": (ArrayConfig(format=INT4, group_size=32), (-1, -2), None),
    "nf4": (ArrayConfig(format=NF4), None, "dequantize"),
}


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", EXPLICIT)
def test_the_result_lies_where_out_sharding_says(name):
    config, order, implementation = EXPLICIT[name]
    with jax.set_mesh(mesh(4, 2, explicit=True)):
        x = jax.device_put(normal(8, K), P("b"))
        x = quantize(x, ArrayConfig(symmetric=False), axis=1)
        q = weight(config, (K, 512)).reorder(order)

        @jax.jit
        def products(x, q):
            run = partial(einsum, implementation=implementation)
            return (
                run("mk,kn->mn", x, q, out_sharding=P("b", "a")),
                run("mk,kn->nm", x, q, out_sharding=P("a", "b")),
                run("kn,mk->nm", q, x, out_sharding=P(None, "b")),
                matmul(x, q, out_sharding=P("b"), implementation=implementation),
            )

        results = products(x, q)
        wanted = [P("b", "a"), P("a", "b"), P(None, "b"), P("b", None)]
        assert [jax.typeof(out).sharding.spec for out in results] == wanted
        for out, labels in zip(results, ("mn", "nm", "nm", "mn"), strict=True):
            assert_product(out, f"mk,kn->{labels}", x, q)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("output", ["nbm", "mnb"])
@pytest.mark.parametrize("implementation", ["integer", "dequantize"])
def test_out_sharding_names_the_axes_of_the_result_however_they_are_turned(output, implementation):
    with jax.set_mesh(mesh(4, 2, explicit=True)):
        x = quantize(normal(4, 8, K), ArrayConfig(), axis=2)
        q = weight(ArrayConfig()).reorder((-1, -2))
        equation = f"bmk,kn->{output}"
        partition = {"b": None, "m": "b", "n": "a"}
        wanted = P(*[partition[label] for label in output])
        run = partial(einsum, equation, out_sharding=wanted, implementation=implementation)
        out = jax.jit(run)(x, q)
        assert jax.typeof(out).sharding.spec == wanted
        assert_product(out, equation, x, q)


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_sum_over_sharded_axes_lies_where_out_sharding_says(name):
    config, _, implementation = EXPLICIT[name]
    devices = mesh(4, 2, explicit=True)
    with jax.set_mesh(devices):
        x = quantize(jax.device_put(normal(8, K), P("b", "a")), ArrayConfig(), axis=1)
        q = weight(config)
        q = jax.tree.map(lambda leaf: jax.device_put(leaf, spec_of(leaf, ("a", None))), q)
        specs = (P("b"), P(None, None), P(None, "b"))
        specs = [given for spec in specs for given in (spec, NamedSharding(devices, spec))]
        run = partial(matmul, implementation=implementation)
        outs = jax.jit(lambda x, q: [run(x, q, out_sharding=given) for given in specs])(x, q)
        for out, given in zip(outs, specs, strict=True):
            spec = given.spec if isinstance(given, NamedSharding) else given
            assert jax.typeof(out).sharding.spec == P(*spec, *[None] * (2 - len(spec)))
            assert_product(out, "mk,kn->mn", x, q)
        with pytest.raises(Exception, match="ambiguous how the output should be sharded"):
            matmul(x, q, implementation=implementation)


def test_what_is_no_sharding_is_an_error():
    with pytest.raises(
        ValueError, match=r"must be a NamedSharding, .* or None; got 'a'. Use jax.P"
    ):
        matmul(jnp.ones((2, K)), weight(ArrayConfig()), out_sharding="a")  # pyright: ignore[reportArgumentType]


def test_wide_weights_in_parts_need_no_out_sharding():
    q = weight(ArrayConfig(format=INT4), (K, 512)).reorder((-1, -2))
    with jax.set_mesh(mesh(4, 2, explicit=True)):
        parts = jax.tree.map(lambda leaf: jax.device_put(leaf, spec_of(leaf, ("a",))), q)
        x = jnp.asarray(normal(M, K))
        out = jax.jit(matmul)(x, parts)
        assert jax.typeof(out).sharding.spec == P(None, "a")
        assert_product(out, "mk,kn->mn", x, q)
        with pytest.raises(ValueError, match="blocks cannot be cut from sharded arrays"):
            matmul(x, parts, implementation="blocks")
        with pytest.raises(ValueError, match="blocks cannot be cut from sharded arrays"):
            matmul(x, q, implementation="blocks", out_sharding=P())


def test_convolutions_keep_the_sharding_of_their_images():
    dims = ("NHWC", "HWIO", "NHWC")
    q = quantized(normal(3, 3, 4, 6), ArrayConfig(), axis=(0, 1, 2))
    with jax.set_mesh(mesh(4, 2, explicit=True)):
        image = jax.device_put(normal(8, 5, 6, 4), P("a"))
        images = quantize(image, ArrayConfig(), axis=(1, 2, 3))
        conv = partial(
            conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=dims
        )

        @jax.jit
        def both(x, q):
            return conv(x, q), conv(x, q, out_sharding=P("a"))

        for x in (image, images):
            for out in both(x, q):
                assert jax.typeof(out).sharding.spec[0] == "a"
        assert jax.typeof(conv(image, q, out_sharding=P("a"))).sharding.spec[0] == "a"


def parameters():
    orders = {"attention": (-2, -1, -3), "up": (-1, -2)}
    params = {
        "embedding": quantized(normal(40, K), ArrayConfig(format=INT4), axis=1),
        "attention": quantized(normal(K, 4, 6, center=0), ArrayConfig()),
        "up": quantized(
            normal(24, 512, center=0), ArrayConfig(format=INT4, group_size=8, symmetric=False)
        ),
        "down": with_inputs(
            quantized(normal(512, 8, center=0), ArrayConfig(format=NVFP4)),
            Inputs(ArrayConfig(format=FP8_E4M3), multiplier=jnp.linspace(0.5, 2, 512)),
        ),
        "bias": jnp.linspace(-1, 1, 8),
    }
    return {k: v.reorder(orders[k]) if k in orders else v for k, v in params.items()}


def model(params, tokens):
    attention = with_inputs(params["attention"], Inputs(ArrayConfig()))
    h = take(params["embedding"], tokens, 0)
    h = einsum("td,dhk->thk", h, attention).reshape(len(tokens), 24)
    h = jnp.tanh(matmul(h, params["up"]))
    return matmul(h, params["down"]) + params["bias"].reshape(1, 8)


def test_an_exported_model_gives_the_same_numbers_after_it_was_read_again():
    params, tokens = parameters(), jnp.arange(7)
    shapes = jax.eval_shape(lambda: (params, tokens))

    exported = jax.export.export(jax.jit(model), platforms=("cpu", "tpu"))(*shapes)
    read = jax.export.deserialize(exported.serialize())

    np.testing.assert_array_equal(read.call(params, tokens), jax.jit(model)(params, tokens))


def test_float_and_quantized_runs_of_one_function_never_change_each_other():
    params, tokens = parameters(), jnp.arange(7)
    is_quantized = partial(jax.tree.map, is_leaf=lambda x: hasattr(x, "codes"))
    plain = is_quantized(lambda x: x.dequantize() if hasattr(x, "codes") else x, params)

    traces = []

    def last(params, x):
        traces.append(params)
        return matmul(x, params["down"])

    jitted = jax.jit(last)

    x = jnp.asarray(normal(M, 512))
    want_float = np.asarray(x) @ np.asarray(plain["down"])
    factors = np.linspace(0.5, 2, 512, dtype=np.float32)
    met = quantize(x * factors.reshape(1, -1), ArrayConfig(format=FP8_E4M3), axis=1)
    for run in (jitted, jitted, last, jitted):
        np.testing.assert_allclose(run(plain, x), want_float, rtol=1e-4, atol=1e-3)
        assert_product(run(params, x), "mk,kn->mn", met, params["down"])
    assert len(traces) == 2 + 2, "jitted once for each, and run eagerly once for each"
    assert jax.eval_shape(model, params, tokens).shape == (7, 8)


def test_equal_weights_in_all_that_is_static_share_one_compilation():
    traces = []

    @jax.jit
    def product(x, q):
        traces.append(q)
        return matmul(x, q)

    x = jnp.asarray(normal(M, K))
    for seed in range(3):
        inputs = Inputs(ArrayConfig())
        product(x, with_inputs(weight(ArrayConfig(), seed=seed), inputs))
    assert len(traces) == 1
    product(x, weight(ArrayConfig()))
    assert len(traces) == 2


def test_products_leave_their_operands_unchanged():
    q = with_inputs(weight(WEIGHTS["int4-asym-g32"]), Inputs(ArrayConfig()))
    before = jax.tree.map(np.array, q)
    matmul(normal(M, K), q)
    jax.tree.map(np.testing.assert_array_equal, q, before)


def test_shapes_are_inferred_without_computing():
    q = with_inputs(weight(WEIGHTS["nf4"]).reorder((-1, -2)), Inputs(ArrayConfig()))
    abstract = jax.eval_shape(lambda: q)
    out = jax.eval_shape(matmul, jax.ShapeDtypeStruct((M, K), jnp.float32), abstract)
    assert (out.shape, out.dtype) == ((M, 24), jnp.float32)
    assert dataclasses.replace(q, inputs=None).shape == values(q).shape
