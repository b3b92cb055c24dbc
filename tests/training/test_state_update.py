"""Updates of quantized states in parts, by native kernels, beside those of XLA as a whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxquant import ArrayConfig, training
from jaxquant.kernels import cpu
from jaxquant.training import STATE_4_BIT, STATE_8_BIT
from jaxquant.tree import Rule

quantized_state: Any = training.quantized_state
needs_native = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=cpu.unavailable() or "is there"
)
# Several windows, blocks along four axes, a vector, padding, and a state in float.
SHAPES = {
    "windows": (512, 1088),
    "convolution": (3, 3, 16, 32),
    "vector": (8192,),
    "padded": (701, 34),
    "small": (7, 5),
}


@pytest.fixture(autouse=True)
def _implicit_promotion():
    """Optax needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tree(seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=s) * 10.0 ** rng.uniform(-3, 0, s), jnp.float32)
        for name, s in SHAPES.items()
    }


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


def swap():
    """Each of two arrays of the state becomes the other one."""

    def init(params):
        return {"mu": optax.tree.zeros_like(params), "trace": optax.tree.zeros_like(params)}

    def update(updates, state: Any, params=None):
        del params
        mu = jax.tree.map(lambda g, t: g + 0.9 * t, updates, state["trace"])
        trace = jax.tree.map(lambda m: m / 2, state["mu"])
        return jax.tree.map(lambda g, m: g - m, updates, state["mu"]), {"mu": mu, "trace": trace}

    return optax.GradientTransformation(init, update)


ADAMW = optax.adamw(optax.cosine_decay_schedule(1e-2, 10))
OPTIMIZERS = {
    "adamw": ADAMW,
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), ADAMW),
    # The norms of updates need whole arrays.
    "lamb": optax.lamb(1e-2),
    "masked": optax.masked(optax.sgd(0.1, 0.9, nesterov=True), is_matrix),
    "amsgrad": optax.amsgrad(1e-2),
    "swapped": swap(),
    "steps": optax.MultiSteps(ADAMW, 2).gradient_transformation(),
}
RULES = {
    "8": STATE_8_BIT,
    "4": STATE_4_BIT,
    # The kernels do not encode mu.
    "mixed": (Rule("*/mu/*", ArrayConfig(), required=False), *STATE_4_BIT),
}
CASES = [(name, "8") for name in OPTIMIZERS] + [("adamw", "4"), ("adamw", "mixed")]


def assert_near(found, wanted):
    """Codes alike but for one element in 10,000, and floats to float32's rounding."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(y.dtype, jnp.floating):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-8)
        else:
            assert np.mean(np.asarray(x) != np.asarray(y)) <= 1e-4


@needs_native
@pytest.mark.some_rows(3)
@pytest.mark.parametrize("name, rules", CASES, ids=str)
def test_parts_take_the_steps_of_xla(name, rules):
    """Outside of `jit`, XLA computes the update as a whole."""
    optimizer = quantized_state(OPTIMIZERS[name], RULES[rules])
    params = tree(0)
    step: Any = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for seed in (1, 2):
        expected = optimizer.update(tree(seed), state, params)
        found = step(tree(seed), state, params)
        assert_near(found, expected)
        state = found[1]
    assert step._cache_size() == 1
    text = step.lower(tree(1), state, params).as_text()
    # XLA computes what is in a `cond`, as in MultiSteps, and what the kernel does not encode.
    is_native = name != "steps" and rules != "mixed"
    assert ("jaxquant_update_blocks" in text) == is_native


@needs_native
def test_states_that_change_their_dtype_are_left_to_xla():
    """As for gradients in float64: the kernels encode float32 alone."""

    def init(params: Any):
        return {"mu": jnp.zeros_like(params)}

    def update(updates, state: Any, params=None):
        del params
        return updates, {"mu": (state["mu"] + updates).astype(jnp.bfloat16)}

    optimizer = quantized_state(optax.GradientTransformation(init, update))
    gradient = tree(0)["windows"][:64, :64]
    state = optimizer.init(gradient)
    found, expected = jax.jit(optimizer.update)(gradient, state), optimizer.update(gradient, state)
    assert_near(found, expected)
    assert found[1].inner["mu"].q.dtype == jnp.bfloat16


@needs_native
def test_parts_under_vmap_grad_and_scan_and_with_nan():
    optimizer = quantized_state(optax.adam(1e-2))
    both = {"w": tree(0)["windows"][:128, :64].reshape(2, 64, 64)}
    state = jax.vmap(optimizer.init)(both)
    found = jax.jit(jax.vmap(optimizer.update))(both, state)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], (both, state))
        expected = optimizer.update(*one)
        assert_near(jax.tree.map(lambda x, i=i: x[i], found), expected)

    alone = jax.tree.map(lambda x: x[0], both)
    momentum = quantized_state(optax.sgd(0.1, 0.9))

    def moved(scale):
        gradients = jax.tree.map(lambda g: g * scale, alone)
        return jnp.sum(jnp.abs(momentum.update(gradients, momentum.init(alone))[0]["w"]))

    slope = jax.jit(jax.grad(moved))(1.5)
    np.testing.assert_allclose(slope, 0.1 * jnp.sum(jnp.abs(alone["w"])), rtol=1e-5)

    state = optimizer.init(alone)

    def body(state, gradient):
        return optimizer.update(gradient, state)[::-1]

    gradients = {"w": jnp.stack([alone["w"].at[3, 7].set(jnp.nan), alone["w"]])}
    scanned, updates = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(state, gradients)
    steps = state
    for i in range(2):
        expected, steps = optimizer.update({"w": gradients["w"][i]}, steps)
        np.testing.assert_allclose(updates["w"][i], expected["w"], rtol=2e-5, atol=1e-8)
    assert_near(scanned, steps)
    assert np.isnan(scanned.inner[0].mu["w"].q.scale).sum() == 1


@needs_native
@pytest.mark.some_rows(1)
@pytest.mark.parametrize("rules", ["8", "4"])
def test_an_update_on_cpu_needs_as_much_less_memory_as_the_states_save(rules):
    """Of 12 arrays, one at most is in float at a time: before, 2.2 times the parameters were."""
    sizes = [(512, 768)] * 6 + [(768, 512)] * 6
    params = [jax.ShapeDtypeStruct(s, jnp.float32) for s in sizes]

    def peak_and_state(optimizer):
        state = jax.eval_shape(optimizer.init, params)

        def step(params, state, gradients):
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        args = params, state, params
        memory = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()
        assert memory is not None
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes
        total += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        return total, training.state_bytes(state)

    full, full_state = peak_and_state(optax.adamw(1e-3))
    peak, state = peak_and_state(quantized_state(optax.adamw(1e-3), RULES[rules]))
    largest = 4 * 512 * 768
    assert full_state - state > 0.7 * full_state
    assert peak <= full - (full_state - state) + 3.5 * largest
