"""Products that are quantized forward and in both gradients."""

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant import (
    FP8_E4M3,
    FP8_E5M2,
    INT8,
    MXFP8,
    NF4,
    ArrayConfig,
    MinMSE,
    quantize,
    training,
)
from jaxquant.training import (
    FP8_TRAINING,
    INT8_TRAINING,
    SWITCHBACK,
    DelayedScaling,
    ProductConfig,
)

from .. import oracles
from . import products

KEY = jax.random.key(0)
FLOAT = ProductConfig()
INT8_NEAREST = dataclasses.replace(INT8_TRAINING, rounds_stochastically=False)
ASYMMETRIC = ArrayConfig(symmetric=False)
# Labels of lhs, rhs and out, and lengths that no two labels have in common.
PRODUCTS = {
    "matmul": ("mk", "kn", "mn"),
    "tokens": ("btk", "kn", "btn"),
    "stack": ("bxckd", "dnkby", "bxcny"),
}
LENGTHS = {"m": 6, "k": 10, "n": 4, "b": 2, "t": 8, "x": 3, "c": 5, "d": 7, "y": 9}


def normal(labels, seed, dtype="float32"):
    x = np.random.default_rng(seed).normal(size=[LENGTHS[a] for a in labels])
    # Lengths along an axis must matter, and so must signs.
    return (x * np.linspace(0.2, 3, x.shape[-1])).astype(np.float32).astype(jnp.dtype(dtype))


def dimension_numbers(lhs, rhs, out):
    shared = [a for a in lhs if a in rhs]
    batch, contract = [a for a in shared if a in out], [a for a in shared if a not in out]
    return tuple(
        (tuple(lhs.index(a) for a in which), tuple(rhs.index(a) for a in which))
        for which in (contract[::-1], batch)
    )


def pulled(config, labels, *operands, key=None, scaling=None, **options):
    """out, and the gradients of lhs and rhs, in one program."""
    return _pull(config, labels, tuple(options.items()))(*operands, key, scaling)


@cache
def _pull(config, labels, options):
    @jax.jit
    def run(lhs, rhs, gradient, key, scaling):
        product = partial(
            training.dot_general,
            dimension_numbers=dimension_numbers(*labels),
            config=config,
            key=key,
            scaling=scaling,
            **dict(options),
        )
        out, pull = jax.vjp(product, lhs, rhs)
        return out, *pull(gradient)

    return run


def rounded(x, config, shared):
    """What the codes of x stand for, with a scale along the axes `shared`."""
    x = np.asarray(x, np.float32)
    if config is None:
        return x.astype(np.float64)
    is_grouped = config.group_size or config.format.group_size
    axis = shared[-1] if is_grouped else tuple(shared)
    codes, scale, zero_point = oracles.quantize(x, config, axis, oracles.abs_max_range)
    return (codes - oracles.repeat_groups(zero_point, x.shape)) * oracles.repeat_groups(
        scale, x.shape
    )


def wanted(a, b, configs, labels):
    """One product of the three by its definition, each operand quantized for it alone."""
    of_a, of_b, of_result = labels
    contracted = [x for x in of_a if x in of_b and x not in of_result]
    factors = [
        rounded(x, config, sorted(of_x.index(c) for c in contracted))
        for x, config, of_x in ((a, configs[0], of_a), (b, configs[1], of_b))
    ]
    return np.einsum(f"{of_a},{of_b}->{of_result}", *factors)


def configs_of(config):
    """(lhs, rhs), (gradient, rhs) and (gradient, lhs), from the fields."""
    pairs = (config.lhs, config.rhs), (config.gradient, config.rhs), (config.gradient, config.lhs)
    quantizes = (
        config.quantizes_out,
        config.quantizes_lhs_gradient,
        config.quantizes_rhs_gradient,
    )
    return [p if q else (None, None) for p, q in zip(pairs, quantizes, strict=True)]


ROWS = {
    "int8": INT8_NEAREST,
    "fp8": FP8_TRAINING,
    "mixed": ProductConfig(lhs=ASYMMETRIC, gradient=ASYMMETRIC, quantizes_rhs_gradient=False),
    "groups": ProductConfig(lhs=ASYMMETRIC, gradient=ArrayConfig(group_size=2)),
    "backward": dataclasses.replace(
        INT8_NEAREST, quantizes_out=False, quantizes_lhs_gradient=False
    ),
}


CASES = [
    ("stack", "int8", "float32"),
    ("stack", "fp8", "float32"),
    ("stack", "mixed", "float32"),
    ("tokens", "int8", "float32"),
    ("tokens", "groups", "float32"),
    ("matmul", "backward", "float32"),
    ("matmul", "fp8", "bfloat16"),
]


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(("product", "name", "dtype"), CASES)
def test_each_product_matches_its_definition(product, name, dtype):
    config, (lhs, rhs, out) = ROWS[name], PRODUCTS[product]
    x, y, gradient = (normal(a, seed, dtype) for seed, a in enumerate((lhs, rhs, out)))
    found = pulled(config, (lhs, rhs, out), x, y, gradient)
    configs = configs_of(config)
    for result, expected in zip(
        found,
        (
            wanted(x, y, configs[0], (lhs, rhs, out)),
            wanted(gradient, y, configs[1], (out, rhs, lhs)),
            wanted(gradient, x, configs[2], (out, lhs, rhs)),
        ),
        strict=True,
    ):
        assert result.dtype == dtype
        error = np.abs(np.asarray(result, np.float64) - expected).max()
        assert error <= (0.01 if dtype == "bfloat16" else 2e-6) * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize(
    ("product", "dtype", "options"),
    [
        ("matmul", "float32", {}),
        ("stack", "float32", {}),
        ("tokens", "bfloat16", {}),
        ("tokens", "bfloat16", {"preferred_element_type": jnp.float32}),
        ("matmul", "float32", {"preferred_element_type": jnp.bfloat16}),
    ],
)
def test_without_quantization_it_is_that_of_lax(product, dtype, options):
    labels = PRODUCTS[product]
    x, y, gradient = (normal(a, seed, dtype) for seed, a in enumerate(labels))
    gradient = jnp.asarray(gradient).astype(options.get("preferred_element_type", dtype))

    @jax.jit
    def plain(x, y, gradient):
        dot = partial(jax.lax.dot_general, dimension_numbers=dimension_numbers(*labels), **options)
        out, pull = jax.vjp(dot, x, y)
        return out, *pull(gradient)

    found, expected = (
        pulled(FLOAT, labels, x, y, gradient, **options),
        plain(x, y, gradient),
    )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    if labels == PRODUCTS["matmul"] and not options:
        switched = pulled(SWITCHBACK, labels, x, y, gradient, **options)
        np.testing.assert_array_equal(switched[2], expected[2])
        assert not np.array_equal(switched[1], expected[1])


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize("index", range(3), ids=["out", "lhs gradient", "rhs gradient"])
def test_codes_are_multiplied_exactly(index):
    """Integers with 127 among those that share a scale are their own codes."""
    random, labels = np.random.default_rng(0), PRODUCTS["matmul"]
    lengths = {"m": 2, "k": 3, "n": 4, "knm"[index]: 1200}
    arrays = [random.integers(90, 128, [lengths[a] for a in of]) for of in labels]
    for a in arrays:
        a[0], a[:, 0] = 127, 127
    x, y, gradient = arrays = [a.astype(np.float64) for a in arrays]
    found = pulled(INT8_NEAREST, labels, *(a.astype(np.float32) for a in arrays))[index]
    expected = (x @ y, gradient @ y.T, x.T @ gradient)[index]
    assert np.any(expected % 2 == 1)
    assert expected.max() > 2**24
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.mark.slow
def test_stochastic_gradients_are_unbiased():
    config = dataclasses.replace(INT8_TRAINING, gradient=ArrayConfig(value_range=(-7, 7)))
    count, (lhs, rhs, out) = 1000, PRODUCTS["matmul"]
    x, y, gradient = arrays = [normal(a, seed) for seed, a in enumerate((lhs, rhs, out))]
    tiled = [np.tile(a, (count, 1, 1)) for a in arrays]
    run = partial(pulled, config, ("smk", "skn", "smn"), *tiled)
    samples = run(key=KEY)[1:]
    for of_side, side, other, labels in zip(
        samples, (config.rhs, config.lhs), (y, x), ((out, rhs, lhs), (out, lhs, rhs)), strict=True
    ):
        noise = np.std(of_side, 0) / count**0.5
        assert np.all(noise > 0)
        bias = np.mean(of_side, 0) - wanted(gradient, other, (None, side), labels)
        assert np.all(np.abs(bias) < 5 * noise)
        nearest = wanted(gradient, other, (config.gradient, side), labels)
        assert np.any(np.abs(np.mean(of_side, 0) - nearest) > 5 * noise)
    np.testing.assert_array_equal(run(key=KEY)[1], samples[0])
    assert not np.array_equal(run(key=jax.random.key(1))[1], samples[0])


@pytest.mark.slow
def test_other_values_pass_where_nan_and_inf_show():
    labels = PRODUCTS["matmul"]
    x, y, gradient = (normal(a, seed) for seed, a in enumerate(labels))
    found = pulled(INT8_NEAREST, labels, x, y, gradient)
    x[2, 3], gradient[1, 2] = np.nan, np.inf
    broken = pulled(INT8_NEAREST, labels, x, y, gradient)
    for index, places in enumerate([np.s_[2], np.s_[1]]):
        is_broken = np.zeros(found[index].shape, bool)
        is_broken[places] = True
        np.testing.assert_array_equal(np.isnan(broken[index]), is_broken)
        np.testing.assert_array_equal(
            np.asarray(broken[index])[~is_broken], np.asarray(found[index])[~is_broken]
        )
    # The rows of x are contracted, so that its column 3 and the column 2 of the gradient show.
    is_broken = np.zeros(y.shape, bool)
    is_broken[3], is_broken[:, 2] = True, True
    np.testing.assert_array_equal(np.isnan(broken[2]), is_broken)
    scaled = pulled(FP8_TRAINING, labels, x, y, gradient, scaling=DelayedScaling.init())
    assert all(np.all(np.isnan(a)) for a in scaled)


@pytest.mark.some_rows(2)
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)], ids=str)
def test_empty_products(shape):
    m, k, n = shape
    arrays = (np.ones(s, np.float32) for s in ((m, k), (k, n), (m, n)))
    found = pulled(INT8_TRAINING, PRODUCTS["matmul"], *arrays, key=KEY)
    for result, length in zip(found, (k, n, m), strict=True):
        np.testing.assert_allclose(result, np.full(result.shape, length), rtol=1e-6)


@pytest.mark.slow
def test_residuals_are_stored_as_codes():
    x, y, _ = (normal(a, seed) for seed, a in enumerate(PRODUCTS["matmul"]))

    def kept(config):
        _, pull = jax.vjp(lambda x, y: training.matmul(x, y, config=config, key=KEY), x, y)
        return sorted(a.dtype.name for a in jax.tree.leaves(pull) if a.size in (x.size, y.size))

    assert kept(INT8_TRAINING) == ["int8", "int8"]
    assert kept(SWITCHBACK) == ["float32", "int8"]
    assert kept(FP8_TRAINING) == ["uint8", "uint8"]  # Their bytes, on CPU.


def weights_and_inputs():
    x, y, _ = (normal(a, seed) for seed, a in enumerate(("tbk", "kn", "mn")))
    return {"w": jnp.asarray(y), "scaling": DelayedScaling.init(3)}, jnp.asarray(x)


def loss(params, x, config=FP8_TRAINING, key=None):
    scaling = params["scaling"] if config is FP8_TRAINING else None
    out = training.matmul(x, params["w"], config=config, key=key, scaling=scaling)
    return jnp.sum(jnp.sin(out))


@pytest.mark.slow
@pytest.mark.parametrize("config", [INT8_TRAINING, FP8_TRAINING], ids=["int8", "fp8"])
def test_loops_over_examples_and_rematerialization_change_nothing(config):
    params, x = weights_and_inputs()
    keys = jax.random.split(KEY, len(x))
    gradient = jax.grad(partial(loss, config=config))

    def by_scan(params):
        step = jax.checkpoint(partial(loss, config=config))

        def one(_, xk):
            return None, jax.grad(step)(params, xk[0], key=xk[1])

        return jax.lax.scan(one, None, (x, keys))[1]

    def by_vmap(params):
        return jax.vmap(lambda x, key: gradient(params, x, key=key))(x, keys)

    alone = [jax.jit(gradient)(params, x[i], key=keys[i]) for i in range(len(x))]
    expected = jax.tree.map(lambda *g: jnp.stack(g), *alone)
    for run in (by_scan, by_vmap):
        found = jax.jit(run)(params)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), found, expected)


@pytest.mark.slow
def test_devices_share_the_observed_amax():
    """Per-tensor scales come from the history, so that parts give what the whole gives."""
    params, x = weights_and_inputs()
    params["scaling"] = DelayedScaling(*jnp.eye(3) * jnp.array([2.0, 3.0, 1.0])[:, None])
    expected = jax.jit(jax.grad(loss))(params, x)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    part = partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P())
    found = jax.jit(part(jax.grad(loss)))(params, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    assert expected["scaling"].lhs[0] == np.abs(x).max()


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "contracted"])
def test_gradients_lie_where_their_operands_do(axis):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, y, gradient = (normal(a, seed) for seed, a in enumerate(PRODUCTS["matmul"]))
    expected = pulled(INT8_NEAREST, PRODUCTS["matmul"], x, y, gradient)
    specs = [jax.P("d", None), jax.P(None, "d")][axis], [jax.P(), jax.P("d", None)][axis]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, s) for a, s in zip((x, y), specs, strict=True)]
        gradient = jax.device_put(gradient, jax.P())
        found = pulled(
            INT8_NEAREST, PRODUCTS["matmul"], *placed, gradient, out_sharding=jax.P(None, None)
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(found[1:], placed, strict=True):
            assert jax.typeof(a).sharding == jax.typeof(b).sharding


def test_equal_configs_share_one_compilation():
    compiled: Any = jax.jit(lambda x, y, config: training.matmul(x, y, config=config, key=KEY))
    x, y, _ = (normal(a, seed) for seed, a in enumerate(PRODUCTS["matmul"]))
    for _ in range(2):
        int8 = ArrayConfig(format=INT8)
        compiled(
            x,
            y,
            ProductConfig(lhs=int8, rhs=int8, gradient=int8, rounds_stochastically=True),
        )
    assert compiled._cache_size() == 1
    # float8 codes for e4m3 and for e5m2 are two formats.
    assert FP8_TRAINING.rhs == ArrayConfig(format=FP8_E4M3, per_tensor=True)
    assert FP8_TRAINING.gradient == ArrayConfig(format=FP8_E5M2, per_tensor=True)


@pytest.mark.some_rows(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    "shapes", [((6, 10), (10, 4)), ((3, 6, 10), (10, 4)), ((3, 2, 6, 10), (3, 2, 10, 4))], ids=str
)
def test_matmul_is_that_of_jnp(shapes):
    a, b = (np.random.default_rng(0).normal(size=s).astype(np.float32) for s in shapes)
    np.testing.assert_array_equal(training.matmul(a, b, config=FLOAT), jnp.matmul(a, b))
    found = training.matmul(a, b, config=INT8_NEAREST)
    codes = (quantize(x, ArrayConfig(), axis=axis).dequantize() for x, axis in ((a, -1), (b, -2)))
    np.testing.assert_allclose(found, jnp.matmul(*codes), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_layers_learn_as_in_float():
    """Two layers of a net that Flax would give `dot_general`, in 200 steps."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(128, 8)).astype(np.float32))
    target = np.sin(x @ (random.normal(size=(8, 4)) / 2)) + 0.3 * random.normal(size=(128, 4))
    target = jnp.asarray(target.astype(np.float32))
    first = {
        "in": jnp.asarray(random.normal(size=(8, 32)).astype(np.float32) / 8**0.5),
        "out": jnp.asarray(random.normal(size=(32, 4)).astype(np.float32) / 32**0.5),
        "scaling": {"in": DelayedScaling.init(4), "out": DelayedScaling.init(4)},
    }
    optimizer = training.skip_scaling(optax.adamw(1e-2))

    def train(config, is_delayed):
        def loss(params, key):
            hidden = x
            for name in ("in", "out"):
                dot = partial(
                    training.dot_general,
                    config=config,
                    key=jax.random.fold_in(key, len(name)),
                    scaling=params["scaling"][name] if is_delayed else None,
                )
                hidden = jnp.tanh(hidden) if name == "out" else hidden
                hidden = dot(hidden, params[name], (((1,), (0,)), ((), ())), precision=None)
            return jnp.mean((hidden - target) ** 2)

        def step(carry, key):
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params, key)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradients, state, params)
            params = training.update_scaling(optax.apply_updates(params, updates), gradients)
            return (params, state), value

        carry = first, optimizer.init(first)
        return jax.jit(partial(jax.lax.scan, step))(carry, jax.random.split(KEY, 200))[1]

    plain = train(FLOAT, False)
    assert plain[-1] < 0.2 * plain[0]
    for config, is_delayed, excess in ((INT8_TRAINING, False, 1.03), (FP8_TRAINING, True, 1.15)):
        losses = train(config, is_delayed)
        assert not np.array_equal(losses, plain)
        assert np.mean(losses[-20:]) < excess * np.mean(plain[-20:])


def product(x: Any = None, y: Any = None, config: Any = INT8_NEAREST, **options: Any):
    x = jnp.ones((2, 4)) if x is None else x
    y = jnp.ones((4, 3)) if y is None else y
    return training.matmul(x, y, config=config, **options)


STACK = DelayedScaling(*jnp.zeros((3, 2, 4)))
ERRORS = {
    "integers": (lambda: product(jnp.ones((2, 4), int)), "lhs must be a floating.*int32 of shape"),
    "quantized": (
        lambda: product(y=quantize(jnp.ones((4, 3)), ArrayConfig())),
        "rhs must be a floating-point array.*got QTensor",
    ),
    "config": (lambda: product(config=INT8), "config must be a ProductConfig.*got int8"),
    "key": (lambda: product(config=INT8_TRAINING), "key must be a random key.*got None"),
    "scaling of int8": (
        lambda: product(scaling=DelayedScaling.init()),
        r"must have per_tensor=True.*got lhs=ArrayConfig\(.*Leave scaling None",
    ),
    "scaling of groups": (
        lambda: product(
            config=ProductConfig(rhs=ArrayConfig(group_size=2)),
            scaling=DelayedScaling.init(),
        ),
        "must have per_tensor=True.*got rhs=",
    ),
    "scaling with zero points": (
        lambda: product(
            config=ProductConfig(gradient=ArrayConfig(per_tensor=True, symmetric=False)),
            scaling=DelayedScaling.init(),
        ),
        "symmetric=True.*got gradient=",
    ),
    "scaling with a range": (
        lambda: product(
            config=ProductConfig(lhs=ArrayConfig(per_tensor=True, range=MinMSE())),
            scaling=DelayedScaling.init(),
        ),
        r"range=AbsMax\(\); got lhs=",
    ),
    "scaling of rotated operands": (
        lambda: product(
            config=dataclasses.replace(FP8_TRAINING, rhs_gradient_rotation=4),
            scaling=DelayedScaling.init(),
        ),
        "not rotated; got rhs_gradient_rotation=4. Leave one of them None",
    ),
    "stack": (
        lambda: product(config=FP8_TRAINING, scaling=STACK),
        r"state of one multiplication.*got \(2, 4\)",
    ),
    "broadcast": (
        lambda: product(jnp.ones((2, 2, 4)), jnp.ones((1, 4, 3))),
        r"matmul expects .* got \(2, 2, 4\) by \(1, 4, 3\)",
    ),
    "parameters of a layer": (
        lambda: training.matmul(jnp.ones((2, 4)), {"kernel": 1}, config=SWITCHBACK),  # pyright: ignore[reportArgumentType] (what is refused)
        "rhs must be a floating-point array, not a quantized one; got dict",
    ),
    "vector": (lambda: product(jnp.ones(4)), r"matmul expects .* got \(4,\) by \(4, 3\)"),
    "field": (lambda: ProductConfig(rhs=NF4), "rhs must be an ArrayConfig or None; got nf4"),  # pyright: ignore[reportArgumentType] (what is refused)
    "sizes": (
        lambda: ProductConfig(gradient=ArrayConfig(group_size=(2, 2))),
        r"gradient.group_size must be an int.*2-D blocks of lhs or rhs; got \(2, 2\)",
    ),
    "three sizes": (
        lambda: ProductConfig(rhs=ArrayConfig(group_size=(2, 2, 2))),
        r"rhs.group_size must be an int.*got \(2, 2, 2\)",
    ),
    "rotation": (
        lambda: ProductConfig(rhs_gradient_rotation=3),
        "The order of a Hadamard matrix must be a power of two.*got 3",
    ),
    "rounding": (
        lambda: ProductConfig(rounds_stochastically=True),
        "rounds_stochastically needs a config for the gradient.*got gradient=None",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(name):
    run, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        run()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_groups_lie_along_the_last_axis_with_room(size):
    """Or else along the longest; axes in the order of the first operand of each product."""
    config = ArrayConfig(group_size=size)
    labels = PRODUCTS["stack"]
    operands = [normal(of_x, i) for i, of_x in enumerate(labels)]

    def quantized(x, of_x, summed):
        fitting = [a for a in summed if LENGTHS[a] >= size]
        along = fitting[-1] if fitting else max(summed, key=lambda a: LENGTHS[a])
        axes = [of_x.index(a) for a in summed]
        return products.int8(x, products.shared_along(x.ndim, axes, size, of_x.index(along)))

    found = pulled(ProductConfig(lhs=config, rhs=config, gradient=config), labels, *operands)
    for a, b in zip(found, products.dot(labels, quantized, *operands), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_prescribed_groups_lie_along_the_last_contracted_axis():
    mx = ArrayConfig(format=MXFP8)
    random = np.random.default_rng(0)
    x, y = (random.normal(size=s).astype(np.float32) for s in ((2, 3, 64), (3, 64, 5)))
    dimensions = ((1, 2), (0, 1)), ((), ())
    product = partial(training.dot_general, config=ProductConfig(lhs=mx, rhs=mx))
    found = product(jnp.asarray(x), jnp.asarray(y), dimensions)
    codes = [rounded(a, mx, axes) for a, axes in ((x, (1, 2)), (y, (0, 1)))]
    np.testing.assert_allclose(found, np.einsum("abk,bkn->an", *codes), rtol=1e-4, atol=1e-4)
