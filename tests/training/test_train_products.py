"""The products of any function, quantized in training by rules."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant as jq
from jaxquant import training
from jaxquant.training import FP8_TRAINING, INT8_TRAINING, SWITCHBACK, DelayedScaling

NEAREST = dataclasses.replace(INT8_TRAINING, rounds_stochastically=False)
KEY = jax.random.key(0)
INDEX = jnp.array([2, 0, 2])
SIZES = jnp.array([2, 0, 3])
LAYOUT = ("NHWC", "HWIO", "NHWC")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def dot(x, w):
    return jnp.einsum("...k,kn->...n", x, w)


def quantized_dot(x, w, config=NEAREST, **options):
    numbers = ((x.ndim - 1,), (0,)), ((), ())
    return training.dot_general(x, w, numbers, config=config, **options)


def scanned(dot, w, x):
    return lax.scan(lambda x, w: (jnp.tanh(dot(x, w)), None), x, w)[0]


def fused(dot, w, x):
    query, rest = jnp.split(dot(x, w.reshape(8, -1)), [4], -1)
    return query.sum() * rest


def conv(convolve, w, x, **options):
    images = x.reshape(1, 5, 4, 2)
    return convolve(images, w, (1, 2), "SAME", dimension_numbers=LAYOUT, **options)


# What a model computes by plain operations, and the same by quantized ones, with the weight in the
# shape in which they multiply it.
CASES = {
    "matmul": ((8, 6), dot, quantized_dot),
    "transposed": (
        (6, 8),
        lambda w, x: dot(x, w.T),
        lambda w, x: quantized_dot(x, w.T),
    ),
    "on the left": (
        (6, 8),
        lambda w, x: jax.vmap(lambda x: w @ x)(x),
        lambda w, x: quantized_dot(x, w.T),
    ),
    "heads": (
        (8, 2, 3),
        lambda w, x: jnp.einsum("td,dhk->htk", x, w),
        lambda w, x: quantized_dot(x, w).transpose(1, 0, 2),
    ),
    "fused": ((8, 2, 3), partial(fused, dot), partial(fused, quantized_dot)),
    "of a stack": (
        (3, 8, 6),
        lambda w, x: dot(x, w[1]) + dot(x, lax.dynamic_index_in_dim(w, INDEX[1], 0, False)),
        lambda w, x: quantized_dot(x, w[1]) + quantized_dot(x, w[0]),
    ),
    "scaled": (
        (8, 6),
        lambda w, x: dot(x, -w[::-1] * jnp.arange(1.0, 7)[None] / 8),
        lambda w, x: quantized_dot(x, -w[::-1] * jnp.arange(1.0, 7)[None] / 8),
    ),
    "joined": (
        (8, 6),
        lambda w, x: dot(x, jnp.concatenate([w, 2 * w], 1)),
        lambda w, x: quantized_dot(x, jnp.concatenate([w, 2 * w], 1)),
    ),
    "tied": (
        (4, 8),
        lambda w, x: dot(x[:3] + w[INDEX], w.T),
        lambda w, x: quantized_dot(x[:3] + w[INDEX], w.T),
    ),
    "narrow": (
        (8, 6),
        lambda w, x: dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).astype(jnp.float32),
        lambda w, x: quantized_dot(
            x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.bfloat16
        ).astype(jnp.float32),
    ),
    "scan": ((3, 8, 8), partial(scanned, dot), partial(scanned, quantized_dot)),
    "checkpoint": (
        (3, 8, 8),
        lambda w, x: jax.checkpoint(partial(scanned, dot))(w, x),
        partial(scanned, quantized_dot),
    ),
    "loop": (
        (8, 8),
        lambda w, x: lax.fori_loop(0, 3, lambda _, x: jnp.tanh(dot(x, w)), x),
        lambda w, x: lax.fori_loop(0, 3, lambda _, x: jnp.tanh(quantized_dot(x, w)), x),
    ),
    "branch": (
        (8, 6),
        lambda w, x: lax.cond(x[0, 0] > 9, lambda w: x[:, :6], lambda w: dot(x, w), w),
        lambda w, x: quantized_dot(x, w),
    ),
    "convolution": (
        (3, 2, 2, 3),
        lambda w, x: conv(lax.conv_general_dilated, w, x),
        lambda w, x: conv(training.conv_general_dilated, w, x, config=NEAREST),
    ),
    "depthwise": (
        (3, 2, 1, 4),
        lambda w, x: conv(lax.conv_general_dilated, w, x, feature_group_count=2),
        lambda w, x: conv(
            training.conv_general_dilated, w, x, feature_group_count=2, config=NEAREST
        ),
    ),
    "ragged": (
        (3, 8, 6),
        lambda w, x: lax.ragged_dot(x, w, SIZES),
        lambda w, x: training.ragged_dot(x, w, SIZES, config=NEAREST),
    ),
    "ragged, transposed": (
        (3, 6, 8),
        lambda w, x: lax.ragged_dot(x, w.swapaxes(1, 2), SIZES),
        lambda w, x: training.ragged_dot(x, w.swapaxes(1, 2), SIZES, config=NEAREST),
    ),
}
CASES["matmul"] = ((8, 6), lambda w, x: x @ w, lambda w, x: quantized_dot(x, w))


def loss(fn):
    return lambda params, x: jnp.sum(jnp.sin(fn(params["w"], x)))


@pytest.mark.some_rows(9)
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_quantized_operations(name):
    shape, fn, quantized = CASES[name]
    params, x = {"w": normal(*shape)}, normal(5, 8, seed=1)

    def pulled(fn):
        return jax.jit(jax.value_and_grad(loss(fn), argnums=(0, 1)))(params, x)

    rules = {"w": NEAREST}
    trained = training.train_products(loss(fn), rules)
    found = jax.jit(jax.value_and_grad(trained, argnums=(0, 1)))(params, x)
    expected = pulled(quantized)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    plain = pulled(fn)
    assert not np.allclose(found[0], plain[0], rtol=1e-5)
    unchanged = training.train_products(loss(fn), {"w": None})
    left = jax.jit(jax.value_and_grad(unchanged, argnums=(0, 1)))(params, x)
    jax.tree.map(np.testing.assert_array_equal, left, plain)


def model(params, x):
    x = jnp.tanh(x @ params["first"] + params["bias"])
    x = jnp.tanh(x @ params["middle"])
    return jnp.sum(jnp.sin(x @ params["last"]))


MODEL = {
    "first": normal(8, 6),
    "bias": normal(1, 6, seed=3),
    "middle": normal(6, 6, seed=1),
    "last": normal(6, 4, seed=2),
}


def test_the_first_rule_that_matches_decides():
    def expected(params, x):
        x = jnp.tanh(x @ params["first"] + params["bias"])
        x = jnp.tanh(training.matmul(x, params["middle"], config=SWITCHBACK))
        return jnp.sum(jnp.sin(x @ params["last"]))

    x = normal(5, 8, seed=1)
    rules = [("first", None), ("re:la.*", None), ("*", SWITCHBACK)]
    found = jax.jit(jax.grad(training.train_products(model, rules)))(MODEL, x)
    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(jax.grad(expected))(MODEL, x))


def test_a_function_with_its_own_derivative_keeps_it():
    @jax.custom_vjp
    def own(w, x):
        return x @ w

    own.defvjp(lambda w, x: (x @ w, (w, x)), lambda kept, g: (7 * jnp.ones((8, 6)), g @ kept[0].T))
    params, x = {"w": normal(8, 6), "v": normal(6, 2)}, normal(5, 8)
    trained = training.train_products(
        lambda params, x: jnp.sum(own(params["w"], x) @ params["v"]), NEAREST
    )
    assert np.all(jax.jit(jax.grad(trained))(params, x)["w"] == 7)


def test_a_sum_with_data_is_not_a_parameter():
    """A bias of one example has the size of the activations that it is added to."""

    def fn(params, x):
        return jax.vmap(lambda x: (x @ params["w"] + params["b"]) @ params["v"])(x)

    params = {"w": normal(8, 6), "b": normal(6, seed=3), "v": normal(6, 2, seed=4)}
    with pytest.raises(ValueError, match="must select an operand of a product; got 'b'"):
        training.train_products(fn, {"b": NEAREST})(params, X)
    alone = training.train_products(lambda p, x: fn(p, x[None])[0], {"b": NEAREST})
    with pytest.raises(ValueError, match=r"got 'b', which selects b \(.*add"):
        alone(params, X[0])


# Arrays made of parameters that no rule selects any more.
NOT_PARAMETERS = {
    "two of one size": lambda w, v: w * v,
    "outer": lambda w, v: w[:, :1] * v[:1],
    "other rules": lambda w, v: jnp.concatenate([w, v], 1),
    "one row": lambda w, v: lax.dynamic_slice(w, (INDEX[0], 0), (1, 6)).T,
    "integers": lambda w, v: w.astype(jnp.int32).astype(jnp.float32),
}


@pytest.mark.parametrize("name", NOT_PARAMETERS)
def test_arrays_that_are_not_parameters_stay_in_float(name):
    params = {"w": 3 * normal(8, 6), "v": normal(8, 6, seed=1)}

    def fn(params, x):
        other = NOT_PARAMETERS[name](params["w"], params["v"])
        y = normal(5, other.shape[0], seed=2) @ other
        return x @ params["w"], x @ params["v"], y

    x = normal(5, 8, seed=3)
    rules = {"w": NEAREST, "v": SWITCHBACK}
    found = jax.jit(training.train_products(fn, rules))(params, x)
    expected = jax.jit(fn)(params, x)
    assert not np.allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5, atol=1e-5)


def test_joined_parameters_do_not_share_a_state():
    params = {"w": normal(8, 6), "v": normal(8, 6, seed=1)}

    def fn(params, x):
        return x @ jnp.concatenate([params["w"], params["v"]], 1)

    with pytest.raises(ValueError, match="init_scaling needs a rule"):
        training.init_scaling(fn, FP8_TRAINING, params, X)


def test_products_with_integers_stay_in_float():
    def fn(params, x):
        numbers = ((1,), (0,)), ((), ())
        counts = lax.dot_general(x.astype(jnp.int32), params["w"], numbers)
        return counts, x @ params["w"]

    params, x = {"w": normal(8, 6)}, 3 * normal(5, 8, seed=1)
    found, expected = training.train_products(fn, NEAREST)(params, x), fn(params, x)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[1], expected[1], rtol=1e-5)


def test_quantized_parameters_stay_quantized():
    params = {"w": normal(8, 6), "base": jq.quantize(normal(6, 6, seed=1), jq.ArrayConfig())}

    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["base"]

    x = normal(5, 8, seed=1)
    found = jax.jit(training.train_products(fn, {"w": NEAREST}))(params, x)
    hidden = jnp.tanh(quantized_dot(x, params["w"]))
    np.testing.assert_allclose(found, jq.matmul(hidden, params["base"]), rtol=1e-5, atol=1e-5)


def test_each_product_and_step_has_its_own_noise():
    """Equal layers with equal gradients, whose rounding differs."""
    w = jnp.broadcast_to(normal(8, 6), (4, 8, 6))

    def stacked(params, x):
        return lax.scan(lambda c, w: (c, dot(x, w)), 0.0, params["w"])[1].sum(0)

    def unrolled(params, x):
        products = [dot(x, params["w"][i]) for i in range(4)]
        return jnp.stack(products).sum(0)

    def shared(params, x):
        body = jax.checkpoint(lambda c, w: (c + dot(x, w), None))
        return lax.scan(lambda c, _: body(c, params["w"][0]), jnp.zeros((5, 6)), None, 4)[0]

    params, x, weights = {"w": w}, normal(5, 8, seed=1), normal(5, 6, seed=2)

    def gradient(fn, key):
        coarse = jq.ArrayConfig(value_range=(-7, 7))
        rules = {"w": training.ProductConfig(gradient=coarse, rounds_stochastically=True)}
        trained = training.train_products(lambda p, x: jnp.sum(weights * fn(p, x)), rules, key=key)
        return jax.jit(jax.grad(trained))(params, x)["w"]

    for fn in (stacked, unrolled):
        found = gradient(fn, KEY)
        for i, j in ((0, 1), (1, 2), (2, 3)):
            assert not np.array_equal(found[i], found[j])
        np.testing.assert_array_equal(gradient(fn, KEY), found)
        assert not np.array_equal(gradient(fn, jax.random.key(1)), found)
    # The mean of four products is closer to the exact gradient than one of them.
    exact, one, four = x.T @ weights, gradient(unrolled, KEY)[0], gradient(shared, KEY)[0] / 4
    assert np.std(four - exact) < 0.7 * np.std(one - exact)


def test_devices_have_their_own_noise():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = {"w": normal(8, 6)}, jnp.tile(normal(2, 8, seed=1), (4, 1))

    @partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P("d"))
    def fn(params, x):
        return jnp.sin(x @ params["w"])

    trained = training.train_products(lambda p, x: fn(p, x).sum(), INT8_TRAINING, key=KEY)
    of_x = jax.jit(jax.grad(trained, argnums=1))(params, x).reshape(4, 2, 8)
    assert not np.array_equal(of_x[0], of_x[1])
    trained = training.train_products(lambda p, x: fn(p, x).sum(), NEAREST)
    of_x = jax.jit(jax.grad(trained, argnums=1))(params, x).reshape(4, 2, 8)
    np.testing.assert_array_equal(of_x[0], of_x[1])


def test_devices_share_the_observed_amax():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = {"w": normal(8, 6)}, normal(8, 8, seed=1)

    @partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("d")), out_specs=jax.P("d"))
    def fn(params, x):
        return jnp.sin(x @ params["w"])

    assert jq.uses(fn, params, x).contracted == {"w": (0,)}
    states = training.init_scaling(fn, FP8_TRAINING, params, x, length=3)

    def observed(states):
        return training.train_products(fn, FP8_TRAINING, scaling=states)(params, x).sum()

    found = jax.jit(jax.grad(observed))(states)["w"]
    np.testing.assert_array_equal(found.lhs, [jnp.abs(x).max(), 0, 0])
    np.testing.assert_array_equal(found.rhs, [jnp.abs(params["w"]).max(), 0, 0])


def layers(params, x):
    x = x @ params["in"]
    return scanned(dot, params["layers"], x) @ params["out"]


LAYERS = {"in": normal(8, 6), "layers": normal(3, 6, 6), "out": normal(6, 2)}


def test_delayed_scaling_has_a_state_per_slice():
    x, rules = normal(5, 8, seed=1), {"out": None, "*": FP8_TRAINING}
    states = training.init_scaling(layers, rules, LAYERS, x, length=4)
    assert {p: s.lhs.shape for p, s in states.items()} == {"in": (4,), "layers": (3, 4)}

    def found(params, states):
        return layers_loss(training.train_products(layers, rules, scaling=states)(params, x))

    def expected(params, states):
        product = partial(training.matmul, config=FP8_TRAINING)
        h = product(x, params["in"], scaling=states["in"])

        def step(h, layer):
            return jnp.tanh(product(h, layer[0], scaling=layer[1])), None

        h, _ = lax.scan(step, h, (params["layers"], states["layers"]))
        return layers_loss(h @ params["out"])

    for _ in range(2):
        pairs = [jax.jit(jax.grad(f, argnums=(0, 1)))(LAYERS, states) for f in (found, expected)]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), *pairs)
        observed = pairs[0][1]
        assert observed["in"].lhs[0] == jnp.abs(x).max()
        np.testing.assert_array_equal(
            observed["layers"].rhs[:, 0], jnp.abs(LAYERS["layers"]).max((1, 2))
        )
        states = training.update_scaling(states, observed)
    shared = {"layers": DelayedScaling.init(4)}
    trained = jax.grad(
        lambda s: layers_loss(training.train_products(layers, rules, scaling=s)(LAYERS, x))
    )
    np.testing.assert_allclose(
        jax.jit(trained)(shared)["layers"].rhs[0], jnp.abs(LAYERS["layers"]).max((1, 2)).sum(), 1e-6
    )


def layers_loss(out):
    return jnp.sum(jnp.sin(out))


def test_save_codes_keeps_codes_instead_of_activations():
    def block(params, x):
        for name in ("first", "middle", "middle"):
            x = jnp.tanh(training.matmul(x, params[name], config=FP8_TRAINING))
        return x

    x = normal(64, 8, seed=1)

    def kept(policy):
        saving = jax.checkpoint(block, policy=policy) if policy else block
        _, pull = jax.vjp(saving, MODEL, x)
        large = [a for a in jax.tree.leaves(pull) if a.size >= 64 * 6 and a is not x]

        # jit(pull) would have constants: XLA folds their tanh, which differs in the last bit from
        # that of a program, and then gradients near a tie are rounded to another code.
        @jax.jit
        def gradients(params, x):
            return jax.vjp(saving, params, x)[1](jnp.ones((64, 6)))

        return sorted(a.dtype.name for a in large), gradients(MODEL, x)

    plain, expected = kept(None)
    assert plain.count("float32") >= 3  # What tanh needs.
    names, found = kept(training.save_codes)
    assert names.count("uint8") == 3  # Codes of float8, on CPU.
    assert names.count("float32") <= 1  # The argument.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)
    assert "uint8" not in kept(jax.checkpoint_policies.nothing_saveable)[0]


def test_save_codes_keeps_those_of_each_product():
    """Scales per row in out, and per column in the gradient of the weights: other codes."""

    def block(w, x):
        return jnp.tanh(training.matmul(jnp.tanh(x), w, config=NEAREST))

    saving = jax.checkpoint(block, policy=training.save_codes)
    w, x = normal(8, 6), normal(64, 8, seed=1)
    _, pull = jax.vjp(saving, w, x)
    codes = [a.size for a in jax.tree.leaves(pull) if a.dtype == jnp.int8]
    assert sorted(codes) == [8 * 6, 64 * 8, 64 * 8]


@pytest.mark.parametrize("subscripts", ["btd,dhk->bthk", "btd,hdk->bhtk", "btd,bdk->tbk", "td,kd"])
def test_einsum_is_that_of_jnp_with_quantized_operands(subscripts):
    lengths = {"b": 2, "t": 5, "d": 8, "h": 3, "k": 4}
    x, w = (normal(*(lengths[a] for a in term)) for term in subscripts.split("->")[0].split(","))
    options: dict[str, Any] = {"config": training.ProductConfig()}
    np.testing.assert_allclose(
        training.einsum(subscripts, x, w, **options), jnp.einsum(subscripts, x, w), 1e-5, 1e-5
    )
    axes = [term.index("d") for term in subscripts.split("->")[0].split(",")]
    codes = [
        jq.quantize(a, jq.ArrayConfig(), axis).dequantize()
        for a, axis in zip((x, w), axes, strict=True)
    ]
    found = jax.jit(partial(training.einsum, subscripts, config=NEAREST))(x, w)
    np.testing.assert_allclose(found, jnp.einsum(subscripts, *codes), rtol=1e-4, atol=1e-4)


X = normal(5, 8)
ERRORS = {
    "function": (
        lambda: training.train_products(MODEL, NEAREST),  # pyright: ignore[reportArgumentType]
        "train_products expects a function.*got dict",
    ),
    "rules": (
        lambda: training.train_products(model, "*"),  # pyright: ignore[reportArgumentType]
        r"rules must be a ProductConfig, a dict of pattern.*got '\*'",
    ),
    "no rules": (lambda: training.train_products(model, {}), r"must not be empty; got \{\}"),
    "scheme": (
        lambda: training.train_products(model, {"*": jq.W8A8}),  # pyright: ignore[reportArgumentType]
        r"pair of a pattern and a ProductConfig or None.*got \('\*', Scheme",
    ),
    "key": (
        lambda: training.train_products(model, INT8_TRAINING),
        r"key must be a random key.*got None\. Write train_products\(fn, rules, key=key\)",
    ),
    "no match": (
        lambda: training.train_products(model, {"middel": NEAREST})(MODEL, X),
        "must match a parameter; got 'middel', and the paths bias, first, last, middle",
    ),
    "integers": (
        lambda: training.train_products(model, {"first": NEAREST})(
            {**MODEL, "first": jnp.ones((8, 6), int)}, X
        ),
        "must match a floating-point parameter; got 'first', which matches int32. Use None",
    ),
    "no product": (
        lambda: training.train_products(model, {"bias": NEAREST})(MODEL, X),
        r"must select an operand of a product; got 'bias', which selects bias \(broadcast.*Use "
        "None|must select an operand of a product; got 'bias', which selects bias .add",
    ),
    "scaling": (
        lambda: training.train_products(
            model, {"last": FP8_TRAINING}, scaling={"first": DelayedScaling.init()}
        )(MODEL, X),
        r"scaling must be for parameters that the rules select, \['last'\]; got \['first'\]",
    ),
    "stack": (
        lambda: training.train_products(
            layers, FP8_TRAINING, scaling={"layers": DelayedScaling(*jnp.zeros((3, 2, 4)))}
        )(LAYERS, X),
        "scaling of layers must have one state per slice, 3; got 2. Make it with init_scaling",
    ),
    "no scaling": (
        lambda: training.init_scaling(model, NEAREST, MODEL, X),
        "init_scaling needs a rule with one scale per tensor.*got ProductConfig",
    ),
    "elementwise": (
        lambda: training.einsum("td,td->td", X, X, config=NEAREST),
        "sum over labels that both have.*got 'td,td->td'",
    ),
    "sum of rhs": (
        lambda: training.einsum("td,dk->t", X, X.T, config=NEAREST),
        "got 'td,dk->t'. Sum over other labels of rhs before",
    ),
    "one operand": (
        lambda: training.einsum("td->t", X, X, config=NEAREST),
        "must name two operands.*got 'td->t'",
    ),
    "einsum of integers": (
        lambda: training.einsum("td,dk->tk", X, jnp.ones((8, 2), int), config=NEAREST),
        "rhs must be a floating-point array.*got int32",
    ),
    "ragged": (
        lambda: training.ragged_dot(X, normal(3, 6, 8), SIZES, config=NEAREST),
        r"ragged_dot expects \(M, K\) by .* got \(5, 8\) by \(3, 6, 8\) and \(3,\)",
    ),
    "convolution": (
        lambda: training.conv_general_dilated(
            normal(1, 2, 4, 4), jnp.ones((1, 2, 2, 2), int), (1, 1), "SAME", config=NEAREST
        ),
        "rhs must be a floating-point array.*got int32",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_to_do(name):
    run, text = ERRORS[name]
    with pytest.raises(ValueError, match=text):
        run()


def test_explain_names_parameters():
    trained = training.train_products(model, {"middle": NEAREST, "*": None})
    assert [row.parameter for row in jq.explain(trained, MODEL, X).rows] == ["middle"]
