"""Haiku models, unchanged: transformed functions, and networks that come with Haiku."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxquant as jq
from jaxquant import training

from . import checks

hk = pytest.importorskip("haiku", reason="pip install -e '.[frameworks]'")

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
X = checks.normal(32, 64)
WANTED = jnp.sin(X[:, :4])


def transformer(tokens):
    def layer(x):
        normed = hk.LayerNorm(-1, True, True)(x)
        attention = hk.MultiHeadAttention(4, 16, w_init=hk.initializers.VarianceScaling())
        x = x + attention(normed, normed, normed)
        return x + hk.nets.MLP([128, 64], activation=jax.nn.gelu)(hk.LayerNorm(-1, True, True)(x))

    embed = hk.Embed(128, 64)
    x = hk.layer_stack(3)(hk.remat(layer))(embed(tokens))
    return x @ embed.embeddings.T


def convolutions(x):
    x = jax.nn.relu(hk.Conv2D(64, 3)(x))
    x = jax.nn.relu(hk.Conv2D(64, 3, feature_group_count=2)(x))
    x = hk.DepthwiseConv2D(1, 3)(x)
    return hk.Linear(10)(hk.Flatten()(hk.Conv2DTranspose(32, 3, stride=2)(x)))


def test_a_transformer_of_stacked_layers_under_remat():
    model, tokens = hk.without_apply_rng(hk.transform(transformer)), checks.tokens()
    params = model.init(KEY, tokens)
    checks.check_schemes(model.apply, params, tokens, matrices=7)


def test_convolutions():
    model, x = hk.without_apply_rng(hk.transform(convolutions)), checks.normal(2, 6, 6, 32)
    params = model.init(KEY, x)
    small = ["depthwise_conv2_d/w"]
    checks.check_schemes(model.apply, params, x, matrices=5, no_groups=small)


def test_mobilenet():
    def network(x, is_training):
        return hk.nets.MobileNetV1((1, 2), (32, 64), 10)(x, is_training)

    model, x = hk.transform_with_state(network), checks.normal(1, 16, 16, 3)
    params, state = model.init(KEY, x, is_training=True)

    def apply(params, x):
        return model.apply(params, state, None, x, is_training=False)[0]

    # No group of 32 lies within kernels of three channels, or of one.
    shapes = jq.uses(apply, params, x).shapes
    small = [p for p, shape in shapes.items() if len(shape) == 4 and shape[2] in (1, 3)]
    checks.check_schemes(apply, params, x, matrices=6, no_groups=small)


def regression(x):
    return hk.nets.MLP([128, 4], activation=jax.nn.gelu)(x)


MODEL = hk.without_apply_rng(hk.transform(regression))
PARAMS = MODEL.init(KEY, X)
lifted = jq.lift(MODEL.apply)


def loss(params):
    return jnp.mean((lifted(params, X) - WANTED) ** 2)


def fit(loss, params, rate, steps):
    optimizer = optax.adam(rate)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def test_qat_by_optax():
    rules = jq.uses(MODEL.apply, PARAMS, X).rules(checks.INT2)
    prepared = fit(loss, training.prepare(PARAMS, rules), 3e-3, steps=30)
    converted = training.convert(prepared)
    assert len(checks.quantized_paths(converted)) == 2
    assert loss(converted) == pytest.approx(float(loss(prepared)), rel=1e-5)
    assert loss(converted) < 0.5 * loss(jq.tree.quantize(PARAMS, rules))


def test_optimizer_states():
    def train(optimizer, wrapper, steps):
        params, state = PARAMS, optimizer.init(PARAMS)

        @wrapper
        def step(params, state):
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
        return loss(params), state

    checks.check_states(train, jax.jit)


def test_qlora_by_optax():
    rules = jq.uses(MODEL.apply, PARAMS, X).rules(checks.NF4)
    adapted = training.lora_init(PARAMS, rules, rank=4, key=KEY)
    trained, frozen = training.partition(adapted)
    trained = fit(lambda t: loss(training.combine(t, frozen)), trained, 1e-2, steps=20)
    after = training.combine(trained, frozen)
    assert loss(after) < 0.5 * loss(adapted)
    assert len(checks.quantized_paths(training.merge(after))) == 2


def test_calibration():
    rules = jq.uses(MODEL.apply, PARAMS, X).rules(checks.STATIC)
    calibrated = training.calibrate(lifted, PARAMS, [X, 0.5 * X], rules)
    scale = calibrated["mlp/~/linear_0"]["w"].inputs.scale
    assert scale == pytest.approx(float(jnp.abs(X).max()) / 127, rel=0.05)
    assert checks.distance(lifted(calibrated, X), MODEL.apply(PARAMS, X)) < 0.03
