"""Equinox models, unchanged: whole modules are arguments, with functions among their leaves."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxquant as jq
from jaxquant import training

from . import checks

eqx = pytest.importorskip("equinox", reason="pip install -e '.[frameworks]'")

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(0)
X = checks.normal(16, 64)


def batched(model, x):
    return jax.vmap(model)(x)


def split(model, call=batched):
    """The arrays of a module, and a function of them."""
    arrays, others = eqx.partition(model, eqx.is_array)
    return lambda arrays, *args: call(eqx.combine(arrays, others), *args), arrays


def test_an_mlp():
    apply, arrays = split(eqx.nn.MLP(64, 10, 128, 2, key=KEY))
    checks.check_schemes(apply, arrays, X, matrices=3)


def test_attention():
    attention = eqx.nn.MultiheadAttention(4, 64, key=KEY)
    apply, arrays = split(attention, lambda model, x: jax.vmap(model)(x, x, x))
    checks.check_schemes(apply, arrays, checks.normal(2, 8, 64), matrices=4)


def test_convolutions():
    keys = jax.random.split(KEY, 4)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(32, 64, 3, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(64, 64, 3, padding=1, groups=2, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.ConvTranspose2d(64, 32, 3, stride=2, key=keys[2]),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(32 * 9 * 9, 10, key=keys[3]),
        ]
    )
    apply, arrays = split(model)
    checks.check_schemes(apply, arrays, checks.normal(2, 32, 6, 6), matrices=4)


def test_a_shared_embedding():
    keys = jax.random.split(KEY)
    embed, out = eqx.nn.Embedding(128, 64, key=keys[0]), eqx.nn.Linear(64, 128, key=keys[1])
    model = eqx.nn.Shared((embed, out), lambda pair: pair[1].weight, lambda pair: pair[0].weight)

    def call(model, tokens):
        embed, out = model()
        return jax.vmap(lambda token: out(embed(token)))(tokens)

    apply, arrays = split(model, call)
    checks.check_schemes(apply, arrays, checks.tokens(shape=(16,)), matrices=1)


def test_layers_stacked_by_filter_vmap_under_scan_and_checkpoint():
    def make(key):
        return eqx.nn.MLP(64, 64, 128, 1, key=key)

    def call(layers, x):
        arrays, others = eqx.partition(layers, eqx.is_array)

        @eqx.filter_checkpoint
        def layer(x, arrays):
            return x + jax.vmap(eqx.combine(arrays, others))(x), None

        return jax.lax.scan(layer, x, arrays)[0]

    layers = eqx.filter_vmap(make)(jax.random.split(KEY, 3))
    apply, arrays = split(layers, call)
    checks.check_schemes(apply, arrays, X, matrices=2)


def test_a_recurrent_cell():
    def call(cell, x):
        state, _ = jax.lax.scan(lambda state, x: (cell(x, state), None), jnp.zeros(64), x)
        return state

    apply, arrays = split(eqx.nn.GRUCell(64, 64, key=KEY), call)
    checks.check_schemes(apply, arrays, X, matrices=2)


MODEL = eqx.nn.MLP(64, 4, 128, 1, key=KEY)
WANTED = jnp.sin(X[:, :4])
lifted = jq.lift(batched)


def loss(model):
    return jnp.mean((lifted(model, X) - WANTED) ** 2)


def test_a_whole_module_is_served_by_filter_jit():
    quantized = jq.tree.quantize(MODEL, jq.uses(batched, MODEL, X).rules(jq.W8A8))
    found = eqx.filter_jit(lifted)(quantized, X)
    assert 0 < checks.distance(found, batched(MODEL, X)) < 0.02
    assert len(jq.explain(lifted, quantized, X)) == 2


def test_optimizer_states_by_filter_grad():
    def train(optimizer, wrapper, steps):
        model, state = MODEL, optimizer.init(eqx.filter(MODEL, eqx.is_inexact_array))

        @wrapper
        def step(model, state):
            gradients = eqx.filter_grad(loss)(model)
            arrays = eqx.filter(model, eqx.is_inexact_array)
            updates, state = optimizer.update(gradients, state, arrays)
            return eqx.apply_updates(model, updates), state

        for _ in range(steps):
            model, state = step(model, state)
        return loss(model), state

    checks.check_states(train, eqx.filter_jit)


def test_qat_by_filter_grad():
    rules = jq.uses(batched, MODEL, X).rules(checks.INT2)
    prepared = training.prepare(MODEL, rules)
    optimizer = optax.adam(3e-3)
    state = optimizer.init(eqx.filter(prepared, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        gradients = eqx.filter_grad(loss)(model)
        arrays = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimizer.update(gradients, state, arrays)
        return eqx.apply_updates(model, updates), state

    for _ in range(30):
        prepared, state = step(prepared, state)
    converted = training.convert(prepared)
    assert len(checks.quantized_paths(converted)) == 2
    assert loss(converted) == pytest.approx(float(loss(prepared)), rel=1e-5)
    assert loss(converted) < 0.5 * loss(jq.tree.quantize(MODEL, rules))


def test_qlora_by_filter_grad():
    rules = jq.uses(batched, MODEL, X).rules(checks.NF4)
    adapted = training.lora_init(MODEL, rules, rank=4, key=KEY)
    before = loss(adapted)
    trained, frozen = training.partition(adapted)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(trained)

    @eqx.filter_jit
    def step(trained, frozen, state):
        def of_trained(trained):
            return loss(training.combine(trained, frozen))

        gradients = eqx.filter_grad(of_trained)(trained)
        updates, state = optimizer.update(gradients, state)
        return eqx.apply_updates(trained, updates), state

    for _ in range(20):
        trained, state = step(trained, frozen, state)
    adapted = training.combine(trained, frozen)
    assert loss(adapted) < 0.5 * before
    assert len(checks.quantized_paths(training.merge(adapted))) == 2


def test_calibration():
    rules = jq.uses(batched, MODEL, X).rules(checks.STATIC)
    calibrated = training.calibrate(lifted, MODEL, [X, 0.5 * X], rules)
    largest = float(jnp.abs(X).max())
    assert calibrated.layers[0].weight.inputs.scale == pytest.approx(largest / 127, rel=0.05)
    assert checks.distance(lifted(calibrated, X), batched(MODEL, X)) < 0.03
