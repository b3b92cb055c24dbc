"""Stock Keras models and backbones of KerasHub, unchanged, through their stateless calls."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxquant as jq
from jaxquant import training

from . import checks
from .kerashub_cases import DECODER, ENCODER, token_inputs

keras = pytest.importorskip("keras", reason="pip install -e '.[frameworks]'")
hub = pytest.importorskip("keras_hub", reason="pip install --no-deps keras-hub")

pytestmark = pytest.mark.usefixtures("quick_compilation")
# By name: the arguments, how many matrices, and the tables that are only looked up.
BACKBONES = {
    "Gemma": ({**DECODER, "head_dim": 16}, 8, ["token_embedding/embeddings"]),
    "Llama": (DECODER, 8, ["token_embedding/embeddings"]),
    "Bert": (
        ENCODER,
        9,
        ["token_embedding/embeddings", "segment_embedding/embeddings"],
    ),
    "GPT2": (ENCODER, 7, ["token_embedding/embeddings"]),
    # All experts are chosen: a small error of the router cannot select other ones.
    "Mixtral": ({**DECODER, "num_experts": 4, "top_k": 4}, 9, ["token_embedding/embeddings"]),
}


def functional(model):
    """A pure function of a model's parameters by path, and the parameters."""
    paths = [v.path for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]

    def apply(params, inputs):
        return model.stateless_call([params[p] for p in paths], state, inputs, training=False)[0]

    return apply, {v.path: v.value for v in model.trainable_variables}


def randomized(params):
    """Biases and norms get random values, which tell mistakes apart."""
    keys = jax.random.split(jax.random.key(0), len(params))
    return {
        name: x + 0.1 * jax.random.normal(key, x.shape)
        for key, (name, x) in zip(keys, params.items(), strict=True)
    }


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone(name):
    arguments, matrices, looked_up = BACKBONES[name]
    backbone = getattr(hub.models, f"{name}Backbone")(**arguments)
    apply, params = functional(backbone)
    inputs = token_inputs(name)
    checks.check_schemes(apply, randomized(params), inputs, matrices=matrices, looked_up=looked_up)


def test_stock_layers():
    keras.utils.set_random_seed(0)
    layers, inputs = keras.layers, keras.Input((8, 64))
    x = layers.MultiHeadAttention(4, 16)(inputs, inputs)
    x = layers.GroupQueryAttention(16, 4, 2)(x, x)
    x = layers.LayerNormalization()(x + inputs)
    x = layers.EinsumDense("btd,de->bte", (8, 128), bias_axes="e", activation="relu")(x)
    x = layers.Conv1D(64, 3, padding="same")(x)
    x = layers.SeparableConv1D(64, 3)(x)
    x = layers.GRU(32)(x)
    model = keras.Model(inputs, layers.Dense(10)(x))
    apply, params = functional(model)
    checks.check_schemes(
        apply,
        randomized(params),
        checks.normal(2, 8, 64),
        matrices=15,
        no_groups=[p for p in params if "depthwise" in p],
        least_bound=0.6,  # Each of its 15 matrices in 4 bits adds about 0.1.
    )


def test_a_network_of_keras_applications():
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, classes=10)
    apply, params = functional(model)
    x = checks.normal(1, 32, 32, 3)
    quantized = jq.tree.quantize(params, jq.uses(apply, params, x).rules(jq.W8A16))
    assert len(checks.quantized_paths(quantized)) == 53
    lifted = jq.lift(apply, strict=True)
    assert {row.parameter for row in jq.explain(lifted, quantized, x)} == checks.quantized_paths(
        quantized
    )


X = checks.normal(32, 64)
WANTED = jnp.sin(X[:, :4])


def regression():
    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(128, "gelu"), keras.layers.Dense(4)]
    )
    return functional(model)


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


def test_qat_qlora_and_calibration():
    apply, params = regression()
    uses, lifted = jq.uses(apply, params, X), jq.lift(apply)

    def loss(params):
        return jnp.mean((lifted(params, X) - WANTED) ** 2)

    rules = uses.rules(checks.INT2)
    prepared = fit(loss, training.prepare(params, rules), 3e-3, steps=30)
    converted = training.convert(prepared)
    assert len(checks.quantized_paths(converted)) == 2
    assert loss(converted) == pytest.approx(float(loss(prepared)), rel=1e-5)
    assert loss(converted) < 0.5 * loss(jq.tree.quantize(params, rules))

    adapted = training.lora_init(params, uses.rules(checks.NF4), rank=4, key=jax.random.key(0))
    trained, frozen = training.partition(adapted)
    trained = fit(lambda t: loss(training.combine(t, frozen)), trained, 1e-2, steps=20)
    assert loss(training.combine(trained, frozen)) < 0.5 * loss(adapted)

    calibrated = training.calibrate(lifted, params, [X, 0.5 * X], uses.rules(checks.STATIC))
    assert checks.distance(lifted(calibrated, X), apply(params, X)) < 0.03
