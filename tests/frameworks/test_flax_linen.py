"""Flax Linen models, unchanged."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxquant as jq
from jaxquant import training

from . import checks

nn = pytest.importorskip("flax.linen", reason="pip install -e '.[frameworks]'")
TrainState = pytest.importorskip("flax.training.train_state").TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Block(nn.Module):
    """A layer of a transformer, with the signature of a step of `nn.scan`."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(128)(nn.LayerNorm()(x)))
        return x + nn.Dense(64)(hidden), None


class Decoder(nn.Module):
    """Layers stacked along an axis of their parameters, and a tied embedding."""

    axis: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(128, 64)
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers()(embed(tokens), None)
        return embed.attend(nn.LayerNorm()(x))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_decoder_with_stacked_layers_under_remat(axis):
    model, tokens = Decoder(axis), checks.tokens()
    params = model.init(jax.random.key(0), tokens)
    checks.check_schemes(model.apply, params, tokens, matrices=7)


def test_recurrent_cells():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.GRUCell(64))(x)
            return nn.Dense(8)(nn.RNN(nn.LSTMCell(64))(x))

    model, x = Model(), checks.normal(2, 5, 32)
    params = model.init(jax.random.key(0), x)
    checks.check_schemes(model.apply, params, x, matrices=15)


# By name of the class: its configuration, how many matrices, and the tables only looked up.
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 128,
    "max_position_embeddings": 32,
}
GPT2_SIZES = {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 128, "n_positions": 32}
TRANSFORMERS = {
    "FlaxGPT2LMHeadModel": ("GPT2Config", GPT2_SIZES, 6, ["transformer/wpe/embedding"]),
    "FlaxLlamaForCausalLM": ("LlamaConfig", SIZES, 9, ["model/embed_tokens/embedding"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_decoder_of_transformers(name):
    transformers = pytest.importorskip("transformers", reason="pip install 'transformers<5'")
    config, sizes, matrices, looked_up = TRANSFORMERS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes), (1, 8), seed=0)

    def apply(params, tokens):
        return model(tokens, params=params)[0]

    checks.check_schemes(
        apply, model.params, checks.tokens(), matrices=matrices, looked_up=looked_up
    )


X = checks.normal(32, 64)
WANTED = jnp.sin(X[:, :4])


class Regression(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.gelu(nn.Dense(128)(x)))


MODEL = Regression()
lifted = jq.lift(MODEL.apply)


def loss(params):
    return jnp.mean((lifted({"params": params}, X) - WANTED) ** 2)


def fit(loss, params, rate, steps):
    """Flax's train state, which holds the parameters and the optimizer's state."""
    state = TrainState.create(apply_fn=lifted, params=params, tx=optax.adam(rate))

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(steps):
        state = step(state)
    return state.params


def parameters_and_uses():
    params = MODEL.init(jax.random.key(0), X)["params"]
    return params, jq.uses(lambda params, x: MODEL.apply({"params": params}, x), params, X)


def test_qat_by_a_train_state():
    params, uses = parameters_and_uses()
    rules = uses.rules(checks.INT2)
    prepared = fit(loss, training.prepare(params, rules), 3e-3, steps=30)
    converted = training.convert(prepared)
    assert len(checks.quantized_paths(converted)) == 2
    assert loss(converted) == pytest.approx(float(loss(prepared)), rel=1e-5)
    assert loss(converted) < 0.5 * loss(jq.tree.quantize(params, rules))


def test_optimizer_states_by_a_train_state():
    def train(optimizer, wrapper, steps):
        params, _ = parameters_and_uses()
        state = TrainState.create(apply_fn=lifted, params=params, tx=optimizer)

        @wrapper
        def step(state):
            return state.apply_gradients(grads=jax.grad(loss)(state.params))

        for _ in range(steps):
            state = step(state)
        return loss(state.params), state.opt_state

    checks.check_states(train, jax.jit)


def test_optimizer_states_of_partitioned_parameters():
    """Boxes with names of mesh axes stay around the codes, and name their axes."""
    kernel = nn.Partitioned(jnp.ones((64, 128)), names=("model", None))
    optimizer = training.quantized_state(optax.adam(1e-3))
    params = {"kernel": kernel}
    updates: Any
    updates, state = optimizer.update(params, optimizer.init(params))
    codes = nn.get_partition_spec(state).inner[0].mu["kernel"].q.codes
    assert codes == jax.P("model", None)
    assert isinstance(updates["kernel"], nn.Partitioned)


def test_qlora_by_a_train_state():
    params, uses = parameters_and_uses()
    rules = uses.rules(checks.NF4)
    adapted = training.lora_init(params, rules, rank=4, key=jax.random.key(0))
    trained, frozen = training.partition(adapted)
    trained = fit(lambda t: loss(training.combine(t, frozen)), trained, 1e-2, steps=20)
    after = training.combine(trained, frozen)
    assert loss(after) < 0.5 * loss(adapted)
    assert len(checks.quantized_paths(training.merge(after))) == 2


def test_calibration():
    params, uses = parameters_and_uses()
    batches = [X, 0.5 * X]
    calibrated = training.calibrate(
        jq.lift(lambda params, x: MODEL.apply({"params": params}, x)),
        params,
        batches,
        uses.rules(checks.STATIC),
    )
    scale = calibrated["Dense_0"]["kernel"].inputs.scale
    assert scale == pytest.approx(float(jnp.abs(X).max()) / 127, rel=0.05)
    exact = MODEL.apply({"params": params}, X)
    assert checks.distance(lifted({"params": calibrated}, X), exact) < 0.03
