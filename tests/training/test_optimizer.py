import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxquant as jq
from jaxquant import FP8_E4M3, INT4, MXFP8, ArrayConfig, training
from jaxquant.training import STATE_4_BIT, STATE_8_BIT, Blockwise, state_bytes
from jaxquant.training.power_formats import GRADIENT_8, POSITIVE_4, POSITIVE_8, SIGNED_4, SIGNED_8
from jaxquant.tree import Rule
from jaxquant.tree.internal import leaves_with_paths

from .. import checks, oracles

# To pyright, states of optax have no fields.
quantized_state: Any = training.quantized_state
STATES = {"8": STATE_8_BIT, "4": STATE_4_BIT}
FORMATS = {"8": (SIGNED_8, POSITIVE_8), "4": (SIGNED_4, POSITIVE_4)}
each_state = pytest.mark.parametrize("bits", STATES)
SHAPES = {"rows": (16, 512), "odd": (700, 6), "bias": (10,), "none": (0, 512)}


@pytest.fixture(autouse=True)
def _implicit_promotion():
    """Optax needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tree(seed, shapes=SHAPES):
    """Gradients whose elements span some orders of magnitude."""
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(random.normal(size=s) * 10.0 ** random.uniform(-3, 0, s), jnp.float32)
        for name, s in shapes.items()
    }


def is_stored(x):
    return isinstance(x, Blockwise)


def stored_in(state):
    """Formats by path, of the arrays that are stored quantized."""
    found = jax.tree_util.tree_flatten_with_path(state.inner, is_leaf=is_stored)[0]
    name = jax.tree_util.keystr
    return {name(p, simple=True, separator="/"): x.q.format.name for p, x in found if is_stored(x)}


def parts_of(x, padding):
    """An array with its padded axis split in two: parts, and elements of a part."""
    axis = padding.axis % x.ndim
    return x.reshape(*x.shape[:axis], padding.parts, -1, *x.shape[axis + 1 :]), axis + 1


def values_of(leaf):
    """The values of a leaf of the state, in float64, from its stored fields."""
    if not is_stored(leaf):
        return np.asarray(leaf, np.float64)
    values, padding = oracles.dequantize(leaf.q), leaf.padding
    if padding is None:
        return values
    split, axis = parts_of(values, padding)
    shape = list(values.shape)
    shape[padding.axis] = padding.length
    return split.take(range(padding.length // padding.parts), axis).reshape(shape)


def assert_stored(leaf, values, format):
    """The leaf holds `values`, by the definition of its format."""
    if not is_stored(leaf):
        assert values.size < 4096
        np.testing.assert_allclose(leaf, values, rtol=1e-5, atol=1e-12)
        return
    assert leaf.q.format == format
    x = values
    if leaf.padding is not None:
        split, axis = parts_of(values, leaf.padding)
        count = leaf.q.shape[leaf.padding.axis] // leaf.padding.parts - split.shape[axis]
        widths = [(0, count * (a == axis)) for a in range(split.ndim)]
        x = np.pad(split, widths).reshape(leaf.q.shape)
    blocks = [n // s for n, s in zip(x.shape, leaf.q.scale.shape, strict=True)]
    axes = tuple(a for a, block in enumerate(blocks) if block > 1)
    config = ArrayConfig(format=format, group_size=tuple(blocks[a] for a in axes))
    codes, scale, zero_point = oracles.quantize(x, config, axes, oracles.abs_max_range)
    np.testing.assert_allclose(leaf.q.scale, scale, rtol=1e-5)
    checks.assert_same_quantized(
        dataclasses.replace(leaf.q, scale=scale), codes, scale, zero_point, x, config
    )


@pytest.mark.slow
@each_state
def test_adamw_steps_match_numpy_with_rounding_between_steps(bits):
    signed, positive = FORMATS[bits]
    rate, b1, b2, epsilon, decay = 1e-2, 0.9, 0.99, 1e-8, 0.1
    optimizer = quantized_state(
        optax.adamw(rate, b1, b2, epsilon, weight_decay=decay),
        STATES[bits],
        rounds_stochastically=False,
    )
    params, traces = tree(0), []

    @jax.jit
    def step(gradients, state, params):
        traces.append(1)
        return optimizer.update(gradients, state, params)

    state = optimizer.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(optimizer.init, params))
    for t in range(1, 4):
        gradients, before = tree(t), state.inner[0]
        updates, state = step(gradients, state, params)
        after = state.inner[0]
        for name in SHAPES:
            g, w = (np.asarray(x[name], np.float64) for x in (gradients, params))
            m = b1 * values_of(before.mu[name]) + (1 - b1) * g
            v = b2 * values_of(before.nu[name]) + (1 - b2) * g**2
            direction = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon)
            np.testing.assert_allclose(
                updates[name], -rate * (direction + decay * w), rtol=2e-4, atol=1e-7
            )
            assert_stored(after.mu[name], m, signed)
            assert_stored(after.nu[name], v, positive)
    assert len(traces) == 1
    assert int(after.count) == 3


# Shapes of a small transformer, biases and norms included.
LAYER = {"attention": (4, 256, 256), "up": (256, 1024), "down": (1024, 256)}
LAYER |= {f"small{i}": (256,) for i in range(9)} | {"bias": (1024,)}
MODEL = {"embedding": (256, 256), "positions": (129, 256), "layers": [LAYER] * 4}


@pytest.mark.parametrize("bits, limit", [("8", 0.27), ("4", 0.15)])
def test_state_bytes_stay_below_the_limit(bits, limit):
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), MODEL, is_leaf=lambda x: type(x) is tuple
    )
    adamw = optax.adamw(1e-3)
    plain = state_bytes(jax.eval_shape(adamw.init, params))
    assert plain == 2 * 4 * sum(x.size for x in jax.tree.leaves(params)) + 4
    few = state_bytes(jax.eval_shape(quantized_state(adamw, STATES[bits]).init, params))
    assert 0.8 * limit < few / plain <= limit


def test_state_bytes_counts_every_kind_of_array():
    key = jax.random.PRNGKey(0)
    state = {"a": jnp.zeros(7, jnp.int4), "b": np.zeros(3, bool), "c": key, "d": None}
    assert state_bytes(state) == 4 + 3 + 8
    assert state_bytes(quantized_state(optax.adamw(1e-3)).init(tree(0))) > 0


def halves(params):
    return {name: "nu" if name == "rows" else "v" for name in params}


def multi_steps(inner):
    return optax.MultiSteps(inner, 2)


ADAM = optax.adam(0.1)
ADAMW = optax.adamw(optax.cosine_decay_schedule(1e-2, 10))
MOMENTUM = optax.sgd(optax.cosine_decay_schedule(0.1, 10), momentum=0.9, nesterov=True)
MASK = dict.fromkeys(SHAPES, True) | {"odd": False}
TRANSFORMATIONS = {
    "chain": lambda q: q(optax.chain(optax.clip_by_global_norm(1.0), ADAMW)),
    "masked": lambda q: q(optax.masked(MOMENTUM, MASK)),
    "inside_masked": lambda q: optax.masked(q(MOMENTUM), MASK),
    "multi": lambda q: q(optax.multi_transform({"nu": ADAMW, "v": optax.lion(0.1)}, halves)),
    "steps": lambda q: q(multi_steps(MOMENTUM).gradient_transformation()),
    "finite": lambda q: q(optax.apply_if_finite(MOMENTUM, 2)),
    "extra_arguments": lambda q: q(optax.chain(MOMENTUM, optax.contrib.reduce_on_plateau())),
}


@pytest.mark.slow
@pytest.mark.some_rows(2)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_any_transformation_takes_the_same_steps_as_in_float(name):
    """The first step equals that of float, from a state of zeros; later states are rounded."""
    build, params = TRANSFORMATIONS[name], tree(0)
    extra = {"value": jnp.float32(1)} if name == "extra_arguments" else {}
    results = []
    for transformation in (build(lambda t: t), build(quantized_state)):
        step: Any = jax.jit(lambda g, s, t=transformation: t.update(g, s, params, **extra))
        state, updates = transformation.init(params), []
        for seed in (1, 2):
            structure = jax.tree.structure(state)
            update, state = step(tree(seed), state)
            assert jax.tree.structure(state) == structure
            updates.append(update)
        assert step._cache_size() == 1
        results.append((updates, state_bytes(state)))
    (plain, bytes_before), (ours, bytes_after) = results
    assert bytes_after < 0.7 * bytes_before
    for a, b in zip(jax.tree.leaves(plain[0]), jax.tree.leaves(ours[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(jax.tree.leaves(plain[1]), jax.tree.leaves(ours[1]), strict=True):
        assert np.linalg.norm(a - b) <= 0.1 * np.linalg.norm(a)


def test_accumulated_gradients_in_8_bits():
    """Their mean over several batches is unbiased, and its error a fraction of its size."""
    steps = optax.MultiSteps(optax.sgd(1.0), 8).gradient_transformation()
    quantized = quantized_state(steps, (training.ACCUMULATOR_8_BIT, *STATE_8_BIT))
    gradients = [{"acc_grads": tree(seed)["rows"]} for seed in range(8)]

    def last(optimizer):
        step = jax.jit(optimizer.update)
        state = optimizer.init(gradients[0])
        for gradient in gradients:
            updates, state = step(gradient, state, gradient)
        return updates["acc_grads"], state

    (exact, full), (found, state) = last(steps), last(quantized)
    assert set(stored_in(state).values()) == {GRADIENT_8.name}
    assert state_bytes(state) < 0.27 * state_bytes(full)
    assert 0 < np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact)
    assert abs(np.vdot(found, exact) / np.vdot(exact, exact) - 1) < 0.002
    with pytest.raises(ValueError, match=r"No array of the state matches.*acc_grads"):
        quantized_state(ADAM, (training.ACCUMULATOR_8_BIT, *STATE_8_BIT)).init(gradients[0])


def test_row_and_column_averages_of_adafactor_are_unsigned():
    params = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in (("a", (384, 256)), ("b", (10,)))}
    state = jax.eval_shape(quantized_state(optax.adafactor(0.1), min_size=256).init, params)
    assert stored_in(state) == dict.fromkeys(("0/v_row/a", "0/v_col/a"), POSITIVE_8.name)


def test_state_fields_decide_and_not_parameter_names():
    """A parameter, or a group of them, may be called nu, v or z."""
    names = ("nu", "v", "z", "mu", "kernel")
    params = {"attention": {n: jnp.zeros(4096) for n in names}}
    state = jax.eval_shape(quantized_state(optax.adam(0.1)).init, params)
    signed, positive = SIGNED_8.name, POSITIVE_8.name
    expected = {f"0/mu/attention/{n}": signed for n in names}
    assert stored_in(state) == expected | {f"0/nu/attention/{n}": positive for n in names}

    groups = optax.multi_transform(
        {"nu": optax.adam(0.1)}, lambda p: jax.tree.map(lambda _: "nu", p)
    )
    state = jax.eval_shape(quantized_state(groups).init, params)
    prefix = "inner_states/nu/inner_state/0"
    assert {k: v for k, v in stored_in(state).items() if k.endswith("kernel")} == {
        f"{prefix}/mu/attention/kernel": signed,
        f"{prefix}/nu/attention/kernel": positive,
    }
    for wrapped in (optax.masked(ADAM, True), optax.apply_if_finite(ADAM, 2)):
        state = jax.eval_shape(quantized_state(wrapped).init, params)
        assert stored_in(state) == {
            f"inner_state/0/{field}/attention/{n}": kind
            for field, kind in (("mu", signed), ("nu", positive))
            for n in names
        }
    steps = optax.MultiSteps(optax.sgd(0.1, 0.9), 2).gradient_transformation()
    state = jax.eval_shape(quantized_state(steps).init, params)
    assert set(stored_in(state)) == {f"inner_opt_state/0/trace/attention/{n}" for n in names}
    factored = jax.eval_shape(quantized_state(optax.adafactor(0.1)).init, params)
    assert stored_in(factored) == {}


# Optimizers whose states have other fields: the fields that are never negative, and those that stay
# in float. All other fields are signed.
FIELDS = {
    optax.amsgrad: ("0/nu 0/nu_max", ""),
    optax.adagrad: ("0/sum_of_squares", ""),
    optax.adadelta: ("1/e_g 1/e_x", ""),
    optax.rmsprop: ("0/nu", ""),
    optax.adan: ("0/n", "0/v"),
    optax.adafactor: ("", "0/v"),
    optax.lbfgs: ("", "0/params 0/updates 0/diff_params_memory 0/diff_updates_memory 2/grad"),
    optax.contrib.ademamix: ("0/nu", ""),
    optax.contrib.cocob: ("", "2/init_particles 2/cumulative_gradients"),
    optax.contrib.dowg: ("", "1/init_params"),
    optax.contrib.galore: ("0/base_optimizer_state/nu", "0/projector"),
    optax.contrib.madgrad: ("1/grad_sum_sq", "1/s 1/x0"),
    optax.contrib.prodigy: ("exp_avg_sq", "params0"),
    optax.contrib.schedule_free_adamw: ("base_optimizer_state/0/nu", "z"),
}


@pytest.mark.parametrize("build", FIELDS, ids=lambda build: build.__name__)
def test_unsigned_and_float_fields_of_each_optimizer(build):
    plain: Any = build(0.1)
    params = {"params": {"g": jnp.full((2, 3), 0.5)}}
    state = jax.eval_shape(quantized_state(plain, min_size=4).init, params)
    paths, leaves, _ = leaves_with_paths(state.inner, is_stored)
    formats = {
        path.partition("/params/g")[0]: x.q.format if is_stored(x) else None
        for path, x in zip(paths, leaves, strict=True)
        if is_stored(x) or x.size >= 4
    }
    positive, exact = (set(names.split()) for names in FIELDS[build])
    assert {k for k, format in formats.items() if format == POSITIVE_8} == positive
    assert {k for k, format in formats.items() if format is None} == exact


@pytest.mark.parametrize(
    "rules, expected",
    [
        (ArrayConfig(), {"0/mu/rows": "int8", "0/nu/rows": "int8"}),
        (ArrayConfig(format=MXFP8), {"0/mu/rows": "mxfp8", "0/nu/rows": "mxfp8"}),
        ({"0/mu/*": ArrayConfig(format=INT4, symmetric=False)}, {"0/mu/rows": "int4"}),
        (
            [("*/mu/*", None), ("*", ArrayConfig(format=FP8_E4M3, group_size=64))],
            {"0/nu/rows": "fp8_e4m3"},
        ),
    ],
    ids=str,
)
def test_rules_choose_any_format_for_any_path(rules, expected):
    params = tree(0, {"rows": (16, 512), "bias": (10,)})
    optimizer = quantized_state(ADAM, rules)
    _, state = jax.eval_shape(lambda g: optimizer.update(g, optimizer.init(g)), params)
    assert stored_in(state) == expected


def test_small_and_narrow_arrays_stay_in_float():
    params = {"half": jnp.zeros(512, jnp.bfloat16), "count": jnp.zeros(3)}
    optimizer = quantized_state(ADAM, ArrayConfig(group_size=64), min_size=512)
    state = jax.eval_shape(optimizer.init, params)
    assert set(stored_in(state)) == {"0/mu/half", "0/nu/half"}
    assert jax.eval_shape(Blockwise.dequantize, state.inner[0].mu["half"]).dtype == jnp.bfloat16
    narrow = {"eight": jnp.zeros(512, jnp.float8_e4m3fn), "whole": jnp.zeros(512, jnp.int32)}
    trace = quantized_state(optax.trace(0.9), ArrayConfig(), min_size=1).init(narrow)
    assert stored_in(trace) == {}


CONFIGS = {
    "nested scales": ArrayConfig(format=jq.NVFP4),
    "power-of-two scales": ArrayConfig(format=MXFP8),
    "zero points": ArrayConfig(format=INT4, symmetric=False),
    "bfloat16 scales": ArrayConfig(format=jq.NF4, scale_dtype="bfloat16"),
}


@pytest.mark.some_rows(4)
@pytest.mark.parametrize("rules", [*STATES.values(), *CONFIGS.values()], ids=[*STATES, *CONFIGS])
def test_the_first_state_is_written_and_not_computed(rules):
    """XLA would compute the quantization of zeros while it compiles: 30 s for 1024 x 2048."""
    optimizer = quantized_state(optax.adamw(1e-3), rules)
    params = {"kernel": jnp.ones((64, 128)), "odd": jnp.ones((4099,), jnp.bfloat16)}
    program = jax.jit(optimizer.init).lower(params).compile()
    assert not re.search("f32.64,128|bf16.4099| abs| divide", program.as_text() or "")
    # In one update with zero gradients, the zeros are quantized.
    zeros = jax.tree.map(jnp.zeros_like, params)
    first = optimizer.init(params)
    _, second = jax.jit(optimizer.update)(zeros, first, params)
    assert stored_in(first)
    for state in (program(params).inner[0], second.inner[0]):
        for field in ("mu", "nu"):
            found, expected = getattr(state, field), getattr(first.inner[0], field)
            for name in params:
                checks.assert_equal_quantized(found[name].q, expected[name].q)
                assert not np.any(found[name].dequantize())


def test_functions_of_optax_read_the_inner_state():
    optimizer = optax.contrib.schedule_free_adamw(0.1, warmup_steps=2)
    params = {"w": tree(0)["rows"]}
    found = []
    for transformation in (optimizer, quantized_state(optimizer)):
        state, now = transformation.init(params), params
        for seed in (1, 2):
            updates, state = transformation.update({"w": tree(seed)["rows"]}, state, now)
            now = optax.apply_updates(now, updates)
        state = getattr(state, "inner", state)
        found.append(optax.contrib.schedule_free_eval_params(state, now)["w"] - params["w"])
    assert 0 < np.linalg.norm(found[1] - found[0]) < 0.05 * np.linalg.norm(found[0])


def test_first_states_that_are_not_zero_are_quantized():
    optimizer = quantized_state(optax.adagrad(0.1, initial_accumulator_value=0.3))
    params = {"w": jnp.ones((64, 128))}
    text = jax.jit(optimizer.init).lower(params).compile().as_text() or ""
    # The largest magnitudes are computed in the program, and not while it is compiled.
    assert " abs(" in text
    for init in (optimizer.init, jax.jit(optimizer.init)):
        state = init(params).inner[0].sum_of_squares["w"]
        assert is_stored(state)
        np.testing.assert_allclose(state.dequantize(), 0.3, rtol=1e-6)


def test_scalars_stay_in_float():
    adam = optax.inject_hyperparams(optax.adam)(1e-3)
    state = quantized_state(adam, ArrayConfig(), min_size=1).init({"w": jnp.ones(8)})
    assert stored_in(state)
    assert all(x.shape == () for x in state.inner.hyperparams.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    """A node around a value, such as Flax's variables."""

    value: Any


def test_boxes_of_single_arrays_stay_around_codes(tmp_path):
    both = {"a": jnp.ones((64, 128)), "b": jnp.ones((64, 64))}
    params = {"one": Box(both["a"]), "both": Box(both), "none": Box(None)}
    optimizer = quantized_state(optax.trace(0.9))
    _, state = jax.jit(optimizer.update)(params, optimizer.init(params))
    trace = state.inner.trace
    assert isinstance(trace["one"].q.codes, Box)
    assert all(is_stored(trace["both"].value[k]) for k in both)
    np.testing.assert_allclose(trace["one"].dequantize(), 1, rtol=1e-6)
    updates, _ = optimizer.update(params, state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    jq.save(tmp_path / "state", state)
    loaded = jq.load(tmp_path / "state", like=jax.eval_shape(optimizer.init, params))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)


def test_the_noise_of_many_arrays_is_drawn_at_once():
    """XLA compiles each draw separately: those of 60 parameters took 40 s."""
    optimizer = quantized_state(ADAM, min_size=1)

    def draws(count):
        params = [jnp.ones(2 + i) for i in range(count)]
        text = jax.jit(optimizer.update).lower(params, optimizer.init(params)).as_text()
        return text.count("call @_threefry") + text.count("call @threefry")

    assert 0 < draws(9) == draws(2)


@pytest.mark.slow
def test_scan_and_shard_map_take_the_same_steps_as_a_loop():
    optimizer = quantized_state(optax.adamw(1e-2))
    shapes = {"rows": (64, 512)}
    params, gradients = tree(0, shapes), [tree(seed, shapes) for seed in (1, 2, 3)]
    step = jax.jit(optimizer.update, donate_argnums=1)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = step(gradient, state, params)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)

    def body(state, gradient):
        return optimizer.update(gradient, state, params)[::-1]

    _, scanned = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(optimizer.init(params), stacked)
    np.testing.assert_allclose(scanned["rows"][-1], updates["rows"], rtol=1e-4, atol=1e-7)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P("d"), P(None, "d")), out_specs=P("d"))
    def parts(params, stacked):
        def body(state, gradient):
            return optimizer.update(gradient, state, params)[::-1]

        first, rest = (jax.tree.map(lambda g, i=i: g[i], stacked) for i in (0, slice(1, None)))
        state, _ = body(optimizer.init(params), first)
        _, updates = jax.lax.scan(body, state, rest)
        return jax.tree.map(lambda u: u[-1], updates)

    # The blocks of a part of an array are others than those of the array.
    found = parts(params, stacked)["rows"]
    assert np.linalg.norm(found - updates["rows"]) < 0.05 * np.linalg.norm(found)


@pytest.mark.slow
def test_states_survive_files_and_flattening(tmp_path):
    optimizer = quantized_state(optax.adamw(1e-2), key=jax.random.PRNGKey(3))
    params = tree(0)
    update = jax.jit(optimizer.update)
    _, state = update(tree(1), optimizer.init(params), params)
    expected, _ = update(tree(2), state, params)
    jq.save(tmp_path / "state.safetensors", state)
    loaded = jq.load(tmp_path / "state.safetensors", like=jax.eval_shape(optimizer.init, params))
    leaves, treedef = jax.tree.flatten(state)
    for other in (loaded, jax.tree.unflatten(treedef, leaves)):
        assert jax.tree.structure(other) == treedef
        for a, b in zip(leaves, jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        updates, _ = update(tree(2), other, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_gradients_make_their_block_nan_in_the_next_step(bad):
    shapes = {"rows": (16, 512)}
    gradients = {"rows": tree(1, shapes)["rows"].at[3, 300].set(bad)}
    both: list[Any] = [optax.adam(0.1), quantized_state(optax.adam(0.1))]
    states = [t.init(gradients) for t in both]
    for t, g in enumerate((gradients, tree(2, shapes))):
        found = [x.update(g, s) for x, s in zip(both, states, strict=True)]
        (expected, _), (got, _) = found
        states = [state for _, state in found]
        is_bad = ~np.isfinite(got["rows"])
        assert np.all(is_bad | np.isfinite(expected["rows"]))
        where = np.zeros((16, 512), bool)
        where[2:4, 256:320] = t == 1
        where[3, 300] = True
        np.testing.assert_array_equal(is_bad, where)


def test_second_moments_follow_gradients_that_fall():
    """Rounded to nearest, they stay where they are in blocks whose largest elements do."""
    gradients = jnp.full((64, 64), 0.1).at[:, ::16].set(1)
    rms = optax.scale_by_rms(0.999, initial_scale=1.0)

    def last_updates(optimizer):
        def body(state, _):
            return optimizer.update(gradients, state)[::-1]

        updates = jax.lax.scan(body, optimizer.init(gradients), None, 2700)[1]
        return updates[-1]

    plain, default, nearest = (
        np.asarray(jax.jit(functools.partial(last_updates, optimizer))())[:, 1::2]
        for optimizer in (
            rms,
            quantized_state(rms),
            quantized_state(rms, rounds_stochastically=False),
        )
    )
    # The rate at which parameters learn, and the second moment, relative to those of float32.
    assert abs(np.mean(default / plain) - 1) < 0.03
    assert abs(np.mean((plain / default) ** 2) - 1) < 0.03
    assert np.mean(nearest / plain) < 0.7
    assert np.median((plain / nearest) ** 2) > 5


@pytest.mark.slow
def test_four_bits_follow_a_slow_average():
    """Rounded to nearest, updates of 1 % are lost between codes that are 10 % apart."""
    wanted = jnp.tile(jnp.linspace(0.1, 1, 8, dtype=jnp.float32), (16, 64))

    def average(**options):
        optimizer = quantized_state(
            optax.ema(0.99, debias=False), ArrayConfig(format=INT4), **options
        )

        @jax.jit
        def run():
            def body(state, _):
                updates, state = optimizer.update(wanted, state)
                return state, updates

            state, updates = jax.lax.scan(body, optimizer.init(wanted), None, 100)
            return state.count, updates[-1].reshape(-1, 8).mean(0) / (1 - 0.99**100)

        return run()

    count, followed = average()
    assert int(count) == 100
    assert np.max(np.abs(followed / wanted[0, :8] - 1)) < 0.05
    nearest = average(rounds_stochastically=False)[1]
    assert np.max(np.abs(nearest / wanted[0, :8] - 1)) > 0.1
    np.testing.assert_array_equal(average(key=jax.random.key(0))[1], followed)
    assert not np.array_equal(average(key=jax.random.key(1))[1], followed)


def test_equal_arrays_are_rounded_with_different_noise():
    optimizer = quantized_state(optax.trace(0.9), ArrayConfig(format=INT4))
    gradients = dict.fromkeys("ab", tree(0)["odd"])
    _, state = jax.jit(lambda g: optimizer.update(g, optimizer.init(g)))(gradients)
    a, b = (state.inner.trace[name].q for name in "ab")
    np.testing.assert_array_equal(a.scale, b.scale)
    assert not np.array_equal(a.codes.astype(np.int8), b.codes.astype(np.int8))


@pytest.mark.slow
def test_a_regression_reaches_the_loss_of_float32():
    """A network of two layers, with noise in the targets that it cannot learn."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(256, 64)), jnp.float32)
    y = jnp.sin(x @ jnp.asarray(random.normal(size=(64, 4)), jnp.float32) / 4)
    y += jnp.asarray(random.normal(size=y.shape), jnp.float32)
    first = {"a": random.normal(size=(64, 128)) / 8, "b": random.normal(size=(128, 4)) / 11}
    first = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), first)

    def loss(params):
        out = jnp.tanh(x @ params["a"]) @ params["b"]
        return jnp.mean((out - y) ** 2) + 3e-3 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))

    def train(optimizer):
        def body(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = first, optimizer.init(first)
        return loss(jax.jit(lambda c: jax.lax.scan(body, c, None, 150)[0])(carry)[0])

    adam = optax.adamw(optax.cosine_decay_schedule(1e-2, 150))
    plain = train(adam)
    assert plain < 0.7 * loss(first)
    assert abs(train(quantized_state(adam, STATE_8_BIT)) / plain - 1) < 0.005
    assert abs(train(quantized_state(adam, STATE_4_BIT)) / plain - 1) < 0.015


ERRORS = [
    (lambda: quantized_state(0.1), "must be an optax.GradientTransformation.*got 0.1"),
    (lambda: quantized_state(optax.MultiSteps(ADAM, 2)), r"pass its .gradient_transformation\(\)"),
    (lambda: quantized_state(ADAM, min_size=0), "positive number of elements; got 0"),
    (lambda: quantized_state(ADAM, jq.W8A8), "paths of the state; got Scheme.*Pass the weights"),
    (lambda: quantized_state(ADAM, "W8A8"), "rules must be"),
    (
        lambda: quantized_state(ADAM, {"*/momentum/*": ArrayConfig()}).init(tree(0)),
        re.escape("matches ['*/momentum/*']; its paths are ['0/count', '0/mu/bias'"),
    ),
    (
        lambda: quantized_state(ADAM, ArrayConfig(group_size=(2, 2))).init(tree(0)),
        r"a single number of elements per block, or None for 128; got \(2, 2\)",
    ),
    (
        lambda: quantized_state(ADAM, rounds_stochastically=False, key=jax.random.key(0)),
        "key must be None with rounds_stochastically=False; got Array",
    ),
]


@pytest.mark.parametrize("call, text", ERRORS, ids=range(len(ERRORS)))
def test_invalid_arguments_raise(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_an_optional_rule_may_match_nothing():
    rules = [Rule("*/momentum/*", None, required=False), Rule("*", ArrayConfig())]
    assert stored_in(quantized_state(ADAM, rules).init(tree(0)))
