"""Flax NNX models, unchanged: modules and their states are pytrees."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxquant as jq
from jaxquant import training

from . import checks

nnx = pytest.importorskip("flax.nnx", reason="pip install -e '.[frameworks]'")

pytestmark = pytest.mark.usefixtures("quick_compilation")


def call(model, *args):
    return model(*args)


class Attention(nnx.Module):
    """Grouped queries, by einsum layers with kernels of three axes."""

    def __init__(self, rngs):
        self.query = nnx.Einsum("btd,dnh->btnh", (64, 4, 16), rngs=rngs)
        self.key = nnx.Einsum("bsd,dkh->bskh", (64, 2, 16), rngs=rngs)
        self.value = nnx.Einsum("bsd,dkh->bskh", (64, 2, 16), rngs=rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (4, 16, 64), rngs=rngs)
        self.query_norm = nnx.RMSNorm(16, rngs=rngs)

    def __call__(self, x):
        mixed = jax.nn.dot_product_attention(
            self.query_norm(self.query(x)), self.key(x), self.value(x), is_causal=True
        )
        return self.out(mixed)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.RMSNorm(64, rngs=rngs) for _ in range(2)])
        self.attention = Attention(rngs)
        self.gate = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(128, 64, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        hidden = self.norms[1](x)
        return x + self.down(nnx.silu(self.gate(hidden)) * self.up(hidden))


class Decoder(nnx.Module):
    """Gemma's shape: a tied embedding, grouped queries and a gated feed-forward layer."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(128, 64, rngs=rngs)
        self.layers = nnx.List([Layer(rngs)])
        self.norm = nnx.RMSNorm(64, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed.attend(self.norm(x))


class Stacked(nnx.Module):
    """Layers made by `nnx.vmap`, run by `nnx.scan` with `nnx.remat`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Layer(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


class Images(nnx.Module):
    """Residual blocks, depthwise convolutions and a patch embedding."""

    def __init__(self, rngs):
        self.patches = nnx.Conv(4, 32, (2, 4), strides=(2, 4), rngs=rngs)
        self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.wide = nnx.Conv(32, 32, (3, 3), rngs=rngs)
        self.deep = nnx.Conv(32, 32, (3, 3), feature_group_count=32, rngs=rngs)
        self.point = nnx.Conv(32, 64, (1, 1), rngs=rngs)
        self.up = nnx.ConvTranspose(64, 32, (2, 2), strides=(2, 2), rngs=rngs)
        self.head = nnx.LinearGeneral((8, 8, 32), 10, axis=(1, 2, 3), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.patches(x)))
        x = nnx.relu(self.wide(x)) + x
        return self.head(self.up(self.point(nnx.relu(self.deep(x)))))


def test_a_decoder():
    graph, params = nnx.split(Decoder(nnx.Rngs(0)))
    apply = lambda params, tokens: nnx.merge(graph, params)(tokens)  # noqa: E731
    checks.check_schemes(apply, params, checks.tokens(), matrices=8)


def test_layers_under_scan_and_remat():
    model = Stacked(nnx.Rngs(0))
    checks.check_schemes(call, model, checks.normal(2, 8, 64), matrices=7)


def test_convolutions():
    model = Images(nnx.Rngs(0))
    checks.check_schemes(
        call, model, checks.normal(2, 8, 16, 4), matrices=6, no_groups=["deep/kernel/value"]
    )


def test_a_model_in_bfloat16():
    class Model(nnx.Module):
        def __init__(self, rngs):
            half = {"dtype": jnp.bfloat16, "rngs": rngs}
            self.attention = nnx.MultiHeadAttention(4, 64, decode=False, **half)
            self.out = nnx.Linear(64, 32, param_dtype=jnp.bfloat16, **half)

        def __call__(self, x):
            return self.out(self.attention(x))

    model, x = Model(nnx.Rngs(0)), checks.normal(2, 8, 64)
    quantized = jq.tree.quantize(model, jq.uses(call, model, x).rules(jq.W8A8))
    found = jax.jit(jq.lift(call, strict=True))(quantized, x)
    assert found.dtype == jnp.bfloat16
    assert 0 < checks.distance(found, model(x)) < 0.04


def test_nnx_jit_and_state_that_a_model_updates():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(64, 64, rngs=rngs)
            self.norm = nnx.BatchNorm(64, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.linear(x))

    model, x = Model(nnx.Rngs(0)), checks.normal(16, 64)
    quantized = jq.tree.quantize(model, jq.uses(call, model, x).rules(jq.W8A8))

    def apply(model, x):
        out = model(x)
        return out, nnx.state(model)

    found, state = jax.jit(jq.lift(apply))(quantized, x)
    expected = call(model, x)
    assert 0 < checks.distance(found, expected) < 0.02
    # What the model did not change is returned as it was.
    assert isinstance(state["linear"]["kernel"].get_value(), jq.QTensor)
    mean = state["norm"]["mean"].get_value()
    assert checks.distance(mean, model.norm.mean.get_value()) < 0.02
    assert checks.distance(nnx.jit(jq.lift(call))(quantized, x), expected) < 0.02


X = checks.normal(32, 64)
WANTED = jnp.sin(X[:, :4])
lifted = jq.lift(call)


class Regression(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def loss(model):
    return jnp.mean((lifted(model, X) - WANTED) ** 2)


def test_qat_by_nnx_optimizer():
    model = Regression(nnx.Rngs(0))
    rules = jq.uses(call, model, X).rules(checks.INT2)
    before = loss(jq.tree.quantize(model, rules))
    prepared = training.prepare(model, rules)
    # nnx.Optimizer keeps one array for each parameter, and a prepared one may consist of several.
    optimizer = nnx.Optimizer(prepared, optax.flatten(optax.adam(3e-3)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        gradients = nnx.grad(loss)(model)
        optimizer.update(model, gradients)

    for _ in range(30):
        step(prepared, optimizer)
    converted = training.convert(prepared)
    assert checks.quantized_paths(converted) == {"up/kernel/value", "down/kernel/value"}
    assert loss(converted) == pytest.approx(float(loss(prepared)), rel=1e-5)
    assert loss(converted) < 0.5 * before


def test_optimizer_states_by_nnx_optimizer():
    def train(transformation, wrapper, steps):
        model = Regression(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

        @wrapper
        def step(model, optimizer):
            optimizer.update(model, nnx.grad(loss)(model))

        for _ in range(steps):
            step(model, optimizer)
        return loss(model), nnx.state(optimizer)

    checks.check_states(train, nnx.jit)


def test_optimizer_states_of_variables():
    """Variables keep their metadata around codes, and a state of them is updated as it is."""
    params = nnx.state(Regression(nnx.Rngs(0)), nnx.Param)
    params["up"]["kernel"] = params["up"]["kernel"].replace(note="a")
    optimizer = training.quantized_state(optax.adam(1e-3))
    state: Any = optimizer.init(params)
    kernel = state.inner[0].mu["up"]["kernel"]
    assert kernel.q.codes.get_metadata("note") == "a"
    update = jax.jit(optimizer.update)
    updates, after = update(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert (
        checks.distance(
            after.inner[0].mu["up"]["kernel"].dequantize(), 0.1 * params["up"]["kernel"].get_value()
        )
        < 0.05
    )


def test_qlora():
    model = Regression(nnx.Rngs(0))
    rules = jq.uses(call, model, X).rules(checks.NF4)
    adapted = training.lora_init(model, rules, rank=4, key=jax.random.key(0))
    before = loss(adapted)
    trained, frozen = training.partition(adapted)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(trained)

    @jax.jit
    def step(trained, frozen, state):
        gradients = jax.grad(lambda t: loss(training.combine(t, frozen)))(trained)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(trained, updates), state

    for _ in range(20):
        trained, state = step(trained, frozen, state)
    adapted = training.combine(trained, frozen)
    assert loss(adapted) < 0.5 * before
    assert len(checks.quantized_paths(training.merge(adapted))) == 2


def test_calibration():
    model = Regression(nnx.Rngs(0))
    rules = jq.uses(call, model, X).rules(checks.STATIC)
    calibrated = training.calibrate(lifted, model, [X, 0.5 * X], rules)
    scale = calibrated.up.kernel.get_value().inputs.scale
    assert scale == pytest.approx(float(jnp.abs(X).max()) / 127, rel=0.05)
    assert checks.distance(lifted(calibrated, X), model(X)) < 0.03
