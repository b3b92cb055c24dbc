"""The driver against a loop written out, and against the same method on all layers at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import demo
from jaxquant.methods import GPTQ, SINQ, CrossMoment, Importance, Rotation
from jaxquant.tuning import sequential

from ..demo import llamas

CONFIG = jq.ArrayConfig(format=jq.INT4, group_size=8)
RULES = [jq.Rule("*", CONFIG, axis=0)]
LAYERS, WIDTH, HIDDEN = 3, 16, 24


def block(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def layers(seed=0):
    random = np.random.default_rng(seed)
    shapes = {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)}
    return {
        name: jnp.asarray(random.normal(size=shape) / np.sqrt(shape[1]), jnp.float32)
        for name, shape in shapes.items()
    }


def batches(count=2, seed=0):
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(WIDTH, WIDTH))
    found = [random.normal(size=(100, WIDTH)) @ mixing for _ in range(count)]
    return [jnp.asarray(x, jnp.float32) for x in found]


def sliced(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


run = jax.jit(jq.lift(block))


def error(quantized, xs, params=None):
    """The relative squared error of the outputs of all layers."""
    params = layers() if params is None else params
    wrong = whole = 0.0
    for x in xs:
        found = exact = x
        for i in range(LAYERS):
            exact, found = run(sliced(params, i), exact), run(sliced(quantized, i), found)
        wrong += float(jnp.sum(jnp.square(found - exact)))
        whole += float(jnp.sum(jnp.square(exact)))
    return wrong / whole


@functools.cache
def by_qronos():
    return sequential(block, layers(), batches(), RULES, method=GPTQ(repair=1))


@pytest.mark.slow
def test_each_layer_gets_the_statistics_of_both_models():
    """One weight per layer, so that the statistics are those of the inputs of the layers."""

    def narrow(params, x):
        return jnp.tanh(x @ params["kernel"])

    random = np.random.default_rng(0)
    stack = random.normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32) / 4
    rules = [jq.Rule("kernel", CONFIG, axis=0)]
    xs = batches()
    found = sequential(narrow, {"kernel": jnp.asarray(stack)}, xs, rules, method=GPTQ(repair=1))

    exact = quantized = np.concatenate([np.asarray(x, np.float64) for x in xs])
    for i, kernel in enumerate(stack):
        means = [exact.T @ quantized, quantized.T @ quantized]
        statistic = CrossMoment(jnp.asarray(np.stack(means), jnp.float32), jnp.float32(len(exact)))
        expected, _ = GPTQ(repair=1)(
            jnp.asarray(kernel).T, {CrossMoment: statistic.finish()}, CONFIG, 1
        )
        q = sliced(found, i)["kernel"]
        weight = np.asarray(q.dequantize(), np.float64)
        differs = np.abs(weight - np.asarray(expected.dequantize()).T) > 1e-4
        assert differs.mean() < 0.02
        exact = np.tanh(exact @ kernel)
        quantized = np.tanh(quantized @ weight)


def test_parameters_see_what_those_before_them_in_their_layer_leave():
    """Of query and key, which have the same activations, and of out, which comes after both."""

    def attend(params, x):
        return x + jnp.tanh(x @ params["query"]) * (x @ params["key"]) @ params["a_out"]

    random = np.random.default_rng(0)
    names = ("query", "key", "a_out")  # Not in the order of the tree.
    one = {n: random.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 4 for n in names}
    x = np.asarray(batches(1)[0])
    found = sequential(attend, [one], [jnp.asarray(x)], RULES, method=GPTQ(repair=1))[0]

    def expected(name, exact, quantized):
        rows = [CrossMoment.init(WIDTH).update(jnp.stack([exact, quantized]), jnp.ones(len(x)))]
        q, _ = GPTQ(repair=1)(jnp.asarray(one[name]).T, {CrossMoment: rows[0].finish()}, CONFIG, 1)
        return np.asarray(q.dequantize()).T

    weights = {name: np.asarray(q.dequantize()) for name, q in found.items()}
    for name in ("query", "key"):
        assert np.mean(np.abs(weights[name] - expected(name, x, x)) > 1e-4) < 0.02
    hidden, seen = (np.tanh(x @ p["query"]) * (x @ p["key"]) for p in (one, weights))
    assert np.mean(np.abs(weights["a_out"] - expected("a_out", hidden, seen)) > 1e-4) < 0.02
    assert np.mean(np.abs(weights["a_out"] - expected("a_out", hidden, hidden)) > 1e-4) > 0.1


@pytest.mark.slow
def test_errors_are_below_those_of_all_layers_at_once():
    xs, unseen = batches(), batches(seed=5)
    rules = [jq.Rule("*", CONFIG, axis=1)]

    def apply(params, x):
        return jax.lax.scan(lambda x, p: (block(p, x), None), x, params)[0]

    statistics = jq.collect(apply, layers(), xs, rules, GPTQ())
    at_once = jq.tree.quantize(layers(), rules, method=GPTQ(), statistics=statistics)
    nearest = jq.tree.quantize(layers(), rules)
    errors = [error(q, unseen) for q in (by_qronos(), at_once, nearest)]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.slow
def test_a_list_gives_the_same_as_a_stack():
    parts = [sliced(layers(), i) for i in range(LAYERS)]
    found = sequential(block, parts, batches(), RULES, method=GPTQ(repair=1))
    assert isinstance(found, list)
    for i, part in enumerate(found):
        for name, q in part.items():
            expected = sliced(by_qronos(), i)[name]
            np.testing.assert_array_equal(q.dequantize(), expected.dequantize())


@pytest.mark.slow
def test_layers_of_2_bits_are_stacked():
    """XLA for CPUs ends the process when it stacks so many arrays of 2 bits."""
    stack = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(9, 64, 64)), jnp.float32)}
    rule = jq.Rule("kernel", jq.ArrayConfig(format=jq.INT2, symmetric=False), axis=0)
    found = sequential(lambda p, x: jnp.tanh(x @ p["kernel"]), stack, [jnp.ones((2, 64))], rule)
    expected = jq.tree.quantize(stack, jq.Rule("kernel", rule.scheme, axis=1))
    np.testing.assert_array_equal(
        found["kernel"].codes.astype(jnp.int8), expected["kernel"].codes.astype(jnp.int8)
    )


def test_layers_share_one_program_and_progress_names_their_errors():
    traced, shown = [], []

    def counted(params, x):
        traced.append(1)
        return block(params, x)

    def progress(*args):
        shown.append(args)

    many = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), layers())
    options = {"method": GPTQ(repair=1), "iterations": 3}
    sequential(counted, many, batches(), RULES, progress=progress, **options)
    in_six = len(traced)
    traced.clear()
    sequential(counted, sliced(many, slice(0, 2)), batches(), RULES, **options)
    assert in_six == len(traced)
    assert [args[:2] for args in shown] == [(i, 2 * LAYERS) for i in range(1, 2 * LAYERS + 1)]
    assert all(f"layer {i}, error " in args[2] for i, args in enumerate(shown))


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("method", [None, Importance(), [SINQ()], GPTQ(repair=1)])
def test_training_lowers_the_error(method):
    xs = batches(1)
    one = sliced(layers(), slice(0, 1))
    plain = sequential(block, one, xs, RULES, method=method)
    trained = sequential(block, one, xs, RULES, method=method, iterations=40)

    def first_error(quantized):
        wrong = run(sliced(quantized, 0), xs[0]) - run(sliced(one, 0), xs[0])
        return float(jnp.sum(jnp.square(wrong)))

    assert jax.tree.structure(plain) == jax.tree.structure(trained)
    # Error feedback and searched scales leave little to gain.
    most = 1 if isinstance(method, GPTQ | Importance) else 0.9
    assert first_error(trained) <= most * first_error(plain)


@pytest.mark.slow
def test_training_sees_quantized_activations():
    xs, scheme = batches(1), jq.Scheme(CONFIG, jq.ArrayConfig(format=jq.INT4))
    rules = [jq.Rule("*", scheme, axis=0)]
    errors = []
    for iterations in (0, 40):
        found = sequential(block, layers(), xs, rules, iterations=iterations)
        assert found["up"].inputs.config == scheme.inputs
        errors.append(error(found, xs))
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_training_never_ends_above_its_start():
    """Weights that are codes already: every step makes them worse."""
    config = jq.ArrayConfig(format=jq.INT4)
    rules = [jq.Rule("*", config, axis=0)]
    exact = jq.tree.dequantize(jq.tree.quantize(sliced(layers(), 0), rules))
    found = sequential(block, [exact], batches(), rules, iterations=5)
    for name, q in found[0].items():
        np.testing.assert_allclose(q.dequantize(), exact[name], rtol=1e-5)


@pytest.mark.slow
def test_layers_of_several_kinds_and_trees_of_activations():
    def two(params, x):
        out = jnp.tanh(x["a"] @ params["kernel"])
        return {"a": out, "b": x["b"] + out[:, :1] * params.get("scale", 1.0)}

    random = np.random.default_rng(0)
    kernels = [jnp.asarray(random.normal(size=(WIDTH, WIDTH)), jnp.float32) for _ in range(2)]
    parts = [{"kernel": kernels[0]}, {"kernel": kernels[1], "scale": jnp.float32(2)}]
    rules = [jq.Rule("kernel", CONFIG, axis=0)]
    x = {"a": batches()[0], "b": jnp.zeros((100, 1))}
    found = sequential(two, parts, x, rules, method=GPTQ(repair=1), iterations=3)
    assert [type(part["kernel"]).__name__ for part in found] == ["QTensor"] * 2
    assert found[1]["scale"] == 2


@pytest.mark.slow
def test_the_layers_of_a_llama(tmp_path):
    model = demo.load_llama(llamas.write_folder(tmp_path, llamas.random_arrays()))
    (stack,) = model.params["layers"]
    frequencies = model.params["frequencies"]

    def layer(weights, x):
        return demo.decoder_layer(weights, model.config, frequencies, x)

    tokens = jnp.asarray(np.random.default_rng(0).integers(2, len(llamas.TOKENS), (24, 12)))
    x = jq.take(model.params["embedding"], tokens, axis=0)
    config = jq.ArrayConfig(format=jq.INT4, group_size=16)
    errors, rules = {}, [jq.Rule("*/kernel", config, axis=1)]
    for name, options in {
        "nearest": {},
        "qronos": {"method": GPTQ(repair=1)},
        "trained": {"method": GPTQ(repair=1), "iterations": 20},
    }.items():
        shown = []
        quantized = sequential(
            layer, stack, [x], rules, progress=lambda *a, s=shown: s.append(a[2]), **options
        )
        errors[name] = float(shown[-1].split()[-1])
    assert errors["trained"] < errors["qronos"] < errors["nearest"]
    # The whole model runs its result.
    params = {**model.params, "layers": [quantized]}
    cache = demo.init_cache(params, model.config, len(tokens), 12, jnp.float32)
    found, _ = demo.forward(params, model.config, tokens, cache)
    assert np.isfinite(found).all()


def test_bad_arguments_raise():
    x = batches()[0]
    with pytest.raises(ValueError, match=r"sequential needs layers, .*got 0 layers, 1 batches"):
        sequential(block, [], x, RULES)
    with pytest.raises(ValueError, match="got 3 layers, 0 batches and iterations=0"):
        sequential(block, layers(), [], RULES)
    with pytest.raises(ValueError, match="got 3 layers, 1 batches and iterations=-1"):
        sequential(block, layers(), x, RULES, iterations=-1)
    with pytest.raises(ValueError, match=r"same leading length; got lengths \['2', '3'\]"):
        sequential(block, {"a": jnp.ones((2, 4)), "b": jnp.ones((3, 4))}, x, RULES)
    with pytest.raises(ValueError, match=r"shapes of its input, \(100, 16\); got \(100, 4\)"):
        sequential(lambda p, x: x[:, :4] + 0 * p["up"][0, 0], layers(), x, RULES)
    with pytest.raises(ValueError, match="Rounding of rotated weights cannot be trained; got QT"):
        sequential(block, layers(), x, RULES, method=[Rotation()], iterations=1)
