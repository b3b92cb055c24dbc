"""Trees in training: products equal to those of the converted tree, and gradients."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant import (
    INT2,
    INT4,
    SCHEMES,
    W4A16_ASYM,
    W8A8,
    W8A16,
    ArrayConfig,
    Inputs,
    QTensor,
    Scheme,
)
from jaxquant.training import (
    LearnedRange,
    LearnedStep,
    Prepared,
    convert,
    fake_quantize,
    init_learned,
    prepare,
)

from .. import checks, oracles
from ..ops.products import assert_product, normal

M, K, N = 5, 128, 24
W4A4 = Scheme(ArrayConfig(format=INT4, axis=-2), ArrayConfig(format=INT4, axis=-1))
ALL: dict[str, Scheme] = {
    **SCHEMES,
    "INT2 g32": Scheme(ArrayConfig(format=INT2, axis=-2, group_size=32)),
    "W4A4": W4A4,
    "per tensor": Scheme(ArrayConfig(axis=None), ArrayConfig(axis=None)),
    "blocks": Scheme(ArrayConfig(axis=(-2, -1), group_size=(32, 8))),
    "bfloat16 scales": Scheme(ArrayConfig(format=INT4, axis=0, scale_dtype="bfloat16")),
}
GROUPED = Scheme(ArrayConfig(format=INT4, axis=-2, group_size=8, symmetric=False))
X = jnp.asarray(normal(M, K))


def weights(rules, dtype="float32", shape=(K, N)):
    return {name: jnp.asarray(normal(*shape, seed=i), dtype) for i, name in enumerate(rules)}


def moved(tree, seed=0):
    """The tree as after some training: every float in it has changed."""
    leaves, treedef = jax.tree.flatten(tree)
    random = np.random.default_rng(seed)
    factors = [jnp.asarray(random.uniform(0.7, 1.1, x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, [x * f for x, f in zip(leaves, factors, strict=True)])


def learn(params, rules):
    return prepare(params, rules, init_learned(params, rules, None))


def products(tree, x):
    return {name: jq.matmul(x, w) for name, w in tree.items()}


def assert_equal_trees(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("make, dtype", [(prepare, "float32"), (learn, "bfloat16")])
def test_products_are_those_of_the_converted_tree_bit_for_bit(make, dtype):
    params, x = weights(ALL, dtype), X.astype(dtype)
    prepared = make(params, ALL)
    apply = jax.jit(products)
    if make is prepare:
        quantized = jq.tree.quantize(params, ALL)
        assert_equal_trees(convert(prepared), quantized)

    prepared = moved(prepared)
    converted = convert(prepared)

    assert_equal_trees(apply(prepared, x), apply(converted, x))
    for name in ("W8A8", "W4A16_ASYM"):
        np.testing.assert_array_equal(
            jq.matmul(x, prepared[name]), jq.matmul(x, converted[name]), err_msg=name
        )


def einsum(x, w):
    return jq.einsum("mk,hkn->mhn", x, w)


def embed(x, w):
    return jq.take(w, jnp.array([3, 0, 3, 7]), axis=0)


def convolve(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jq.conv_general_dilated(x, w, (1, 2), "SAME", dimension_numbers=numbers)


def ragged(x, w):
    return jq.ragged_dot(x, w, jnp.array([2, 0, 3], jnp.int32))


def scanned(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(jq.matmul(x, w)), None), x, w)[0]


INT8_CONV = Scheme(ArrayConfig(axis=(0, 1, 2)), ArrayConfig(axis=-1))
# (operation, shapes of inputs and weight, schemes)
OPERATIONS: dict[str, Any] = {
    "einsum": (einsum, (M, 32), (3, 32, 8), (W8A8, GROUPED)),
    "take": (embed, (M, 8), (16, 32), (ArrayConfig(axis=-1), ArrayConfig(axis=1, group_size=8))),
    "conv": (convolve, (2, 5, 6, 4), (3, 3, 4, 8), (INT8_CONV, ArrayConfig(axis=(0, 1, 2)))),
    "ragged_dot": (ragged, (M, 32), (3, 32, 8), (W8A8, GROUPED)),
    "scan": (scanned, (M, 32), (3, 32, 32), (W8A8, ArrayConfig(format=INT4, axis=1))),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_takes_a_prepared_weight_and_passes_gradients_on(name):
    operation, shape, weight_shape, schemes = OPERATIONS[name]
    x, rules = jnp.asarray(normal(*shape)), {str(i): s for i, s in enumerate(schemes)}
    prepared = moved(learn(weights(rules, shape=weight_shape), rules))

    @jax.jit
    def outputs(tree):
        return {name: operation(x, w) for name, w in tree.items()}

    def loss(tree):
        return sum(jnp.vdot(y, jnp.cos(jnp.arange(y.size))) for y in map(jnp.ravel, tree.values()))

    assert_equal_trees(outputs(prepared), outputs(convert(prepared)))

    def surrogate(tree):
        """The same with float weights, in products of floats if inputs stay floats."""
        values = {k: fake_quantize(p.weight, p.config, p.learned) for k, p in tree.items()}
        served = convert(jax.lax.stop_gradient(tree))
        for name, p in tree.items():
            values[name] = _WithValues(served[name], values[name]) if p.inputs else values[name]
        return loss(outputs(values))

    got = jax.jit(jax.grad(lambda tree: loss(outputs(tree))))(prepared)
    want = jax.jit(jax.grad(surrogate))(prepared)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.any(b)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WithValues(jq.core.Deferred):
    """A quantized weight whose gradient goes to floats that are given."""

    q: QTensor
    weight: jax.Array

    def quantize(self):
        return dataclasses.replace(
            self.q, values=self.weight.transpose(self.q.stored_axes(range(self.q.ndim)))
        )


def test_a_w8a8_product_is_one_of_whole_numbers():
    prepared = moved(prepare(weights({"w": W8A8}), {"w": W8A8}))
    (row,) = jq.explain(products, prepared, X).rows
    assert row.is_integer
    x, w = jq.quantize(X, ArrayConfig(axis=-1)), convert(prepared)["w"].reorder(None)
    whole = np.asarray(x.codes, np.int64) @ np.asarray(w.codes, np.int64)
    want = whole.astype(np.float32) * np.asarray(x.scale) * np.asarray(w.scale)
    np.testing.assert_allclose(jax.jit(products)(prepared, X)["w"], want, rtol=3e-7)


@pytest.mark.parametrize("scheme", [W8A8, W8A16, W4A16_ASYM], ids=["W8A8", "W8A16", "W4A16_ASYM"])
def test_weights_get_the_gradient_of_the_float_product_and_inputs_theirs(scheme):
    prepared = prepare(weights({"w": scheme}), {"w": scheme})
    cotangent = normal(M, N, seed=9)

    def loss(tree, x):
        return jnp.vdot(jq.matmul(x, tree["w"]), cotangent)

    of_tree, of_x = jax.jit(jax.grad(loss, (0, 1)))(prepared, X)

    met = X if scheme.inputs is None else jq.quantize(X, ArrayConfig(axis=-1))
    assert_product(of_tree["w"].weight, "mk,mn->kn", met, cotangent)
    assert_product(of_x, "mn,kn->mk", cotangent, convert(prepared)["w"])


def test_learned_leaves_get_the_gradient_of_lsq():
    config = ArrayConfig(format=INT4, axis=-2, group_size=32)
    prepared = moved(learn(weights({"w": config}), {"w": config}))
    cotangent = normal(M, N, seed=9)

    got = jax.grad(lambda p: jnp.vdot(jq.matmul(X, p["w"]), cotangent))(prepared)["w"]

    weight, step = (np.asarray(a, np.float64) for a in jax.tree.leaves(prepared["w"]))
    of_value = np.asarray(X, np.float64).T @ cotangent
    steps = oracles.spread(step, weight.shape)
    _, mask, slope, _ = oracles.straight_through(weight, steps, np.zeros(weight.shape), config)
    assert 0 < mask.mean() < 1
    np.testing.assert_allclose(got.weight, of_value * mask, rtol=1e-4, atol=1e-4)
    want = oracles.sum_blocks(of_value * slope, step.shape) / np.sqrt(32 * 7)
    np.testing.assert_allclose(got.learned.scale, want, rtol=1e-3, atol=1e-3)


def calibrated(prepared, scale, zero_point=None):
    inputs = Inputs(prepared.inputs.config, scale, zero_point)
    return dataclasses.replace(prepared, inputs=inputs)


@pytest.mark.parametrize("axis", [-2, None])
def test_a_calibrated_scale_of_inputs_is_trained_as_a_step(axis):
    scheme = Scheme(ArrayConfig(axis=axis), ArrayConfig(format=INT4, axis=None))
    prepared = prepare(weights({"w": scheme}), {"w": scheme})["w"]
    step, cotangent = np.float32(0.4), normal(M, N, seed=9)

    def gradient(scale):
        tree = calibrated(prepared, jnp.float32(scale))
        return jax.grad(lambda p: jnp.vdot(jq.matmul(X, p), cotangent))(tree)

    got = gradient(step)

    steps, zeros = np.full((M, K), step), np.zeros((M, K))
    value, mask, slope, _ = oracles.straight_through(np.asarray(X), steps, zeros, scheme.inputs)
    assert 0 < mask.mean() < 1
    of_inputs = cotangent @ oracles.dequantize(convert({"w": prepared})["w"]).T
    want = np.sum(of_inputs * slope) / np.sqrt(K * 7)
    np.testing.assert_allclose(got.inputs.scale, want, rtol=1e-3)
    np.testing.assert_allclose(got.weight, value.T @ cotangent, rtol=1e-4, atol=1e-3)
    # The sign of a step does not count: training may not drive it into NaN.
    np.testing.assert_allclose(gradient(-step).inputs.scale, -want, rtol=1e-3)
    served = convert([calibrated(prepared, jnp.float32(-step))])[0]
    np.testing.assert_array_equal(served.inputs.scale, step)


def test_a_calibrated_zero_point_that_is_floating_is_trained():
    inputs = ArrayConfig(format=INT4, axis=None, symmetric=False, value_range=(-8, 0))
    scheme = Scheme(ArrayConfig(axis=-2), inputs)
    prepared = prepare(weights({"w": scheme}), {"w": scheme})["w"]
    tree = calibrated(prepared, jnp.float32(0.3), jnp.float32(-1.7))
    cotangent = normal(M, N, seed=9)

    got = jax.grad(lambda p: jnp.vdot(jq.matmul(X, p), cotangent))(tree)

    steps, zeros = np.full((M, K), np.float32(0.3)), np.full((M, K), -2.0)
    _, _, *slopes = oracles.straight_through(np.asarray(X), steps, zeros, inputs)
    of_inputs = cotangent @ oracles.dequantize(convert([prepared])[0]).T
    for gradient, slope in zip((got.inputs.scale, got.inputs.zero_point), slopes, strict=True):
        want = np.sum(of_inputs * slope) / np.sqrt(K * 8)
        np.testing.assert_allclose(gradient, want, rtol=1e-3)


def train(tree, steps=40):
    """Fits a product with optax, and gives the losses and the tree."""
    target = jnp.asarray(normal(M, N, seed=7))
    optimizer, traces = optax.adam(1e-2), []

    def loss(tree):
        return jnp.mean((jax.checkpoint(jq.matmul)(X / 16, tree["w"]) - target) ** 2)

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        traces.append(state)
        tree, moments = state
        value, gradient = jax.value_and_grad(loss)(tree)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(tree, updates), moments), value

    state, losses = (tree, optimizer.init(tree)), []
    for _ in range(steps):
        state, value = step(state)
        losses.append(float(value))
    assert len(traces) == 1
    return state[0], losses, loss


@pytest.mark.parametrize("scheme", [W4A4, GROUPED], ids=["W4A4", "W4A16 g8 asymmetric"])
def test_optax_trains_a_prepared_tree_and_serving_it_has_the_loss_of_training(scheme):
    params = weights({"w": scheme})
    start = init_learned(params, {"w": scheme})
    prepared = jax.tree.map(jnp.array, prepare(params, {"w": scheme}, start))

    with jax.numpy_dtype_promotion("standard"):  # Optax relies on it.
        trained, losses, loss = train(prepared)

    assert losses[-1] < 0.7 * losses[0]
    first, last = (jax.tree.leaves(tree) for tree in (start["w"], trained["w"].learned))
    assert len(first) == 2 - scheme.weights.symmetric
    assert all(np.any(a != b) for a, b in zip(first, last, strict=True))
    served, apply = convert(trained), jax.jit(products)
    np.testing.assert_array_equal(apply(trained, X)["w"], apply(served, X)["w"])
    np.testing.assert_allclose(loss(trained), loss(served), rtol=1e-6)


def test_shards_of_a_batch_give_the_gradient_of_the_whole():
    prepared = learn(weights({"w": W8A8}), {"w": W8A8})
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(normal(8, K))

    def gradient(tree, x):
        return jax.grad(lambda tree: jnp.sum(jnp.square(jq.matmul(x, tree["w"]))))(tree)

    spec = jax.sharding.PartitionSpec
    # Leaves that all devices have get the sum of the gradients of all.
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(spec(), spec("batch")), out_specs=spec())
    got, want = jax.jit(sharded)(prepared, x), jax.jit(gradient)(prepared, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_a_prepared_tree_is_saved_and_loaded_like_another(tmp_path):
    rules = {"a": W8A8, "b": GROUPED}
    prepared = moved(learn(weights(rules), rules)) | {"bias": jnp.ones(3)}
    prepared["a"] = calibrated(prepared["a"], jnp.float32(0.3))
    path = tmp_path / "training.safetensors"
    jq.save(path, prepared)
    abstract = jax.eval_shape(lambda tree: tree, prepared)
    assert_equal_trees(jq.load(path, like=abstract), prepared)


def test_the_first_learned_steps_and_ranges_are_those_of_quantization_after_training():
    rules = {"a": ArrayConfig(format=INT4, axis=-2, group_size=32), "b": GROUPED.weights}
    params = weights(rules) | {"bias": jnp.ones(3)}

    learned = init_learned(params, rules)

    assert isinstance(learned["a"], LearnedStep)
    assert isinstance(learned["b"], LearnedRange)
    assert learned["bias"] is None
    for range, first in [(None, init_learned(params, rules, None)), (jq.MinMSE(), learned)]:
        got = convert(prepare(params, rules, first))
        for name, config in rules.items():
            config = config if range is None else dataclasses.replace(config, range=range)
            q = jq.quantize(params[name], config).reorder(got[name].order)
            np.testing.assert_allclose(checks.scale_of(got[name]), checks.scale_of(q), rtol=1e-6)
            np.testing.assert_array_equal(checks.zero_point_of(got[name]), checks.zero_point_of(q))


def test_axes_count_from_the_end_so_that_a_slice_of_a_stack_is_quantized_alike():
    rules = {"w": ArrayConfig(axis=1)}
    prepared = prepare(weights(rules, shape=(3, 32, 8)), rules)["w"]
    first = jax.tree.map(lambda a: a[0], prepared)
    whole, slice = convert([prepared])[0], convert([first])[0]
    assert prepared.config.axis == -2
    np.testing.assert_array_equal(slice.codes, whole.codes[0])
    blocks = {"w": ArrayConfig(axis=(1, 2), group_size=(16, None))}
    config = prepare(weights(blocks, shape=(3, 32, 8)), blocks)["w"].config
    assert (config.axis, config.group_size) == ((-2, -1), (16, None))


def test_a_prepared_weight_may_be_seen_in_another_dtype():
    prepared = prepare(weights({"w": W8A16}), {"w": W8A16})["w"]
    narrow = prepared.astype(jnp.bfloat16)
    assert (narrow.dtype, narrow.weight.dtype) == (jnp.bfloat16, jnp.float32)
    x = X.astype(jnp.bfloat16)

    def total(p):
        return jnp.sum(jq.matmul(x, p), dtype=jnp.float32)

    served = convert([prepared])[0].astype(jnp.bfloat16)
    assert jq.matmul(x, narrow).dtype == jnp.bfloat16
    np.testing.assert_array_equal(jq.matmul(x, narrow), jq.matmul(x, served))
    gradient = jax.grad(total)(narrow).weight
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient[:, 0], np.sum(x, 0, dtype=np.float32), rtol=0.02, atol=0.05)


def test_prepared_weights_print_in_one_line_and_know_their_shape():
    prepared = learn(weights({"w": W8A8}), {"w": W8A8})["w"]
    assert repr(prepared) == "Prepared(int8 128x24, LearnedStep, float32)"
    assert repr(prepare({"w": X}, {"w": W8A8})["w"]) == "Prepared(int8 5x128, float32)"
    assert (prepared.shape, prepared.ndim, prepared.size) == ((K, N), 2, K * N)
    placeholder = jax.tree.map(lambda _: None, prepared)
    assert repr(placeholder) == "Prepared(int8, weight=None)"


def test_a_report_tells_of_a_prepared_tree_what_it_tells_of_the_converted_one():
    params = weights({"w": W8A8})
    prepared = learn(params, {"w": W8A8})
    for before in (params, None):
        assert jq.tree.report(before, prepared) == jq.tree.report(before, convert(prepared))


def test_trees_that_do_not_fit_are_refused():
    params, rules = weights({"a": W8A8, "b": W8A8}), {"a": W8A8}
    learned, prepared = init_learned(params, rules), prepare(params, rules)
    cases = [
        (lambda: convert(params), "convert takes a tree from prepare; got one .* with paths a, b"),
        (lambda: convert(convert(prepared)), "convert takes a tree from prepare"),
        (lambda: convert({}), "with paths none"),
        (
            lambda: prepare(prepared, rules),
            r"a: prepared for training already \(Prepared\(int8 128x24, float32\)\); training",
        ),
        (lambda: jq.tree.quantize(prepared, W8A8), "a: prepared for training already"),
        (lambda: prepare(convert(prepared), rules), "a: quantized already"),
        (lambda: prepare(params, {"c": W8A8}), "rule 'c' matches no leaf"),
        (
            lambda: prepare(params, {"b": W8A8}, learned),
            r"learned must be for the leaves that the rules select, \['b'\]; got \['a'\]",
        ),
        (
            lambda: prepare(params, {"a": GROUPED}, learned),
            r"What is learned for a does not suit it: A LearnedStep is for symmetric=True; got",
        ),
        (
            lambda: prepare(params, {"a": SCHEMES["W4A16"]}, {"a": LearnedStep(jnp.ones((2, 1)))}),
            r"learned for a does not suit it: .* shape of the scales, \(1, 24\); got \(2, 1\)",
        ),
        (
            lambda: prepare(params, rules, {"a": jnp.ones((1, N))}),
            "learned for a does not suit it: learned must be a LearnedStep, a LearnedRange",
        ),
    ]
    for call, text in cases:
        with pytest.raises(ValueError, match=text):
            call()


def test_a_prepared_weight_is_no_container():
    with pytest.raises(TypeError, match="abstract"):
        jq.core.Deferred()  # pyright: ignore[reportAbstractUsage] (so meant)
    assert isinstance(prepare({"w": X}, {"w": W8A8})["w"], Prepared)
